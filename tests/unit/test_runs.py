"""The run folder: what its files hold, what it refuses, and which run is left to deliver."""

import json
import math
import re
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from jobs import runs
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Comparison, Diverged, Facts, Trained
from jobs.runs import RunFolder, Shown, undelivered
from serving.archive import Counts, File
from serving.files import digest_of, write


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has begun, with seeds 3 and 5."""
    folder = RunFolder(tmp_path / "runs" / "r")
    folder.begin(tiny_config(runtime={"seeds": [3, 5]}))
    return folder


def test_the_time_is_that_of_greenwich_to_the_second() -> None:
    said = runs.now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said)) < timedelta(minutes=1)


def test_json_is_written_for_people_and_programs(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "file", {"name": ["ä", None]})
    expected = '{\n  "name": [\n    "ä",\n    null\n  ]\n}\n'
    assert (tmp_path / "file").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[]", b"{}", b"[1]"]
)
def test_a_damaged_file_of_a_run_is_named(folder: RunFolder, content: bytes) -> None:
    for name, read in {
        "environment.json": lambda: folder.started,
        "manifest.json": folder.manifest,
        "data.json": folder.facts,
        "comparison.json": folder.comparison,
    }.items():
        write(folder.path / name, content)
        with pytest.raises(UnavailableError, match=f"^{folder.path}/{name}: .") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_arrays_come_back_from_their_file_and_pickles_do_not(tmp_path: Path) -> None:
    file = tmp_path / "file.npz"
    runs.write_arrays(file, {"a": np.zeros(100_000), "b": np.arange(3)})
    assert file.stat().st_size < 10_000, "compressed"
    found = runs.read_arrays(file)
    assert set(found) == {"a", "b"} and found["b"].tolist() == [0, 1, 2]
    whole = file.read_bytes()
    for bit in (1, 64):  # of both copies of the flags: encrypted, and with a new kind of cipher
        flags = [whole.index(b"PK\x03\x04") + 6, whole.index(b"PK\x01\x02") + 8]
        file.write_bytes(bytes(b | bit * (at in flags) for at, b in enumerate(whole)))
        with pytest.raises(UnavailableError, match=f"^{file}: damaged: "):
            runs.read_arrays(file)
    np.savez(file, a=np.array([Path()]))
    with pytest.raises(UnavailableError, match=f"^{file}: damaged: .*allow_pickle"):
        runs.read_arrays(file)


def test_a_zip_file_is_compared_with_its_checksums(tmp_path: Path) -> None:
    file = tmp_path / "file.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some", b"content")
    runs.check_zip(file)
    file.write_bytes(file.read_bytes().replace(b"content", b"another"))
    with pytest.raises(zipfile.BadZipFile, match=r"^some has changed$"):
        runs.check_zip(file)


# Configuration


def test_a_run_begins_with_its_configuration(folder: RunFolder) -> None:
    assert folder.run_id == "r" and not folder.finished
    assert folder.config() == tiny_config(runtime={"seeds": [3, 5]})
    folder.begin(tiny_config(runtime={"seeds": [3, 5]}))
    with pytest.raises(UnavailableError, match=f"^{folder.path.parent}: not a run folder, it has"):
        RunFolder(folder.path.parent).config()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data: {source: [", "not YAML: "),
        (b"\x80", "not YAML: "),
        (b"[" * 10_000, "not YAML: "),
        (b"data: !!bool x", "not YAML: "),
    ],
)
def test_a_damaged_configuration_is_named(folder: RunFolder, content: bytes, said: str) -> None:
    file = folder.path / "config.yaml"
    write(file, content)
    with pytest.raises(UnavailableError, match=f"^{file}: {said}") as caught:
        folder.config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "Input should"), (b"data: {x: 1}", "data.x: ")]
)
def test_a_configuration_of_another_version_is_named(
    folder: RunFolder, content: bytes, said: str
) -> None:
    file = folder.path / "config.yaml"
    write(file, content)
    with pytest.raises(ConfigurationError, match=f"^{file}: {said}"):
        folder.config()


def test_another_configuration_is_refused_with_what_differs(folder: RunFolder) -> None:
    other = tiny_config(
        runtime={"seeds": [3]}, data={"validation": 0.5}, optim={"average_decay": 0.9}
    )
    with pytest.raises(ConfigurationError) as caught:
        folder.begin(other)
    assert str(caught.value) == (
        f"{folder.path}: this run has another configuration (data.validation, "
        "optim.average_decay, weights.stand_in.optim.average_decay, variants, runtime.seeds); take "
        "another --run-id"
    )


def test_what_does_not_change_the_result_may_change_until_it_is_there(folder: RunFolder) -> None:
    moved = tiny_config(
        data={"cache": "elsewhere"},
        runtime={"seeds": [3, 5], "price_per_hour": 2.0},
        evaluation={"batch_size": 7},
        export={"name": "other"},
        storage={"uri": "s3://bucket/other"},
    )
    folder.begin(moved)
    assert folder.config() == moved
    write(folder.path / "manifest.json", "{}")
    folder.begin(tiny_config(runtime={"seeds": [3, 5]}))
    assert folder.config() == moved


def test_what_differs_is_told_by_the_paths_of_keys() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 3, "only": 4}
    assert runs._differences(old, {**old, "new": 5}) == ["new"]
    assert runs._differences(old, {"a": {"b": 1, "c": 3}, "d": {"e": 3}, "only": 4}) == ["a.c", "d"]
    assert runs._differences(old, {"a": {"b": 1, "c": 2}, "d": 3}) == ["only"]
    assert runs._differences(old, old) == []


def test_one_process_works_on_a_run_at_a_time(tmp_path: Path) -> None:
    folder, wanted = RunFolder(tmp_path / "deep" / "er"), tiny_config()
    with folder.open(wanted):
        assert folder.config() == wanted
        with folder.open(wanted):  # a step of the same work
            pass
        with (
            pytest.raises(ConfigurationError, match=f"^{folder.path}: another process is working"),
            RunFolder(folder.path).open(wanted),
        ):
            pass
    assert not folder.in_use
    with RunFolder(folder.path).open(wanted):
        pass


def test_who_does_the_same_thing_is_waited_for(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def stop(message: str) -> None:
        said.append(message)
        raise TimeoutError

    monkeypatch.setattr("jobs.locks.note", stop)
    with folder.alone("export"), folder.alone("writing"), pytest.raises(TimeoutError):
        folder.append_metrics([])
    assert said == [f"{folder.path}: waiting for another process, which is at writing"]
    with folder.alone("writing"), pytest.raises(TimeoutError):
        folder.add_environment({})


# Variants


def test_every_seed_has_a_folder_and_the_first_one_that_of_the_variant(folder: RunFolder) -> None:
    assert folder.variant("a", 3).path == folder.path / "variants" / "a"
    assert folder.variant("a", 5).path == folder.path / "variants" / "a" / "seed-5"
    assert folder.stand_in().path == folder.path / "weights" / "stand-in"
    assert all(v.run is folder for v in (folder.variant("a", 5), folder.stand_in()))
    assert RunFolder.archive("m") == "model/m.mar"


def test_a_result_ends_a_variant_and_its_checkpoint_unless_it_diverged(folder: RunFolder) -> None:
    variant = folder.variant("a", 3)
    assert variant.result() is None
    lost = Diverged(variant="a", seed=3, reason="the loss was no longer finite")
    write(variant.checkpoint, b"a state")
    variant.save_result(lost)
    assert variant.finished and variant.result() == lost and variant.checkpoint.exists()
    variant.save_result(Trained(seconds=1.0))
    assert not variant.checkpoint.exists()
    variant.save_result(Trained(seconds=1.0))
    with pytest.raises(UnavailableError, match=r"variants/a/result\.json: "):
        variant.result()


# Metrics and machines


def row(epoch: int, **other: Any) -> dict[str, Any]:
    return {"variant": "a", "seed": 3, "epoch": epoch, "split": "train", "loss": 1.5, **other}


def test_a_row_has_every_column_and_is_written_once(folder: RunFolder) -> None:
    variant = folder.variant("a", 3)
    variant.append([row(0, ignored=1)])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"variant": "a", "seed": 3, "epo')
    assert len(folder.metrics()) == 1
    other = {"variant": "b", "seed": 5, "epoch": 1, "split": "test"}
    variant.append([row(0, seconds=9.0), *({**row(0), key: other[key]} for key in other)])
    found = folder.metrics()
    keys = [(r["variant"], r["seed"], r["epoch"], r["split"]) for r in found]
    assert keys == [
        ("a", 3, 0, "train"),
        *(("b", 3, 0, "train"), ("a", 5, 0, "train"), ("a", 3, 1, "train"), ("a", 3, 0, "test")),
    ]
    assert {r["seconds"] for r in found} == {None}, "what was there stays"
    assert {r["run_id"] for r in found} == {"r"} and {r["accuracy"] for r in found} == {None}
    assert all(tuple(r) == runs.COLUMNS and r["time"] <= runs.now() for r in found)
    assert len((folder.path / "metrics.jsonl").read_bytes().splitlines()) == 5


def test_an_epoch_that_comes_out_differently_when_done_again_is_told_as_it_came_out(
    folder: RunFolder,
) -> None:
    variant = folder.variant("a", 3)
    variant.append([row(epoch) for epoch in range(4)])
    others = [row(3, variant="b"), row(3, seed=5)]
    folder.append_metrics(others)
    variant.append([row(0), row(1)])
    assert len(folder.metrics()) == 6, "the same is no news"
    variant.append([row(2, loss=9.0)])
    found = [(r["variant"], r["seed"], r["epoch"], r["loss"]) for r in folder.metrics()]
    assert found == [
        *(("a", 3, 0, 1.5), ("a", 3, 1, 1.5)),
        *(("b", 3, 3, 1.5), ("a", 5, 3, 1.5), ("a", 3, 2, 9.0)),
    ], "what followed was of another course"


def test_a_loss_that_is_not_a_number_stays_as_well(folder: RunFolder) -> None:
    folder.append_metrics([row(0), row(0, split="validation", loss=math.nan)])
    folder.append_metrics([row(1)])
    found = [(r["epoch"], r["split"]) for r in folder.metrics()]
    assert found == [(0, "train"), (0, "validation"), (1, "train")]


def test_a_score_that_alone_comes_out_differently_leaves_the_epochs_that_followed(
    folder: RunFolder,
) -> None:
    """Such as that of the test set, which is told with the epoch that was best."""
    rows = [row(epoch, split=split) for epoch in range(3) for split in ("train", "validation")]
    folder.append_metrics([*rows, row(0, split="test")])
    folder.append_metrics([row(0, split="test", loss=9.0)])
    found = [(r["epoch"], r["split"], r["loss"]) for r in folder.metrics()]
    assert found == [*((r["epoch"], r["split"], 1.5) for r in rows), (0, "test", 9.0)]


def test_rows_are_shown_once_and_again_when_they_come_out_differently() -> None:
    shown = Shown([row(0)])
    assert list(shown.new([row(0), row(1)])) == [(2, row(1))]
    assert not list(shown.new([row(0), row(1)]))
    again = [row(0), row(1, loss=9.0)]
    assert next(shown.new(again)) == (2, row(1, loss=9.0)), "and it cannot be sent"
    assert list(shown.new(again)) == [(2, row(1, loss=9.0))] and not list(shown.new(again))


def test_without_metrics_there_are_no_rows_and_damaged_ones_are_named(folder: RunFolder) -> None:
    assert folder.metrics() == []
    write(folder.path / "metrics.jsonl", "no JSON\n{}\n")
    with pytest.raises(UnavailableError, match=f"^{folder.path}/metrics.jsonl: damaged: Expecting"):
        folder.metrics()
    write(folder.path / "metrics.jsonl", '{"vbriant": "a"}\n')
    with pytest.raises(UnavailableError, match=r"metrics.jsonl: damaged"):
        folder.metrics()


def test_machines_are_listed_in_the_order_of_their_starts(folder: RunFolder) -> None:
    assert folder.environments() == []
    folder.add_environment({"device": "late"})
    folder.add_environments([{"time": "2026-01-02", "n": 2}, {"time": "2026-01-01", "n": 1}])
    found = folder.environments()
    assert [entry.get("n") for entry in found] == [1, 2, None]
    assert found[2]["device"] == "late" and found[2]["time"] <= runs.now()
    assert folder.started == "2026-01-01"


def test_a_clock_that_goes_back_changes_neither_the_day_of_a_run_nor_its_first_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(["2026-01-02T00:00:01", "2026-01-01T23:59:59", "2026-01-02T00:00:02"])
    monkeypatch.setattr(runs, "now", lambda: next(times))
    for device in ("a", "b", "c"):
        folder.add_environment({"device": device})
    assert [entry["device"] for entry in folder.environments()] == ["a", "b", "c"]
    assert folder.started == folder.environments()[1]["time"] == "2026-01-02T00:00:01"


# The end


def test_what_a_killed_process_was_writing_is_neither_listed_nor_kept(folder: RunFolder) -> None:
    folder.add_environment({})
    names = ("report/.index.html.7.part", "variants/a/.b.9.part", ".c.9.part.AbCd1234")
    halves = [folder.path / name for name in names]
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"<!doct")
    (other := folder.path / "report" / "a.part").touch()
    folder.write_manifest()
    assert not any(half.exists() for half in halves) and other.exists()
    assert list(folder.manifest().files) == ["config.yaml", "environment.json", "report/a.part"]


def test_who_trains_a_variant_removes_what_was_being_written_of_it_alone(folder: RunFolder) -> None:
    mine, other = folder.variant("frozen", 3), folder.variant("frozen", 5)
    for one in (mine, other):  # the latter's folder is in the former's
        one.path.mkdir(parents=True, exist_ok=True)
        (one.path / ".last.ckpt.7.part").touch()
    (mine.path / "last.ckpt").touch()
    mine.tidy()
    assert {path.name for path in mine.path.iterdir()} == {"last.ckpt", "seed-5"}
    assert (other.path / ".last.ckpt.7.part").exists(), "another process may be at it"


def test_a_manifest_lists_all_that_a_run_has_made(folder: RunFolder) -> None:
    with pytest.raises(UnavailableError, match=f"^{folder.path}: not a finished run; `run` resum"):
        folder.manifest()
    folder.add_environment({})
    made = ("metrics.jsonl", "variants/a/result.json", "variants/a/tensorboard/kept")
    left_out = (".lock", ".delivered", "variants/a/last.ckpt", "tensorboard/a/events")
    for name in (*made, *left_out):
        write(folder.path / name, name)
    folder.write_manifest()
    folder.write_manifest()  # and not itself
    manifest = folder.manifest()
    assert folder.finished and json.loads((folder.path / "manifest.json").read_bytes()) == {
        "run_id": "r",
        "started": folder.started,
        "time": manifest.time,
        "files": {name: file.model_dump() for name, file in manifest.files.items()},
    }
    assert manifest.time <= runs.now()
    assert list(manifest.files) == sorted([*made, "config.yaml", "environment.json"])
    for name in made:
        assert manifest.files[name] == File(size=len(name), sha256=digest_of(folder.path / name))


def finished(path: Path, day: int, winner: str | None = "a", exported: bool = False) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(tiny_config(export={"enabled": exported}))
    folder.add_environments([{"time": f"2026-01-{day:02}T00:00:00+00:00"}])
    data = Facts(
        source="generated",
        classes=("a", "b"),
        image_size=(32, 32),
        images=Counts(train=60, validation=20, test=40),
        test_digest="t",
        digest="d",
        skipped=(),
    )
    result = Comparison(
        run_id=path.name,
        time=runs.now(),
        data=data,
        weights="none",
        selected_on="validation",
        winner=winner,
        winner_seed=0,
        sentences=(),
        seeds=1,
        thresholds=(),
        variants={},
        pairs=(),
    )
    write(folder.path / "comparison.json", result.to_json())
    write(folder.path / "data.json", data.to_json())
    assert folder.comparison() == result and folder.facts() == data
    folder.write_manifest()
    return folder


def test_the_newest_run_is_delivered_unless_it_has_been(tmp_path: Path) -> None:
    assert undelivered(tmp_path) is None
    (tmp_path / "begun").mkdir()
    finished(tmp_path / "b", day=3)
    newest = finished(tmp_path / "a", day=9)
    finished(tmp_path / "c", day=5)
    found = undelivered(tmp_path)
    assert found is not None and found.path == newest.path
    in_use = [found.in_use]
    with found.open(found.config()):
        in_use.append(found.in_use)
    assert in_use == [False, True]
    (newest.path / ".delivered").touch()
    assert undelivered(tmp_path) is None, "older ones are not to replace it"
    finished(tmp_path / "d", day=10, winner=None)
    assert undelivered(tmp_path) is None
    last = finished(tmp_path / "e", day=11, exported=True)
    found = undelivered(tmp_path)
    assert found is not None and found.path == last.path, "it was killed before its export"
    write(last.path / last.archive(last.config().export.name), b"x")
    last.write_manifest()
    assert undelivered(tmp_path) is None
