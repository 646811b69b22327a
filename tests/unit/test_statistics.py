"""Closed forms against scipy's, and intervals and tests against what they promise."""

import math
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import statistics
from jobs.statistics import (
    balanced_accuracy,
    best_temperature,
    confidence_sequence,
    cross_entropy,
    exact_mcnemar,
    holm,
    paired_difference,
    wilson,
)


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(0, 500))
def test_the_sign_test_is_the_exact_binomial_one(a: int, b: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert exact_mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_of_many_pairs_is_as_exact() -> None:
    assert exact_mcnemar(10_000, 0) == 0.0  # 10^-3010 has no float
    assert exact_mcnemar(5_000, 5_000) == 1.0
    assert exact_mcnemar(4_900, 5_100) == exact_mcnemar(5_100, 4_900) < 0.05


@settings(max_examples=30)
@given(st.data(), st.integers(1, 10_000))
def test_the_interval_is_wilsons(data: st.DataObject, total: int) -> None:
    from scipy.stats import binomtest

    right = data.draw(st.integers(0, total))
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.3, 5))
def test_the_temperature_is_the_one_of_the_least_loss(seed: int, factor: float) -> None:
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(400, 5)).astype(np.float32)
    labels = np.array([rng.choice(5, p=np.exp(z) / np.exp(z).sum()) for z in logits])
    logits *= factor
    expected = minimize_scalar(
        lambda log: cross_entropy(logits / np.exp(log), labels), bounds=(-3, 3), method="bounded"
    )
    found = best_temperature(logits, labels)
    assert found == 1.0 or found == pytest.approx(np.exp(expected.x), rel=1e-3)
    assert (found == 1.0) == (2 * 400 * (cross_entropy(logits, labels) - expected.fun) < 3.84)


def drawn(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Logits [count, 5], and labels that were drawn from their probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 5)).astype(np.float32)
    labels = np.array([rng.choice(5, p=np.exp(z) / np.exp(z).sum()) for z in logits])
    return logits, labels


def test_a_temperature_lies_within_three_powers_of_e() -> None:
    logits, labels = drawn(400)
    assert best_temperature(logits * 1000, labels) == pytest.approx(math.exp(3))
    assert best_temperature(logits / 1000, labels) == pytest.approx(math.exp(-3))


def test_a_temperature_needs_a_hundred_pictures_and_a_gain_that_is_no_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, labels = drawn(100)
    logits *= 5
    best = best_temperature(logits, labels)
    assert best > 2 and best_temperature(logits[:99], labels[:99]) == 1.0
    gain = 2 * 100 * (cross_entropy(logits, labels) - cross_entropy(logits / best, labels))
    monkeypatch.setattr(statistics, "SIGNIFICANT", gain * 1.01)
    assert best_temperature(logits, labels) == 1.0
    monkeypatch.setattr(statistics, "SIGNIFICANT", gain * 0.99)
    assert best_temperature(logits, labels) == best


