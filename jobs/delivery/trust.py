"""What an archive knows of its own reliability, fitted on pictures that training never saw.

They have chosen the epoch, the seed and the variant, so answers to them are a little better than to
new pictures; the test set, which has chosen nothing, shows what that leaves of the promises.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from serving.messages import softmax
from serving.progress import log
from serving.trust import Array, Trust, roots

MIN_FOR_TEMPERATURE = 100  # held-out pictures
MIN_HELD_OUT = 50  # … for p-values down to 2 %
KNOWN = 2000  # training pictures, at most, whose spread others are compared with
COMPONENTS = 64
SIGNIFICANT = 3.84  # 95 % of χ² with one degree of freedom


def fit_temperature(logits: Array, labels: NDArray[np.int64]) -> float:
    """What to divide logits by so that probabilities mean what they say (Guo et al. 2017).

    1.0 where there are few pictures, or where the likelihood-ratio test (Wilks 1938) does not tell
    the gain from chance.

    Args:
        logits: [N, C] of held-out pictures.
        labels: [N].
    """
    from scipy.optimize import minimize_scalar

    count = len(labels)
    if count < MIN_FOR_TEMPERATURE:
        log(f"export: probabilities stay as they are: {count} held-out pictures are too few")
        return 1.0

    def loss(log_temperature: float) -> float:
        return _mean_loss(logits / np.exp(log_temperature), labels)

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    before, after = loss(0.0), float(best.fun)
    if 2 * count * (before - after) < SIGNIFICANT:
        log("export: probabilities stay as they are: a temperature makes them no better")
        return 1.0
    temperature = float(np.exp(best.x))
    log(f"export: temperature {temperature:.2f}, held-out loss {before:.3f} → {after:.3f}")
    return temperature


def _mean_loss(logits: Array, labels: NDArray[np.int64]) -> float:
    from scipy.special import log_softmax

    rows = log_softmax(logits.astype(np.float64), axis=1)
    return -float(rows[np.arange(len(labels)), labels].mean())


def fit(known: Array, held_out: Array, logits: Array, labels: NDArray[np.int64]) -> Trust:
    """Familiarity and sets of classes.

    Args:
        known: features [M, F] of training pictures.
        held_out: features [n, F] of held-out pictures.
        logits: [n, C] of these, divided by the temperature.
        labels: int64 [n].
    """
    from sklearn.decomposition import PCA

    components = min(COMPONENTS, min(known.shape) // 2)
    found = PCA(components, svd_solver="randomized", random_state=0).fit(roots(known))
    right = softmax(logits)[np.arange(len(labels)), labels]
    fitted = Trust(
        centre=found.mean_.astype(np.float32),
        directions=found.components_.T.astype(np.float32, order="C"),
        variances=found.explained_variance_.astype(np.float32),
        rest=np.array(found.noise_variance_, np.float32),
        strangeness=np.empty(0, np.float32),
        right=np.sort(right),
    )
    return replace(fitted, strangeness=np.sort(fitted.strange(held_out)))
