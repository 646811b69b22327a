"""Thresholds come from validation pictures, and what they give is counted on test pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from jobs.report.coverage import FEWEST, Answers, cover, read
from jobs.runs import write_arrays

COUNT = 1000
SURE = np.linspace(0.999, 0.5, COUNT)
LOGITS = np.stack([np.log(SURE / (1 - SURE)), np.zeros(COUNT)], axis=1).astype(np.float32)


def answers(wrong: list[int]) -> Answers:
    """Pictures with 99.9 to 50 % for the first class, which is right but for some of them."""
    labels = np.zeros(COUNT, np.int64)
    labels[wrong] = 1
    return Answers.of(LOGITS[::-1], labels[::-1])


def test_a_threshold_is_the_smallest_probability_from_which_on_enough_is_surely_right() -> None:
    judged = answers([40, *range(500, COUNT, 2)])
    counts, _ = judged.curve()
    assert counts[0] == FEWEST and counts[-1] == COUNT
    for target in (0.9, 0.95):
        threshold = judged.threshold(target)
        assert threshold is not None
        for count, enough in ((int((judged.confidence >= threshold).sum()), True), (COUNT, False)):
            right = int(judged.right[:count].sum())
            low = binomtest(right, count).proportion_ci(method="wilson").low
            assert (low >= target) == enough
    assert judged.threshold(0.999) is None
    assert answers([]).threshold(0.99) == pytest.approx(0.5)


def test_few_answers_prove_little_and_equals_stay_together() -> None:
    for aim, least in ((0.9, 35), (0.95, 73), (0.99, 381)):
        confidence = np.linspace(1, 0.5, least).astype(np.float32)
        right = np.ones(least, bool)
        assert Answers(confidence[1:], right[1:]).threshold(aim) is None
        assert Answers(confidence, right).threshold(aim) == 0.5
    same = Answers.of(np.zeros((50, 2), np.float32), np.arange(50) % 2)
    assert [part.tolist() for part in same.curve()] == [[50], [0.5]]


def test_what_a_threshold_gives_is_counted_on_the_test_set() -> None:
    found = cover(answers([]), answers([10, 20, 60]))
    assert [point.target for point in found.points] == [0.9, 0.95, 0.99]
    point = found.points[2]
    assert point.threshold == pytest.approx(0.5)
    assert (point.answered, point.right) == (1, 0.997)
    interval = binomtest(997, 1000).proportion_ci(method="wilson")
    assert (point.low, point.high) == pytest.approx((interval.low, interval.high))
    assert found.answered[-1] == 1 and found.accuracy[-1] == 0.997


def test_what_the_validation_set_does_not_reach_has_no_point() -> None:
    assert cover(answers(list(range(COUNT))), answers([])).points == ()
    unsure = Answers.of((LOGITS / 100).astype(np.float32), np.zeros(COUNT, np.int64))
    assert cover(answers([]), unsure).points != ()
    assert cover(answers(list(range(600, COUNT))), unsure).points == (), "none is so sure"


def calibrated(count: int, seed: int) -> dict[str, NDArray[Any]]:
    """Logits [count, 3] and labels that are as often right as these say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(count, 3)).astype(np.float32)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (chances.cumsum(1) > rng.random((count, 1))).argmax(1)
    return {"logits": logits, "labels": labels}


def test_the_aim_is_reached_on_pictures_that_did_not_choose_the_threshold() -> None:
    test = Answers.of(**calibrated(20_000, seed=0))
    thresholds = [Answers.of(**calibrated(1000, seed)).threshold(0.9) for seed in range(1, 41)]
    given = [threshold for threshold in thresholds if threshold is not None]
    reached = [test.right[test.confidence >= threshold].mean() >= 0.9 for threshold in given]
    assert len(given) > 20 and sum(reached) > 0.8 * len(given)


def test_probabilities_are_calibrated_on_the_validation_set(tmp_path: Path) -> None:
    arrays = calibrated(1000, seed=0)
    too_sure = {**arrays, "logits": 3 * arrays["logits"]}
    write_arrays(tmp_path / "test_predictions.npz", too_sure)
    assert not read(tmp_path).calibrated and read(tmp_path).points == ()
    write_arrays(tmp_path / "validation_predictions.npz", too_sure)
    [first, *_] = read(tmp_path).points
    undone = Answers.of(**arrays).threshold(0.9)
    assert first.threshold == pytest.approx(undone, abs=0.02)
