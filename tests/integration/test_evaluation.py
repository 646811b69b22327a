"""The statistics agree with their definitions, and the words with the statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from jobs.report.comparison import sentence
from jobs.results import Difference
from jobs.statistics import mean_over_seeds, paired_difference
from jobs.train.evaluation import calibration_error, calibration_interval, loss_and_accuracy, scores


def logits_of(predicted: list[int], classes: int = 3) -> torch.Tensor:
    return torch.eye(classes)[predicted] * 10


def test_scores_of_known_answers() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    result = scores(logits_of([0, 1, 1, 1, 2, 0]), labels)
    assert result.accuracy == pytest.approx(4 / 6)
    assert list(result.per_class) == [pytest.approx(2 / 3), pytest.approx(2 / 3), None]
    assert result.images == 6
    assert result.calibration_error == calibration_error(logits_of([0, 1, 1, 1, 2, 0]), labels)


def test_a_loss_is_the_mean_of_the_right_classes_surprise() -> None:
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 4.0], [1.0, 7.0]]).log()
    labels = torch.tensor([0, 1, 0, 1])
    expected = math.log(4 / 3) + math.log(2) + math.log(5) + math.log(8 / 7)
    result = loss_and_accuracy(logits, labels)
    assert result == {"loss": pytest.approx(expected / 4), "accuracy": 0.5}
    whole = scores(logits, labels)
    assert (whole.loss, whole.accuracy) == (result["loss"], result["accuracy"])


def test_balanced_accuracy_is_given_where_classes_differ_in_size() -> None:
    labels = torch.tensor([0] * 15 + [1] * 10)
    assert scores(logits_of([0] * 25), labels).balanced is None  # 1.5 times
    labels = torch.tensor([0] * 16 + [1] * 10)
    balanced = scores(logits_of([0] * 26), labels).balanced
    assert balanced is not None and balanced.value == pytest.approx(0.5)  # the third has none
    assert 0.39 < balanced.low < 0.5 < balanced.high < 0.61
    labels = torch.tensor([0] * 16 + [1])
    alone = scores(logits_of([0] * 17), labels).balanced
    assert alone is not None and alone.value == pytest.approx(0.5), "a single picture is a class"


def test_the_interval_is_wilsons() -> None:
    right, total, z = 81, 100, 1.959963985
    labels = torch.zeros(total, dtype=torch.int64)
    result = scores(logits_of([0] * right + [1] * (total - right)), labels)
    share = right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    spread = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert result.accuracy_low == pytest.approx(middle - spread, abs=1e-6)
    assert result.accuracy_high == pytest.approx(middle + spread, abs=1e-6)


def test_calibration_error_is_confidence_less_accuracy() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    sure = torch.tensor([[0.0, 100.0]]).flip(1).expand(4, 2)
    assert calibration_error(sure, labels) == pytest.approx(0.25)
    three_to_one = torch.tensor([[math.log(3), 0.0]]).expand(4, 2)
    assert calibration_error(three_to_one, labels) == pytest.approx(0, abs=1e-6)


def answers(*groups: tuple[float, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of groups of pictures: confidence, how many are right, and wrong."""
    shares = [c for c, right, wrong in groups for _ in range(right + wrong)]
    labels = [int(i >= right) for _, right, wrong in groups for i in range(right + wrong)]
    return torch.tensor([[c, 1 - c] for c in shares]).clamp(1e-9).log(), torch.tensor(labels)


def test_errors_of_one_confidence_do_not_make_up_for_those_of_another() -> None:
    too_careful, too_sure = (0.6, 40, 0), (0.99, 10, 10)
    expected = (0.4 * 40 + 0.49 * 20) / 60
    assert calibration_error(*answers(too_careful, too_sure)) == pytest.approx(expected, abs=1e-4)
    # The last two of 15 bins begin at 0.867 and 0.933.
    apart = answers((0.92, 30, 0), (0.95, 5, 5))
    assert calibration_error(*apart) == pytest.approx((0.08 * 30 + 0.45 * 10) / 40, abs=1e-4)
    together = answers((0.94, 30, 0), (0.99, 5, 5))
    assert calibration_error(*together) == pytest.approx((0.49 * 10 - 0.06 * 30) / 40, abs=1e-4)


