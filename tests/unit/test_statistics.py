"""Closed forms against scipy's, and intervals and tests against what they promise."""

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import statistics
from jobs.statistics import best_temperature, mean_loss, sign_test, wilson


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(0, 500))
def test_the_sign_test_is_the_exact_binomial_one(a: int, b: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert sign_test(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_of_many_pairs_is_as_exact() -> None:
    assert sign_test(10_000, 0) == 0.0  # 10^-3010 has no float
    assert sign_test(5_000, 5_000) == 1.0
    assert sign_test(4_900, 5_100) == sign_test(5_100, 4_900) < 0.05


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
        lambda log: mean_loss(logits / np.exp(log), labels), bounds=(-3, 3), method="bounded"
    )
    found = best_temperature(logits, labels)
    assert found == 1.0 or found == pytest.approx(np.exp(expected.x), rel=1e-3)
    assert found != 1.0 or 2 * 400 * (mean_loss(logits, labels) - expected.fun) < 3.84


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
    called = np.array([sign_test(a, pairs - a) < 0.05 for a in outcomes.tolist()])
    assert binom.pmf(outcomes, pairs, 0.5)[called].sum() <= 0.05


def test_the_interval_of_a_paired_difference_holds_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, held = np.random.default_rng(0), 0
    for trial in range(600):
        kind = rng.choice(4, 300, p=[0.12, 0.06, 0.7, 0.12])  # only a, only b, both, neither
        found = statistics.paired_difference(
            np.isin(kind, (0, 2)), np.isin(kind, (1, 2)), seed=trial
        )
        held += found.low <= 0.06 <= found.high
    assert 0.92 < held / 600 < 0.98


def test_the_interval_of_a_mean_over_seeds_holds_the_truth() -> None:
    draws = np.random.default_rng(0).normal(0.8, 0.01, (1000, 4))
    found = [statistics.mean_over_seeds(values, 10**6) for values in draws.tolist()]
    assert 0.93 < fmean(one.low <= 0.8 <= one.high for one in found) < 0.97


def test_the_interval_of_a_balanced_accuracy_holds_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, total, shares = np.random.default_rng(0), [400, 100, 50], [0.9, 0.6, 0.75]
    found = [
        statistics.balanced_accuracy(rng.binomial(total, shares).tolist(), total)
        for _ in range(600)
    ]
    assert 0.92 < fmean(one.low <= 0.75 <= one.high for one in found) < 0.98


def test_holm_calls_any_of_three_equals_different_in_one_of_twenty_cases() -> None:
    draws = np.random.default_rng(0).uniform(size=(5000, 3))
    called = [min(statistics.holm(p_values)) < 0.05 for p_values in draws.tolist()]
    assert 0.04 < fmean(called) < 0.06