def test_a_loss_is_the_mean_of_the_right_classes_surprise() -> None:
    logits = np.log(np.array([[3, 1], [1, 1]], np.float32))
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert cross_entropy(logits, np.array([0, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("offset", [-800, 800])
def test_what_all_logits_have_in_common_says_nothing(offset: float) -> None:
    logits, labels = drawn(400)
    logits *= 3
    moved = logits + np.float32(offset)
    assert cross_entropy(moved, labels) == pytest.approx(cross_entropy(logits, labels), abs=1e-3)
    expected = best_temperature(logits, labels)
    assert best_temperature(moved, labels) == pytest.approx(expected, rel=1e-3) != 1.0


def test_wilsons_interval_holds_the_share_itself() -> None:
    """… though rounding would leave out all of 7, or of 40."""
    for total in range(1, 500):
        for right in (0, total):
            low, high = wilson(right, total)
            assert 0 <= low <= right / total <= high <= 1


def test_wilsons_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Exactly, over all outcomes; single shares scatter around 95 %, as outcomes are whole."""
    from scipy.stats import binom

    total = 200
    intervals = np.array([wilson(right, total) for right in range(total + 1)])
    covered = []
    for share in np.linspace(0.02, 0.98, 97):
        holds = (intervals[:, 0] <= share) & (share <= intervals[:, 1])
        covered.append(binom.pmf(np.arange(total + 1), total, share)[holds].sum())
    assert min(covered) > 0.92 and 0.945 < fmean(covered) < 0.96


@pytest.mark.parametrize("pairs", [5, 17, 60, 251])
def test_the_sign_test_calls_equals_different_in_one_of_twenty_cases_at_most(pairs: int) -> None:
    from scipy.stats import binom

    outcomes = np.arange(pairs + 1)
    called = np.array([exact_mcnemar(a, pairs - a) < 0.05 for a in outcomes.tolist()])
    assert binom.pmf(outcomes, pairs, 0.5)[called].sum() <= 0.05


@pytest.mark.parametrize(
    ("images", "only_a", "only_b"),
    [(300, 0.12, 0.06), (100, 0.02, 0.005), (60, 0.03, 0.01), (600, 0.004, 0.001)],
)
def test_the_interval_of_a_paired_difference_holds_the_truth(
    images: int, only_a: float, only_b: float
) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        kind = rng.choice(3, images, p=[only_a, only_b, 1 - only_a - only_b])
        found = paired_difference(kind != 1, kind != 0)
        held += found.low <= only_a - only_b <= found.high
    assert held / 600 > 0.93


def test_the_same_answers_do_not_prove_that_there_is_no_difference() -> None:
    right = np.ones(100, np.bool_)
    found = paired_difference(right, right)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert -0.04 < found.low < -0.02 and found.high == -found.low
    one = paired_difference(right[:1], ~right[:1])
    assert (one.difference, one.high) == (1.0, 1.0) and -0.8 < one.low < -0.7


@pytest.mark.parametrize(("count", "total"), [(1, 3), (30, 200), (199, 200), (5000, 10_000)])
def test_shares_at_the_ends_are_twenty_times_less_likely_than_the_average_one(
    count: int, total: int
) -> None:
    from scipy.special import betaln

    average = betaln(count + 1, total - count + 1)  # of the likelihoods of all shares
    for share in confidence_sequence(count, total):
        likelihood = count * math.log(share) + (total - count) * math.log(1 - share)
        assert average - likelihood == pytest.approx(math.log(20), abs=1e-6)


@pytest.mark.parametrize("total", [1, 2, 100])
def test_all_or_none_leave_the_share_open_at_that_end(total: int) -> None:
    least = (20 * (total + 1)) ** (-1 / total)
    low, high = confidence_sequence(total, total)
    assert low == pytest.approx(least) and high == 1.0
    low, high = confidence_sequence(0, total)
    assert low == 0.0 and high == pytest.approx(1 - least)
    assert confidence_sequence(0, 0) == (0.0, 1.0)


def test_the_interval_of_a_mean_over_seeds_holds_the_truth() -> None:
    draws = np.random.default_rng(0).normal(0.8, 0.01, (1000, 4))
    found = [statistics.mean_over_seeds(values, 10**6) for values in draws.tolist()]
    assert 0.93 < fmean(one.low <= 0.8 <= one.high for one in found) < 0.97


def test_seeds_that_agree_are_still_no_surer_than_one_picture() -> None:
    """A uniform distribution as wide as a picture has the standard deviation 1/√12 of it."""
    from scipy.stats import t as student

    found = statistics.mean_over_seeds([0.8] * 4, 100)
    reach = student.ppf(0.975, 3) * 0.01 / 12**0.5 / 2
    assert (found.low, found.high) == pytest.approx((0.8 - reach, 0.8 + reach), abs=1e-12)


@pytest.mark.parametrize(
    ("total", "shares"),
    [
        ([400, 100, 50], [0.9, 0.6, 0.75]),
        ([60] * 2 + [20] * 8, [0.95] * 10),
        ([30] * 20 + [10] * 80, [0.9] * 100),
        ([150] * 200 + [50] * 800, [0.8] * 1000),
    ],
)
def test_the_interval_of_a_balanced_accuracy_holds_the_truth(
    total: list[int], shares: list[float]
) -> None:
    rng = np.random.default_rng(0)
    found = [balanced_accuracy(rng.binomial(total, shares).tolist(), total) for _ in range(600)]
    assert fmean(one.low <= fmean(shares) <= one.high for one in found) > 0.92
    assert all(one.low <= one.value <= one.high for one in found)


def test_a_balanced_accuracy_of_equal_classes_is_as_uncertain_as_their_accuracy() -> None:
    found = balanced_accuracy([800, 700], [1000, 1000])
    assert found.value == 0.75
    reach = 1.96 * math.sqrt((0.8 * 0.2 + 0.7 * 0.3) / 1000) / 2
    assert (found.low, found.high) == pytest.approx((0.75 - reach, 0.75 + reach), abs=1e-4)
    assert balanced_accuracy([5], [5]).high == 1.0 and balanced_accuracy([0], [5]).low == 0.0


def test_the_smallest_p_value_counts_as_often_as_there_are_tests() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == [0.02] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p_value, other in zip(p_values, corrected, strict=True):
        assert p_value <= other <= min(1, len(p_values) * p_value)
    assert sorted(corrected) == [c for _, c in sorted(zip(p_values, corrected, strict=True))]


def test_holm_calls_any_of_three_equals_different_in_one_of_twenty_cases() -> None:
    draws = np.random.default_rng(0).uniform(size=(5000, 3))
    called = [min(holm(p_values)) < 0.05 for p_values in draws.tolist()]
    assert 0.04 < fmean(called) < 0.06


def test_where_every_picture_is_right_none_tells_how_sure_to_be() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    logits[np.arange(200), labels] += 8
    assert (logits.argmax(1) == labels).all() and best_temperature(logits, labels) == 1.0
    labels[:20] = logits[:20].argmin(1)
    assert best_temperature(logits, labels) > 1


@pytest.mark.parametrize(("count", "total"), [(10, 10.001), (0.925, 1.0), (200, 200.02)])
def test_a_small_part_of_a_miss_has_an_interval_too(count: float, total: float) -> None:
    low, high = confidence_sequence(count, total)
    assert 0 < low < count / total < high <= 1