def test_the_interval_of_a_calibration_error_is_the_basic_bootstraps() -> None:
    """All pictures are sure, so the error is a share of wrong ones: a binomial one."""
    given = answers((1.0, 140, 60))
    found = calibration_interval(*given)
    assert found.value == calibration_error(*given) == pytest.approx(0.3, abs=1e-4)
    reach = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert (found.low, found.high) == pytest.approx((0.3 - reach, 0.3 + reach), abs=0.01)
    assert found == calibration_interval(*given)
    assert calibration_interval(*answers((1.0, 9, 1))).low == 0
    assert calibration_interval(*answers((1.0, 1, 9))).high == 1


def test_the_calibration_error_of_probabilities_that_are_right_may_be_none() -> None:
    source = torch.Generator().manual_seed(0)
    free = 0
    for _ in range(30):
        logits = torch.randn(300, 5, generator=source) * 2
        labels = torch.multinomial(logits.softmax(1), 1, generator=source)[:, 0]
        free += calibration_interval(logits, labels).low == 0
    assert free >= 26


def test_an_accuracy_reaches_the_threshold_that_it_is() -> None:
    """Nine tenths as a 32-bit float are fewer."""
    labels = torch.zeros(200, dtype=torch.int64)
    assert loss_and_accuracy(logits_of([0] * 180 + [1] * 20), labels)["accuracy"] == 0.9


def test_a_paired_difference_is_exact() -> None:
    right_a = np.array([True] * 8 + [False] * 2 + [True] * 10)
    right_b = np.array([False] * 8 + [True] * 2 + [True] * 10)
    result = paired_difference(right_a, right_b)
    assert (result.only_a, result.only_b) == (8, 2)
    assert result.difference == pytest.approx(0.3)
    both_tails = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert result.p_value == pytest.approx(both_tails)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_turns_round_with_its_sides(answers: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(side) for side in zip(*answers, strict=True))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.difference == -other.difference
    assert one.p_value == pytest.approx(other.p_value)
    assert one.low <= one.difference <= one.high


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
        result = paired_difference(a, b)
        covered += result.low <= 0.1 <= result.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_mean_over_seeds_is_judged_by_students_t() -> None:
    differences = [0.12, -0.03, 0.075, 0.095, -0.02]
    result = mean_over_seeds(differences, images=200)
    expected = ttest_1samp(differences, 0.0)
    interval = expected.confidence_interval(0.95)
    assert result.difference == pytest.approx(0.048)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert result.p_value == pytest.approx(expected.pvalue)


def test_seeds_that_agree_to_the_picture_are_not_certainty() -> None:
    two, five = (mean_over_seeds([0.025] * seeds, images=40) for seeds in (2, 5))
    assert two.p_value > 0.05 > five.p_value > 0
    assert two.low < 0 < five.low < 0.025 < five.high
    assert mean_over_seeds([0.0, 0.0], images=40).p_value == 1


def test_the_words_follow_the_figures() -> None:
    clear = Difference(difference=0.129, low=0.118, high=0.141, p_value=1e-9)
    expected = "finetune beats scratch by 12.9 points (+11.8 to +14.1), p < 0.001"
    assert sentence("finetune", "scratch", clear, 1e-9) == expected
    turned = Difference(difference=-0.129, low=-0.141, high=-0.118, p_value=1e-9)
    assert sentence("scratch", "finetune", turned, 1e-9) == expected
    unclear = Difference(difference=0.005, low=-0.01, high=0.02, p_value=0.43)
    assert sentence("finetune", "frozen", unclear, 0.43) == (
        "finetune and frozen cannot be told apart: 0.5 points (−1.0 to +2.0), p = 0.43"
    )
