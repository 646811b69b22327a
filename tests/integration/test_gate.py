"""The gate's decisions and their words, on storage in memory; test_promotion.py has a real one."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from memory_s3 import Memory, in_memory
from object_store import exported_run, finished_run

from jobs import interruption
from jobs.config import Config
from jobs.delivery import promotion
from jobs.delivery.promotion import fetch, objections, promote, read_candidate, rollback
from jobs.delivery.registry import Registry
from jobs.delivery.storage import Storage
from jobs.errors import ConfigurationError, Interrupted, NotPromoted, UnavailableError
from jobs.report.comparison import right_answers
from jobs.runs import read_arrays
from serving.archive import ModelError
from serving.files import digest_of, write
from serving.s3 import Conflict


def gate(**changes: Any) -> Config:
    return tiny_config(
        storage=in_memory().model_dump(), export={"name": "m"}, promotion=changes or {}
    )


@pytest.fixture
def registry(memory: Memory) -> Registry:
    return Registry(Storage(in_memory()), "m")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(promotion, "log", lines.append)
    return lines


def serving(registry: Registry, channel: str = "production") -> str | None:
    current = registry.channel(channel)
    return current.version if current else None


def test_a_version_is_promoted_once_and_what_served_before_is_told(
    registry: Registry, log: list[str], tmp_path: Path
) -> None:
    one, two = (exported_run(tmp_path / name, right=150) for name in ("one", "two"))
    resolved = gate(channel="canary")
    assert promote(one, resolved) == "s3://some-bucket/some/prefix/models/m/one/"
    assert promote(two, resolved) == "s3://some-bucket/some/prefix/models/m/two/"
    assert promote(two, resolved) == "s3://some-bucket/some/prefix/models/m/two/"
    assert (serving(registry, "canary"), serving(registry)) == ("two", None)
    assert log == [
        "canary serves one now",
        "two and one cannot be told apart: 0.0 points (−1.4 to +1.4), p = 1",
        "canary serves two now, one before",
        "canary serves two already",
    ]
    assert registry.storage.digest("runs/dt=2026-01-31/run_id=two/manifest.json")
    whole = registry.version("two")
    assert set(whole.files) == {"model.mar", "test_predictions.npz"}
    assert whole.files["model.mar"].sha256 == digest_of(two.path / "model" / "m.mar")


def test_another_model_of_a_version_that_serves_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    promote(run := exported_run(tmp_path / "x" / "one", right=150), gate())
    again = exported_run(tmp_path / "y" / "one", right=200)
    environment = (run.path / "environment.json").read_bytes()
    write(again.path / "environment.json", environment)
    again.write_manifest()
    with pytest.raises(ConfigurationError, match=r"models/m/one/: another model is there"):
        promote(again, gate())
    assert serving(registry) == "one"


# Who may be a candidate


@pytest.mark.parametrize("name", ["m.mar", "m.npz", "m.json"])
def test_a_run_without_one_of_its_files_is_no_candidate(tmp_path: Path, name: str) -> None:
    run = exported_run(tmp_path / "one", right=150)
    (run.path / "model" / name).unlink()
    run.write_manifest()
    with pytest.raises(UnavailableError) as caught:
        read_candidate(run, "m")
    assert str(caught.value) == (
        f"{run.path}: has no {name}; `export {run.path} --set export.name=m` makes it"
    )


def test_a_run_that_is_not_finished_or_not_readable_is_no_candidate(tmp_path: Path) -> None:
    run = exported_run(tmp_path / "one", right=150)
    found = read_candidate(run, "m")
    assert found.version == "one" and right_answers(found.answers).sum() == 150
    beside = run.path / "model" / "m.json"
    write(beside, b"{}")
    with pytest.raises(UnavailableError) as caught:
        read_candidate(run, "m")
    assert str(caught.value) == (
        f"{beside}: time: Field required; `export {run.path} --set export.name=m` rewrites it"
    )
    channels = exported_run(tmp_path / "channels", right=150)
    with pytest.raises(ConfigurationError, match=r"^channels: cannot be a version's name$"):
        read_candidate(channels, "m")
    with pytest.raises(UnavailableError, match=r"has no other\.mar"):
        read_candidate(run, "other")
    with pytest.raises(UnavailableError, match=r"has no m\.mar"):
        read_candidate(finished_run(tmp_path / "bare", 10), "m")


# The gate


@pytest.mark.parametrize(
    ("right", "least", "closed"),
    [
        (140, 70, False),
        (139, 70, True),
        (140, 70.5, True),
        (141, 70.5, False),
        (114, 57, False),  # 0.57 * 100 is less than 57
        (0, 0, False),
    ],
)
def test_a_share_of_the_test_images_has_to_be_right(
    registry: Registry, tmp_path: Path, right: int, least: float, closed: bool
) -> None:
    found = read_candidate(exported_run(tmp_path / "one", right), "m")
    reasons = objections(found, None, registry, gate(min_accuracy=least).promotion)
    said = f"{right / 2:.2f} % of the test images are right, {least:g} % are needed"
    assert reasons == [said] * closed


@pytest.mark.parametrize(
    ("right", "tolerance", "reason"),
    [
        (150, 0, None),
        (160, 0, None),
        (149, 0, "0.50 points worse than champion, which serves; 0 are allowed"),
        (149, 0.5, None),
        (147, 1.25, "1.50 points worse than champion, which serves; 1.25 are allowed"),
        (147, 2, None),
        (10, None, None),
    ],
)
def test_a_model_may_be_as_much_worse_as_is_allowed(
    registry: Registry, tmp_path: Path, right: int, tolerance: float | None, reason: str | None
) -> None:
    promote(exported_run(tmp_path / "champion", right=150), gate())
    challenger = exported_run(tmp_path / "challenger", right)
    found = objections(
        read_candidate(challenger, "m"),
        registry.channel("production"),
        registry,
        gate(tolerance=tolerance).promotion,
    )
    assert found == [reason] * (reason is not None)


def test_every_reason_is_told(registry: Registry, tmp_path: Path) -> None:
    promote(exported_run(tmp_path / "champion", right=150), gate())
    run = exported_run(tmp_path / "one", right=100)
    write(run.path / "model" / "m.mar", b"something else")
    run.write_manifest()
    with pytest.raises(NotPromoted) as caught:
        promote(run, gate(min_accuracy=60, max_latency_ms=0.001))
    assert str(caught.value) == (
        "one is published and not promoted: m.mar is not the file that export has checked; "
        "50.00 % of the test images are right, 60 % are needed; "
        "25.00 points worse than champion, which serves; 0.5 are allowed"
    )
    assert serving(registry) == "champion" and registry.versions() == ["champion"]


@pytest.mark.parametrize("shared", [0, 99, 100])
def test_models_are_compared_on_half_of_the_other_ones_pictures_at_least(
    registry: Registry, log: list[str], tmp_path: Path, shared: int
) -> None:
    """The champion is asked pictures 0 to 199; the challenger 250 of which it shares some, and is
    right on the first 240."""
    promote(exported_run(tmp_path / "champion", right=200), gate())
    log.clear()
    challenger = exported_run(tmp_path / "challenger", 240, images=250, first=200 - shared)
    if shared < 100:
        reason = (
            f"champion, which serves, was tested on other images: {shared} of its 200 are here; "
            "promotion.tolerance=null leaves the comparison out"
        )
        with pytest.raises(NotPromoted, match=re.escape(reason)):
            promote(challenger, gate())
    else:
        promote(challenger, gate())
        assert log[:2] == [
            "challenger: 93.33% of 150 new test images are right; what follows is about the 100 "
            "that champion was tested on, too",
            "challenger and champion cannot be told apart: 0.0 points (−2.7 to +2.7), p = 1",
        ]


def test_a_picture_is_known_by_its_content_and_its_class(tmp_path: Path) -> None:
    arrays = read_arrays(exported_run(tmp_path / "one", right=10).path / "model" / "m.npz")
    found = promotion._right_by_picture(arrays, "abcdefghij")
    assert list(found.values()) == [True] * 10 + [False] * 190
    assert [name for _, name in found] == [*"abcdefghij"] * 20
    assert [digest for digest, _ in found] == [row.tobytes() for row in arrays["digests"]]
    del arrays["leaked"]  # as archives of earlier versions, of which the served one may be
    assert promotion._right_by_picture(arrays, "abcdefghij") == found
    del arrays["digests"]
    assert promotion._right_by_picture(arrays, "abcdefghij") == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Of a predictor whose calls take 9 s, and then 1 to 20 ms; what it was made of and asked."""
    asked: list[Any] = []
    seconds = [0.0]

    class Predictor:
        @classmethod
        def open(cls, archive: Path, *, threads: int) -> "Predictor":
            asked.append((archive.name, threads))
            return cls()

        def __call__(self, picture: bytes) -> None:
            asked.append(picture)
            calls = len(asked) - 1
            seconds[0] += 9 if calls <= 20 else (calls - 20) / 1000

    golden = [SimpleNamespace(picture=b"first"), SimpleNamespace(picture=b"second")]
    monkeypatch.setattr("serving.predictor.Predictor", Predictor)
    monkeypatch.setattr(promotion, "open_model", lambda _: SimpleNamespace(golden=golden))
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    yield asked


