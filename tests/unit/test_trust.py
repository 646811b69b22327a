"""Temperature, familiarity and sets of classes keep what they promise, on numbers from a seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.delivery import trust
from serving.messages import softmax
from serving.trust import Trust, roots

CENTRES = np.random.default_rng(0).normal(loc=9, size=(3, 40))


def drawn(count: int, seed: int) -> tuple[Any, NDArray[np.int64]]:
    """Features [count, 40] around a class's centre, and the classes; no test moves another's."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    return (CENTRES[labels] + rng.normal(size=(count, 40))).astype(np.float32), labels


def logits_of(features: Any) -> Any:
    """Larger for nearer centres, [N, 3], and not too sure."""
    squares = np.square(features[:, None] - CENTRES).sum(axis=2)
    return (-squares / 20).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Trust:
    known, _ = drawn(500, seed=1)
    held_out, labels = drawn(999, seed=2)
    return trust.fit(known, held_out, logits_of(held_out), labels)


def test_familiarity_is_uniform_among_pictures_of_the_same_kind(fitted: Trust) -> None:
    p = fitted.familiarity(fitted.strange(drawn(4000, seed=3)[0]))
    for share in (0.01, 0.05, 0.1, 0.5, 0.9):
        # Of 4,000 pictures against 999: the two samples' errors add up.
        error = (share * (1 - share) * (1 / 4000 + 1 / 999)) ** 0.5
        assert abs((p <= share).mean() - share) < 4 * error


def test_strangers_are_hardly_familiar(fitted: Trust) -> None:
    strangers = (9 + 3 * np.random.default_rng(4).normal(size=(20, 40))).astype(np.float32)
    assert (fitted.familiarity(fitted.strange(strangers)) < 0.05).all()


@pytest.mark.parametrize("live", [5, 40])
def test_strangers_are_strange_to_features_that_hardly_differ(live: int) -> None:
    """A network may have collapsed: fewer directions are live than are looked for."""
    rng = np.random.default_rng(5)
    features = np.zeros((200, 300), np.float32)
    features[:, :live] = 9 + rng.normal(size=(200, live))
    labels = rng.integers(3, size=100)
    logits = rng.normal(size=(100, 3)).astype(np.float32)
    narrow = trust.fit(features[:100], features[100:], logits, labels)
    stranger = np.full((1, 300), 50, np.float32)
    assert narrow.familiarity(narrow.strange(stranger)) == pytest.approx([1 / 101])


def test_familiarity_counts_the_held_out_pictures_that_are_as_strange() -> None:
    some = Trust(
        centre=np.array([1, 0], np.float32),
        directions=np.array([[1], [0]], np.float32),
        variances=np.array([4], np.float32),
        rest=np.array(0.5, np.float32),
        strangeness=np.array([0.5, 2, 4], np.float32),
        right=np.array([0.5, 0.6, 0.7], np.float32),
    )
    features = np.array([[1, 0], [9, 0], [1, 1], [16, 1]], np.float32)  # roots 1 0, 3 0, 1 1, 4 1
    assert some.strange(features).tolist() == [0, 1, 2, 4.25]
    assert some.familiarity(some.strange(features)).tolist() == [1, 0.75, 0.75, 0.25]


def test_features_that_rounding_has_made_negative_count_as_nothing() -> None:
    assert roots(np.array([-1e-7, 0, 0.25, 4], np.float32)).tolist() == [0, 0, 0.5, 2]


def test_a_set_holds_the_right_class_as_often_as_it_says(fitted: Trust) -> None:
    features, labels = drawn(4000, seed=3)
    right = softmax(logits_of(features))[np.arange(4000), labels]
    for confidence in (0.5, 0.9, 0.99):
        error = (confidence * (1 - confidence) * (1 / 4000 + 1 / 999)) ** 0.5
        holds = (right >= fitted.least_probability(confidence)).mean()
        assert abs(holds - confidence) < 4 * error


def test_a_set_has_every_class_where_the_promise_needs_more_pictures(fitted: Trust) -> None:
    assert fitted.least_probability(0.9995) == 0
    assert fitted.least_probability(0.999) == fitted.right[0]
    assert fitted.least_probability(0) == fitted.right[-1]


def test_it_comes_back_from_its_file(fitted: Trust, tmp_path: Path) -> None:
    fitted.save(tmp_path / "familiarity.npz")
    again, features = Trust.load(tmp_path / "familiarity.npz"), drawn(10, seed=3)[0]
    found, expected = (t.familiarity(t.strange(features)) for t in (again, fitted))
    np.testing.assert_array_equal(found, expected)
    np.savez(tmp_path / "less.npz", centre=fitted.centre)
    with pytest.raises(KeyError):
        Trust.load(tmp_path / "less.npz")
    np.savez(tmp_path / "pickled.npz", centre=np.array([Path()]))
    with pytest.raises(ValueError, match="allow_pickle"):
        Trust.load(tmp_path / "pickled.npz")


def test_what_is_kept_of_a_large_network_is_small() -> None:
    rng = np.random.default_rng(1)
    known, held_out = (
        rng.normal(size=(n, 2048)).astype(np.float32) for n in (trust.KNOWN, trust.MIN_HELD_OUT)
    )
    logits, labels = np.zeros((trust.MIN_HELD_OUT, 2), np.float32), np.zeros(50, np.int64)
    fitted = trust.fit(known, held_out, logits, labels)
    assert sum(array.nbytes for array in vars(fitted).values()) < 5e6


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_temperature_undoes_a_factor_of_the_logits(factor: float) -> None:
    features, _ = drawn(2000, seed=3)
    weak = logits_of(features)
    drawn_at = np.random.default_rng(4).random((2000, 1))
    labels = (softmax(weak).cumsum(axis=1) > drawn_at).argmax(axis=1)
    assert trust.fit_temperature(factor * weak, labels) == pytest.approx(factor, rel=0.15)
    assert trust.fit_temperature(weak, labels) == 1
    assert trust.fit_temperature(factor * weak[:99], labels[:99]) == 1
