"""Thresholds come from validation pictures, and what they give is counted on test pictures."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from jobs.report.coverage import FEWEST, Answers, cover, read
from jobs.runs import write_arrays

SURE = np.log(np.linspace(0.99, 0.5, 100) / np.linspace(0.01, 0.5, 100))
LOGITS = np.stack([SURE, np.zeros(100)], axis=1).astype(np.float32)


def answers(wrong: list[int]) -> Answers:
    """100 pictures with 99 to 50 % for the first class, which is right but for some of them."""
    labels = np.zeros(100, np.int64)
    labels[wrong] = 1
    return Answers.of(LOGITS[::-1], labels[::-1])


def test_a_threshold_is_the_smallest_probability_from_which_on_enough_is_right() -> None:
    judged = answers([40, *range(60, 100, 2)])
    counts, accuracy = judged.curve()
    assert counts[0] == FEWEST and counts[-1] == 100
    for target in (0.9, 0.95, 0.99):
        enough = int(counts[accuracy >= target].max())
        assert judged.threshold(target) == judged.confidence[enough - 1]
    assert judged.threshold(0.99) == pytest.approx(0.99 - 39 * 0.49 / 99)
    assert judged.threshold(0.5) == pytest.approx(0.5)


def test_few_sure_answers_are_no_threshold_and_equals_stay_together() -> None:
    assert answers([5]).threshold(0.99) == pytest.approx(0.5)
    assert answers([3, 5]).threshold(0.99) is None
    same = Answers.of(np.zeros((50, 2), np.float32), np.arange(50) % 2)
    assert [part.tolist() for part in same.curve()] == [[50], [0.5]]


def test_what_a_threshold_gives_is_counted_on_the_test_set() -> None:
    found = cover(answers(list(range(50, 100))), answers([10, 20, 60]))
    assert [point.target for point in found.points] == [0.9, 0.95, 0.99]
    point = found.points[2]
    assert point.threshold == pytest.approx(0.99 - 49 * 0.49 / 99)
    assert (point.answered, point.right) == (0.5, 48 / 50)
    interval = binomtest(48, 50).proportion_ci(method="wilson")
    assert (point.low, point.high) == (interval.low, interval.high)
    assert found.answered[-1] == 1 and found.accuracy[-1] == 0.97


def test_what_the_validation_set_does_not_reach_has_no_point() -> None:
    assert cover(answers(list(range(100))), answers([])).points == ()
    unsure = Answers.of((LOGITS / 100).astype(np.float32), np.zeros(100, np.int64))
    assert cover(answers([]), unsure).points != ()
    assert cover(answers(list(range(60, 100))), unsure).points == (), "no test picture is so sure"


def test_probabilities_are_calibrated_on_the_validation_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(1000, 3)).astype(np.float32)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (chances.cumsum(1) > rng.random((1000, 1))).argmax(1)
    arrays = {"logits": 3 * logits, "labels": labels}  # three times too sure
    write_arrays(tmp_path / "test_predictions.npz", arrays)
    assert not read(tmp_path).calibrated and read(tmp_path).points == ()
    write_arrays(tmp_path / "validation_predictions.npz", arrays)
    [first, *_] = read(tmp_path).points
    assert first.right == pytest.approx(0.9, abs=0.01)
    undone = Answers.of(logits, labels).threshold(0.9)
    assert first.threshold == pytest.approx(undone, abs=0.02)