@pytest.mark.parametrize(("allowed", "closed"), [(10.4, True), (10.6, False)])
def test_the_median_call_of_a_warm_model_has_to_be_quick_enough(
    registry: Registry,
    clock: list[Any],
    log: list[str],
    tmp_path: Path,
    allowed: float,
    closed: bool,
) -> None:
    found = read_candidate(exported_run(tmp_path / "one", right=150), "m")
    reasons = objections(found, None, registry, gate(max_latency_ms=allowed).promotion)
    said = f"10.5 ms for a picture on one core, {allowed:g} are allowed"
    assert reasons == [said] * closed
    assert clock == [("m.mar", 1), *[b"first"] * 40]
    assert log == ["one: 10.5 ms for a picture on one core of this machine"]


def test_a_signal_ends_the_measurement(
    registry: Registry, clock: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_candidate(exported_run(tmp_path / "one", right=150), "m")
    monkeypatch.setattr(interruption, "_received", ["SIGTERM"])
    with pytest.raises(Interrupted):
        objections(found, None, registry, gate(max_latency_ms=1.0).promotion)


# Signatures


def test_what_serves_is_signed_with_the_key_of_the_settings(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Path, Path]] = []

    def sign(archive: Path, key: Path) -> bytes:
        given.append((archive, key))
        return b"signed"

    monkeypatch.setattr("serving.signing.sign", sign)
    run = exported_run(tmp_path / "one", right=150)
    promote(run, gate())
    assert registry.storage.get("models/m/one/model.mar.sig") is None
    promote(run, gate(signing_key="some.pem"))  # serves already
    signature = registry.storage.get("models/m/one/model.mar.sig")
    assert signature and signature.body == b"signed"
    promote(two := exported_run(tmp_path / "two", right=150), gate(signing_key="some.pem"))
    assert registry.storage.get("models/m/two/model.mar.sig")
    assert given == [(r.path / "model" / "m.mar", Path("some.pem")) for r in (run, two)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("no key"), "promotion.signing_key: no key"),
        (
            ModuleNotFoundError("no module"),
            "promotion.signing_key: no module; pip install 'inception-transfer[signing]'",
        ),
    ],
)
def test_what_cannot_be_signed_does_not_serve(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def sign(*_: Path) -> bytes:
        raise error

    monkeypatch.setattr("serving.signing.sign", sign)
    with pytest.raises(ConfigurationError) as caught:
        promote(exported_run(tmp_path / "one", right=150), gate(signing_key="some.pem"))
    assert str(caught.value) == said and serving(registry) is None


# The channel


def test_who_comes_second_is_told_who_was_first(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        promote(exported_run(tmp_path / name, right=150), gate())
    stale = registry.channel("production")
    promote(exported_run(tmp_path / "three", right=150), gate())
    with pytest.raises(NotPromoted) as caught:
        promotion._swap(registry, "production", "one", stale)
    assert str(caught.value) == (
        "one is not promoted: another promotion made production point to three meanwhile; "
        "`promote` it again to be compared with that"
    )
    promotion._swap(registry, "production", "three", stale)  # our own write, whose answer was lost

    def lose(*_: Any, **__: Any) -> None:
        raise Conflict

    monkeypatch.setattr(registry, "point", lose)
    with pytest.raises(NotPromoted, match="made canary point to nothing meanwhile"):
        promotion._swap(registry, "canary", "one", None)


def test_test_images_that_a_model_was_trained_on_speak_neither_for_nor_against_it(
    registry: Registry, log: list[str], tmp_path: Path
) -> None:
    learned = exported_run(tmp_path / "learned", right=150, leaked=range(150))
    with pytest.raises(NotPromoted) as caught:
        promote(learned, gate(min_accuracy=1))
    assert str(caught.value) == (
        "learned is published and not promoted: 0.00 % of the test images that are not in training "
        "are right, 1 % are needed"
    )
    promote(exported_run(tmp_path / "honest", right=150), gate())
    some = exported_run(tmp_path / "some", right=150, leaked=range(50))
    with pytest.raises(NotPromoted, match=r"66\.67 % of the test images that are not in training "):
        promote(some, gate(min_accuracy=70))
    promote(some, gate())
    assert any(line.startswith("some and honest cannot be told apart: 0.0 points") for line in log)
    every = exported_run(tmp_path / "every", right=200, leaked=range(200))
    with pytest.raises(NotPromoted, match="0 of its 150 are here and not in training;"):
        promote(every, gate(min_accuracy=0))


def test_what_serves_is_not_the_better_one_for_test_images_that_it_was_trained_on(
    registry: Registry, log: list[str], tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "learned", right=200, leaked=range(150, 200)), gate())
    promote(exported_run(tmp_path / "clean", right=150), gate())
    assert any(line.startswith("clean and learned cannot be told apart: 0.0") for line in log), log


def test_a_rollback_goes_back_and_is_remembered_as_one(
    registry: Registry, log: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match=r"^m: canary has never pointed to a version$"):
        rollback(gate(channel="canary"))
    for name in ("one", "two"):
        promote(exported_run(tmp_path / name, right=150), gate())
    log.clear()
    assert rollback(gate()) == "s3://some-bucket/some/prefix/models/m/one/"
    assert log == ["production serves one again, two before"]
    current = registry.channel("production")
    assert current and [(e.version, e.rolled_back) for e in current.pointer.history] == [
        ("two", True),
        ("one", False),
    ]
    with pytest.raises(UnavailableError) as caught:
        rollback(gate())
    assert str(caught.value) == "production: nothing served before one; name a version"
    etag = current.etag
    assert rollback(gate(), "one").endswith("/one/"), "which serves already"
    assert registry.channel("production").etag == etag  # type: ignore[union-attr]
    assert rollback(gate(), "two").endswith("/two/") and serving(registry) == "two"
    assert rollback(gate()).endswith("/one/"), "which was left by mistake's undoing alone"
    promote(exported_run(tmp_path / "three", right=150), gate())
    current = registry.channel("production")
    assert current and not current.pointer.history[0].rolled_back
    assert rollback(gate()).endswith("/one/")
    assert rollback(gate(), "two").endswith("/two/"), "an older one, and none that is undone"
    for name in ("four", "five"):
        promote(exported_run(tmp_path / name, right=150), gate())
    assert [rollback(gate()).split("/")[-2] for _ in range(2)] == ["four", "two"]
    with pytest.raises(UnavailableError, match="nothing served before two"):
        rollback(gate())


def test_a_name_that_no_model_has_is_answered_with_those_that_are_there(
    registry: Registry, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "one", right=150), gate())
    settings = gate()
    other = settings.model_copy(update={"export": settings.export.model_copy(update={"name": "n"})})
    with pytest.raises(UnavailableError, match=r"^n: production has never pointed to a version; "):
        rollback(other)
    registry.storage.put("models/o/one/version.json", b"{}", replacing=None)
    with pytest.raises(UnavailableError, match=r"there: m, o \(export\.name says which\)$"):
        fetch(other, None, tmp_path)


