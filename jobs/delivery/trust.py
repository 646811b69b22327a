"""What an archive knows of its own reliability, fitted on pictures that training never saw.

They have chosen the epoch, the seed and the variant, so answers to them are a little better than to
new pictures; the test set, which has chosen nothing, shows what that leaves of the promises.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jobs.statistics import MIN_FOR_TEMPERATURE, best_temperature, cross_entropy
from serving.messages import softmax
from serving.progress import log
from serving.trust import Array, Trust, roots

MIN_HELD_OUT = 50  # … for p-values down to 2 %
KNOWN = 2000  # training pictures, at most, whose spread others are compared with
COMPONENTS = 64
LEAST = 1e-6  # variance, which is none in directions that no training picture differs in


def fit_temperature(logits: Array, labels: NDArray[np.int64]) -> float:
    """:func:`jobs.statistics.best_temperature` of logits [N, C] and labels [N] of held-out
    pictures; the log says why it is what it is."""
    found = best_temperature(logits, labels)
    if found != 1:
        before, after = cross_entropy(logits, labels), cross_entropy(logits / found, labels)
        log(f"export: temperature {found:.2f}, held-out loss {before:.3f} → {after:.3f}")
        return found
    why = "no temperature is better"
    if len(labels) < MIN_FOR_TEMPERATURE:
        why = f"{len(labels)} held-out pictures are too few"
    elif (logits.argmax(axis=1) == labels).all():
        why = "all held-out pictures are right, which tells of no error"
    log(f"export: probabilities stay as they are: {why}")
    return found


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
        variances=np.maximum(found.explained_variance_, LEAST).astype(np.float32),
        rest=np.maximum(found.noise_variance_, LEAST).astype(np.float32),
        strangeness=np.empty(0, np.float32),
        right=np.sort(right),
    )
    return replace(fitted, strangeness=np.sort(fitted.strange(held_out)))
