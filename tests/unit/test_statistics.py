"""Closed forms against scipy's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
