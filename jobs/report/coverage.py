"""What abstaining brings and what it costs: accuracy on the pictures that get an answer, against
their share (the risk-coverage curve: El-Yaniv and Wiener 2010).

A picture gets an answer if its largest probability is no smaller than a threshold. Temperature and
thresholds come from the validation pictures and are then applied to the test set, which chooses
nothing here either. Of all thresholds the best-looking one is partly so by luck, so an aim counts
as reached where the lower end of the accuracy's interval reaches it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.runs import read_arrays
from jobs.statistics import best_temperature, wilson
from serving.messages import softmax

TARGETS = (0.9, 0.95, 0.99)
FEWEST = 20  # answers that an accuracy is drawn for

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Of N pictures, the surest first."""

    confidence: NDArray[np.float32]
    """[N], the largest probability of each."""
    right: NDArray[np.bool_]
    """[N]."""

    @classmethod
    def of(cls, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> "Answers":
        """Args:
        logits: [N, C], divided by the temperature.
        labels: [N].
        """
        confidence = softmax(logits).max(1)
        order = np.argsort(-confidence, kind="stable")
        return cls(confidence[order], (logits.argmax(1) == labels)[order])

    def curve(self) -> tuple[NDArray[np.int64], Floats]:
        """How many answers each threshold leaves, int64 [M], ascending, and the share of them that
        is right, [M]; from FEWEST answers on."""
        last_of_equals = np.append(self.confidence[1:] < self.confidence[:-1], True)
        counts = np.flatnonzero(last_of_equals) + 1
        counts = counts[counts >= FEWEST]
        return counts, self.right.cumsum()[counts - 1] / counts

    def threshold(self, target: float) -> float | None:
        """The smallest probability from which on so large a share of the answers is right, or more,
        as far as so many tell."""
        counts, accuracy = self.curve()
        low, _ = wilson(accuracy * counts, counts)
        enough = counts[low >= target]
        return float(self.confidence[enough[-1] - 1]) if len(enough) else None


@dataclass(frozen=True)
class Point:
    """What a threshold gives on the test set."""

    target: float
    """The share of right answers that it was chosen for, at least."""
    threshold: float
    answered: float
    """Share of the pictures."""
    right: float
    """Share of the answers."""
    low: float
    high: float
    """Its 95 % interval (Wilson)."""


@dataclass(frozen=True)
class Coverage:
    answered: Floats
    """[M], shares of the test pictures, ascending."""
    accuracy: Floats
    """[M], of these."""
    calibrated: bool
    """Whether there were validation pictures: without them there are no points."""
    points: tuple[Point, ...]
    """Of TARGETS, those that the validation pictures reach."""


def read(variant: Path) -> Coverage:
    """That of one variant, from the predictions in its folder."""
    test = read_arrays(variant / "test_predictions.npz")
    held_out = variant / "validation_predictions.npz"
    if not held_out.is_file():
        return cover(None, Answers.of(test["logits"], test["labels"]))
    validation = read_arrays(held_out)
    temperature = np.float32(best_temperature(validation["logits"], validation["labels"]))
    judged, answers = (
        Answers.of((arrays["logits"] / temperature).astype(np.float32), arrays["labels"])
        for arrays in (validation, test)
    )
    return cover(judged, answers)


def cover(validation: Answers | None, test: Answers) -> Coverage:
    """The curve on the test set, and what thresholds chosen on the validation set give there."""
    counts, accuracy = test.curve()
    points = [] if validation is None else [_point(validation, test, aim) for aim in TARGETS]
    return Coverage(
        answered=counts / len(test.right),
        accuracy=accuracy,
        calibrated=validation is not None,
        points=tuple(point for point in points if point is not None),
    )


def _point(validation: Answers, test: Answers, target: float) -> Point | None:
    """None if no threshold is enough, or no test picture is that sure."""
    threshold = validation.threshold(target)
    if threshold is None or not (answered := int((test.confidence >= threshold).sum())):
        return None
    right = int(test.right[:answered].sum())
    low, high = wilson(right, answered)
    shares = {"answered": answered / len(test.right), "right": right / answered}
    return Point(target=target, threshold=threshold, **shares, low=low, high=high)
