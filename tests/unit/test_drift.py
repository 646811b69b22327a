"""Evidence of a change stays low while nothing changes, and rises when something does."""

from collections.abc import Callable, Iterable
from math import log10, prod

import numpy as np
import pytest

from serving.drift import Drift

ALPHA = 0.05
HELD_OUT, STREAM = 100, 400  # pictures


def highest(drift: Drift, stream: Iterable[float]) -> float:
    """What the evidence was at most, as a logarithm."""
    found = 0.0
    for strangeness in stream:
        drift.add(strangeness)
        found = max(found, drift.evidence)
    return found


@pytest.mark.parametrize(
    ("limit", "digits"),
    [(50, 9), (200, 9), (10_000, 9), (10_000, 0)],
    ids=["limit below the held-out ones", "limit reached", "limit far", "many alike"],
)
def test_the_promise_is_kept_over_orders_of_the_same_pictures(limit: int, digits: int) -> None:
    rng = np.random.default_rng(limit)
    pictures, orders = rng.gamma(2, size=HELD_OUT + STREAM).round(digits), 200
    passed = 0
    for seed in range(orders):
        order = rng.permutation(pictures)
        drift = Drift(order[:HELD_OUT], limit, seed)
        passed += highest(drift, order[HELD_OUT:].tolist()) >= log10(1 / ALPHA)
    noise = 3 * (orders * ALPHA * (1 - ALPHA)) ** 0.5
    assert passed <= orders * ALPHA + noise


@pytest.mark.parametrize(
    ("changed", "within"),
    [
        (lambda x, _: x + 3, 20),
        (lambda x, rng: x + 4 * (rng.random() < 0.3), 150),
        (lambda x, _: x - 1.5, 100),
    ],
    ids=["all stranger", "a third stranger", "less strange"],
)
def test_a_change_is_noticed(
    changed: Callable[[float, np.random.Generator], float], within: int
) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        drift = Drift(rng.normal(size=HELD_OUT), seed=seed)
        assert highest(drift, rng.normal(size=STREAM).tolist()) < 3
        stream = [changed(x, rng) for x in rng.normal(size=within).tolist()]
        assert highest(drift, stream) > log10(1 / ALPHA)


def test_evidence_is_the_capital_of_the_gambler_who_starts_little_by_little() -> None:
    """Bet for bet, with ranks that are told by the same draws."""
    held_out, stream = np.array([1.0, 2.0, 2.0, 5.0]), [3.0, 2.0, 9.0, 0.5]
    drift, rng = Drift(held_out, seed=7), np.random.default_rng(7)
    rng.permutation(held_out)
    seen, ranks = held_out.tolist(), list[float]()
    for count, strangeness in enumerate(stream, start=1):
        drift.add(strangeness)
        seen.append(strangeness)
        stranger = sum(one > strangeness for one in seen)
        ties = sum(one == strangeness for one in seen)
        ranks.append((stranger + ties * rng.random()) / len(seen))
        capital = 1 / (count + 1)
        for power in (0.25, 0.5, 0.75, 0.9):
            for side in (ranks, [1 - rank for rank in ranks]):
                for begun in range(1, count + 1):
                    gains = [power * rank ** (power - 1) for rank in side[begun - 1 :]]
                    capital += prod(gains) / (begun * (begun + 1)) / 8
        assert drift.evidence == pytest.approx(log10(capital))
    assert drift.pictures == 4 and drift.remembered == sorted(seen)


def test_evidence_has_a_floor_so_that_a_change_is_noticed_at_any_time() -> None:
    rng = np.random.default_rng(0)
    drift = Drift(rng.normal(size=HELD_OUT), limit=HELD_OUT, seed=0)
    for count, strangeness in enumerate(rng.normal(size=5000).tolist(), start=2):
        drift.add(strangeness)
        assert drift.evidence >= -log10(count) - 1e-9
    assert drift.evidence < -1, "the bets were lost"
    assert highest(drift, [9.0] * 20) > log10(1 / ALPHA)


def test_no_more_is_remembered_than_the_limit_and_the_past_fades() -> None:
    drift = Drift(np.zeros(80, np.float32), limit=50, seed=0)
    assert len(drift.remembered) == 50
    assert drift.evidence == 0
    for _ in range(1000):
        drift.add(1.0)
    assert drift.remembered == [1.0] * 50
    risen = drift.evidence
    for _ in range(1000):
        drift.add(1.0)
    assert drift.evidence < risen, "what is new for long is new no more"