def test_an_archive_is_fetched_of_what_serves_or_of_a_version(
    registry: Registry, tmp_path: Path
) -> None:
    runs = {name: exported_run(tmp_path / name, right=150) for name in ("one", "two")}
    for run in runs.values():
        promote(run, gate())
    digests = {name: digest_of(run.path / "model" / "m.mar") for name, run in runs.items()}
    out = tmp_path / "out"
    assert fetch(gate(), None, out) == out / "m.mar"
    assert digest_of(out / "m.mar") == digests["two"]
    assert digest_of(fetch(gate(), "one", out)) == digests["one"]
    with pytest.raises(UnavailableError, match="canary has never pointed to a version"):
        fetch(gate(channel="canary"), None, out)


def test_the_shares_of_a_comparison_are_of_the_pictures_of_both(
    registry: Registry, log: list[str], tmp_path: Path
) -> None:
    """Of 200 shared pictures, the challenger gets 20 more right; of its 100 others, none."""
    promote(exported_run(tmp_path / "champion", right=150), gate())
    log.clear()
    promote(exported_run(tmp_path / "challenger", 170, images=300), gate())
    assert log[0].startswith("challenger: 0.00% of 100 new test images are right; what follows")
    assert log[1] == "challenger beats champion by 10.0 points (+5.6 to +14.2), p < 0.001"
    assert np.isclose(registry.version("challenger").description.test.accuracy, 170 / 300)  # type: ignore[union-attr]
