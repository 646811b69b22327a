"""How good predictions are, and how sure that is."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from jobs import distributed
from jobs.data import Examples
from jobs.results import Difference
from serving.archive import Scores

CALIBRATION_BINS = 15
RESAMPLES = 10_000


@torch.no_grad()
def predict(
    network: nn.Module,
    examples: Examples,
    batch_size: int,
    autocast: Callable[[], Any],
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits float32 [N, C] of all examples in their order, on the CPU; leaves eval mode on."""
    network.eval()
    count, place = len(examples), examples.labels.device
    parts = distributed.batches(count, batch_size, place)
    outputs = []
    for part, (inputs, _) in zip(parts, examples.batches(parts), strict=True):
        distributed.check()
        with autocast():
            outputs.append(network(inputs).float())
        advance(len(part) * distributed.size())
    own = torch.cat(outputs)
    logits = own.new_empty(count, own.shape[1])
    logits[distributed.share(count)] = own
    distributed.complete(logits)
    return logits.cpu()


def quick_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy, for the table of epochs."""
    labels = labels.cpu()
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
    }


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Everything about one set of predictions.

    Args:
        logits: float32 [N, C] on the CPU.
        labels: int64 [N] on the CPU.
    """
    from scipy.stats import binomtest

    classes = logits.shape[1]
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    right, total = int(confusion.trace()), len(labels)
    interval = binomtest(right, total).proportion_ci(0.95, method="wilson")
    per_class = [
        hits / count if count else None
        for hits, count in zip(
            confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True
        )
    ]
    return Scores(
        **quick_scores(logits, labels),
        accuracy_low=float(interval.low),
        accuracy_high=float(interval.high),
        per_class=tuple(per_class),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        calibration_error=calibration_error(logits, labels),
        images=total,
    )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence, weighted."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS).index_add(0, bins, confidence - right)
    return float(gap.abs().sum() / len(labels))


def paired_difference(
    right_a: NDArray[np.bool_], right_b: NDArray[np.bool_], *, seed: int = 0
) -> Difference:
    """Compares two classifiers on the same images.

    Args:
        right_a: bool [N], where the first is right.
        right_b: bool [N], where the second is.

    Returns:
        The difference of their accuracies with a bootstrap interval over images, and the p-value
        of the exact McNemar test.
    """
    from scipy.stats import binomtest

    total = len(right_a)
    only_a = int((right_a & ~right_b).sum())
    only_b = int((right_b & ~right_a).sum())
    # Resampling images with replacement draws these three counts from a multinomial.
    shares = np.array([only_a, only_b, total - only_a - only_b]) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, size=RESAMPLES)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / total, [0.025, 0.975])
    discordant = only_a + only_b
    return Difference(
        difference=(only_a - only_b) / total,
        low=float(low),
        high=float(high),
        p_value=float(binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        only_a=only_a,
        only_b=only_b,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for so many tests at once, in the order of `p_values`.

    A difference that is called one where the corrected value is below 5 % bears a risk of 5 % at
    most that any of those called so is none.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def mean_over_seeds(values: Sequence[float], images: int) -> Difference:
    """What another seed would give, judged by two seeds at least.

    Args:
        values: accuracies, or differences of two, one a seed.
        images: how many each was counted on. Seeds that agree to the picture are not certainty:
            their spread is taken as that of rounding to one picture, at least.

    Returns:
        Their mean as `difference` from zero, all by Student's t over the seeds.
    """
    from scipy.stats import t as student

    mean, freedom = fmean(values), len(values) - 1
    rounding = 1 / images / 12**0.5  # standard deviation of a uniform distribution
    error = max(stdev(values), rounding) / len(values) ** 0.5
    reach = float(student.ppf(0.975, freedom)) * error
    p_value = 2 * float(student.sf(abs(mean) / error, freedom))
    return Difference(difference=mean, low=mean - reach, high=mean + reach, p_value=p_value)
