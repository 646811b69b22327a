"""Statistical tests of the difference between two classifiers, and calibration of one."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.results import Difference
from serving.archive import Interval

Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals
MIN_FOR_TEMPERATURE = 100  # held-out pictures
TINY_SHARE = 1e-12
SIGNIFICANT = 3.84  # 95 % of χ² with one degree of freedom


def paired_difference(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> Difference:
    """Compares two classifiers on the same images.

    Args:
        right_a: bool [N], where the first is right.
        right_b: bool [N], where the second is.

    Returns:
        The difference of their accuracies with a 95 % interval over images (Bonett and Price 2012),
        and the p-value of the exact McNemar test.
    """
    total = len(right_a)
    only_a = int((right_a & ~right_b).sum())
    only_b = int((right_b & ~right_a).sum())
    # With one more of each: few different answers, or none, do not prove that there are no others.
    a, b = (only_a + 1) / (total + 2), (only_b + 1) / (total + 2)
    reach = Z * math.sqrt((a + b - (a - b) ** 2) / (total + 2))
    return Difference(
        difference=(only_a - only_b) / total,
        low=max(-1.0, a - b - reach),
        high=min(1.0, a - b + reach),
        p_value=exact_mcnemar(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
    )


def exact_mcnemar(a: int, b: int) -> float:
    """The two-sided p-value of so many successes and failures if both are equally likely: the
    exact McNemar test of discordant pairs. In whole numbers, without half a second of imports."""
    total, tail, term = a + b, 0, 1  # of the row of binomial coefficients
    for count in range(min(a, b) + 1):
        tail += term
        term = term * (total - count) // (count + 1)
    p_value: float = 2 * tail / 2**total
    return min(1.0, p_value)


def wilson(right: ArrayLike, total: ArrayLike) -> tuple[Any, Any]:
    """The 95 % interval of a share (Wilson 1927), float64; of arrays, that of each."""
    share, spread = np.divide(right, total), np.divide(Z**2, total)
    reach = np.sqrt(share * (1 - share) * spread + spread**2 / 4)
    low, high = ((share + spread / 2 + sign * reach) / (1 + spread) for sign in (-1, 1))
    return np.clip(low, 0.0, share), np.clip(high, share, 1.0)  # rounding leaves the share inside


def confidence_sequence(count: float, total: float) -> tuple[float, float]:
    """A 95 % interval of a share for those who look again and again: with that probability it
    holds the true share at every look, from the first one on (Robbins 1970).

    Shares for which the observations, in the order in which they came, are over 20 times less
    likely than on average over all shares are outside. An observation may also be a part x of one,
    as a^x b^(1-x) is at most x a + (1-x) b.
    """
    misses = total - count
    average = math.lgamma(count + 1) + math.lgamma(misses + 1) - math.lgamma(total + 2)

    def inside(share: float) -> bool:
        rest = math.log1p(-share) if share < 1 else -math.inf  # where it was rounded to 1
        likelihood = count * math.log(share) + misses * rest
        return average - likelihood < math.log(20)

    best = min(max(count / total if total else 0.5, TINY_SHARE), 1 - TINY_SHARE)
    low = _boundary(inside, best, 0.0) if count else 0.0
    high = _boundary(inside, best, 1.0) if misses else 1.0
    return low, high


def _boundary(inside: Callable[[float], bool], within: float, end: float) -> float:
    """The last point on the way from `within`, which is inside, to `end` that is inside, too; by
    bisection."""
    for _ in range(50):
        middle = (within + end) / 2
        within, end = (middle, end) if inside(middle) else (within, middle)
    return within


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for so many tests at once, in the order of `p_values`.

    If every difference with a corrected value below 5 % is called significant, the risk that any of
    them is a false positive is at most 5 %.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def balanced_accuracy(right: Sequence[int], total: Sequence[int]) -> Interval:
    """The mean of all classes' accuracies with its 95 % interval: that of a mean of independent
    shares. For their spread, each class counts one more right and one more wrong answer, because a
    class whose answers are all right would otherwise have none.

    Args:
        right: right answers of each class.
        total: test images of each class, at least one.
    """
    hits, counts = np.array(right), np.array(total)
    value, smoothed = float((hits / counts).mean()), (hits + 1) / (counts + 2)
    error = math.sqrt((smoothed * (1 - smoothed) / counts).sum()) / len(counts)
    return Interval(value=value, low=max(0.0, value - Z * error), high=min(1.0, value + Z * error))


def mean_over_seeds(values: Sequence[float], images: int) -> Difference:
    """The mean over seeds with its interval and p-value; needs at least two seeds.

    Args:
        values: accuracies, or differences of two, one a seed.
        images: how many each was counted on. Seeds that agree exactly do not prove certainty:
            the spread is taken to be at least that of rounding to one picture.

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


def best_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """What to divide logits by so that probabilities mean what they say (Guo et al. 2017).

    1.0 where there are few pictures, where all of them are right, so that the loss would fall with
    the temperature for ever, or where the likelihood-ratio test (Wilks 1938) does not tell the gain
    from chance.

    Args:
        logits: [N, C] of held-out pictures.
        labels: [N].
    """
    if len(labels) < MIN_FOR_TEMPERATURE or (logits.argmax(axis=1) == labels).all():
        return 1.0
    # The loss is convex in 1/temperature.
    best = math.exp(_boundary(lambda x: not _is_too_hot(math.exp(x), logits, labels), -3, 3))
    gain = cross_entropy(logits, labels) - cross_entropy(logits / best, labels)
    return best if 2 * len(labels) * gain >= SIGNIFICANT else 1.0


def _is_too_hot(temperature: float, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> bool:
    """Whether the loss falls with the temperature: the logit that is expected by the probabilities
    is then, on average, below the right one's."""
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    expected = (shares * scaled).sum(axis=1) / shares.sum(axis=1)
    return bool(expected.mean() < scaled[np.arange(len(labels)), labels].mean())


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Cross-entropy in nats of logits [N, C] and labels [N]."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    losses = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(labels)), labels]
    return float(losses.mean())
