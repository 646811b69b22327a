"""A run whose parts are trained by processes of their own ends as one that one process does."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import called, forked, job, start_job, stop_when
from conftest import ROOT, TINY, free_port, tiny, tiny_config
from object_store import exported_run, finished_run, keys_of

from jobs import config, parts, pipeline
from jobs.config import Part
from jobs.delivery import promotion, pruning, publishing, tracking
from jobs.delivery.registry import Registry
from jobs.delivery.storage import Storage
from jobs.demo import ObjectStore
from jobs.errors import ConfigurationError, UnavailableError
from jobs.parts import Rendezvous
from jobs.results import Diverged
from jobs.runs import RunFolder
from serving.files import write

MEASURED = {"time", "seconds", "images_per_second", "peak_memory_bytes", "seconds_to_accuracy"}


def without_measurements(value: Any) -> Any:
    """JSON as it is on any machine, on any day."""
    if isinstance(value, dict):
        return {k: without_measurements(v) for k, v in value.items() if k not in MEASURED}
    if isinstance(value, list):
        return [without_measurements(item) for item in value]
    return value


def assert_same_result(ours: RunFolder, theirs: RunFolder) -> None:
    texts = [
        json.dumps(without_measurements(json.loads((run.path / "comparison.json").read_text())))
        for run in (ours, theirs)
    ]
    assert texts[0] == texts[1]
    parts = ours.config().parts
    assert parts == theirs.config().parts
    for part in parts:
        assert ours.variant(*part).best.read_bytes() == theirs.variant(*part).best.read_bytes()
    key = ("seed", "variant", "epoch", "split", "loss", "accuracy")
    rows = [sorted(str([row[k] for k in key]) for row in run.metrics()) for run in (ours, theirs)]
    assert rows[0] == rows[1]
    listed = [set(run.manifest().files) for run in (ours, theirs)]
    assert listed[0] == listed[1]


@pytest.fixture
def pod(settings: config.Storage, tmp_path: Path, compared: RunFolder) -> Any:
    """Arguments of a part of the run `compared` for a machine of its own."""
    raw = compared.config().model_dump(mode="json") | {"storage": settings.model_dump(mode="json")}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))

    def arguments(command: str, machine: str, *more: str) -> tuple[str | Path, ...]:
        place = tmp_path / machine
        return (command, "--config", file, "--out", place, "--run-id", compared.run_id, *more)

    return arguments


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_pods_with_nothing_in_common_but_s3_end_as_one_process_does_though_two_are_lost(
    pod: Any, compared: RunFolder, settings: config.Storage, store: ObjectStore, tmp_path: Path
) -> None:
    """Killed: one in its training, and the one that does the last step, in it."""

    def lost(machine: str) -> None:
        shutil.rmtree(tmp_path / machine)

    parts = compared.config().parts
    assert len(parts) == 6
    killed = start_job(*pod("run", "killed", "--part", "1", "--set", "runtime.checkpoint_every=1"))
    checkpoint = tmp_path / "killed" / "tiny" / "variants" / "finetune" / "last.ckpt"
    assert stop_when(checkpoint, killed, signal.SIGKILL) == -signal.SIGKILL
    lost("killed")
    for index in (0, 2, 3, 4, 5):
        done = job(*pod("run", f"pod-{index}", "--part", str(index), "--of", "6"))
        assert done.returncode == 0, done.stderr
        assert "finetune with seed 0 (--part 1)" in done.stderr.replace("\n", " ")
        assert not (tmp_path / f"pod-{index}" / "tiny" / "comparison.json").exists()
        lost(f"pod-{index}")
    early = job(*pod("gather", "nowhere"))
    assert early.returncode == 3, early.stderr
    assert "missing: finetune with seed 0 (--part 1)" in " ".join(early.stderr.split())
    nowhere = RunFolder(tmp_path / "nowhere" / "tiny")
    fetched = [nowhere.variant(*part).finished for part in parts]
    assert fetched == [True, False, True, True, True, True], "`run` there trains that one alone"

    last = ("run", "last", "--part", "1")
    comparison = tmp_path / "last" / "tiny" / "comparison.json"
    assert stop_when(comparison, start_job(*pod(*last)), signal.SIGKILL) == -signal.SIGKILL
    lost("last")
    assert not [key for key in keys_of(store, settings, "runs/") if "manifest" in key]
    other = job(*pod("run", "other", "--part", "4"))
    assert other.returncode == 0, other.stderr
    assert "the process of finetune with seed 0 does the rest" in other.stderr
    retried = job(*pod(*last))
    assert retried.returncode == 0, retried.stderr
    assert "features" not in retried.stderr and "resumes" not in retried.stderr, "not trained again"
    ours = RunFolder(tmp_path / "last" / "tiny")
    assert_same_result(ours, compared)

    manifest = f"{publishing.run_key(ours)}/manifest.json"
    published = Storage(settings).get(manifest)
    assert published is not None and published.body == (ours.path / "manifest.json").read_bytes()
    shutil.rmtree(tmp_path / "last")  # after its end, before anyone was told
    again = job(*pod(*last))
    assert again.returncode == 0, again.stderr
    found = Storage(settings).get(manifest)
    assert found is not None and found.etag == published.etag
    assert_same_result(ours, compared)


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_the_documented_line_trains_all_parts_on_one_machine(
    tmp_path: Path,
) -> None:
    """As it is written, two at once; they share the data, the stand-in and the folder."""
    text = (ROOT / "docs" / "performance.md").read_text()
    [line] = re.findall(r"^seq .*xargs.*$", text, re.MULTILINE)
    stand_in = {"source": "stand-in", "stand_in": {"images": 40, "optim": {"epochs": 1}}}
    raw = tiny(
        data={"train_images": 40, "test_images": 20},
        optim={"epochs": 1},
        weights=stand_in,
        variants=TINY["variants"][1:],
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))

    def places(name: str) -> str:
        out = tmp_path / name
        return f"--config {file} --run-id r --out {out} --set data.cache={out}/cache"

    for written, small in {
        "seq 0 14": "seq 0 1",
        "-P 8": "-P 2",
        ' --set "runtime.seeds=[0, 1, 2, 3, 4]"': "",
        "python -m jobs run": f"{sys.executable} -m thin jobs run {places('parts')}",
    }.items():
        assert written in line
        line = line.replace(written, small)
    command = ["bash", "-c", line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole = called("run", *shlex.split(places("whole")))
    assert whole.returncode == 0, whole.stderr
    assert_same_result(RunFolder(tmp_path / "parts" / "r"), RunFolder(tmp_path / "whole" / "r"))


def test_processes_of_one_folder_write_one_after_the_other(tmp_path: Path) -> None:
    """Metrics and environments of many at once are all there, and none is cut."""
    folder = RunFolder(tmp_path / "r")
    with folder.open(tiny_config()):
        pass
    processes = [forked(_write_often, folder.path, seed) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = [(row["seed"], row["epoch"]) for row in folder.metrics()]
    assert sorted(rows) == [(seed, epoch) for seed in range(4) for epoch in range(6)]
    assert len(folder.environments()) == 4 * 6


def _write_often(path: Path, seed: int) -> None:
    folder = RunFolder(path)
    for epoch in range(6):
        folder.append_metrics([{"variant": "a", "seed": seed, "epoch": epoch, "split": "train"}])
        folder.add_environment({"device": f"{seed}"})


# Without training


@pytest.fixture
def three(settings: config.Storage) -> config.Config:
    return tiny_config(storage=settings.model_dump(mode="json"))


def trained(path: Path, job: config.Config, part: Part, digest: str = "d") -> RunFolder:
    """A run folder in which one part is done."""
    folder = RunFolder(path / "r")
    folder.begin(job)
    folder.add_environment({"device": part.variant})
    facts = {
        "source": "s",
        "classes": ["a"],
        "image_size": [32, 32],
        "test_digest": "t",
        "images": {"train": 1, "validation": 1, "test": 1},
        "digest": digest,
        "skipped": [],
    }
    write(folder.path / "data.json", json.dumps(facts))
    lost = Diverged(variant=part.variant, seed=part.seed, reason="not trained")
    folder.variant(*part).save_result(lost)
    return folder


def test_a_part_is_in_s3_once_and_arrives_as_it_left(three: config.Config, tmp_path: Path) -> None:
    part = Part("finetune", 0)
    first = trained(tmp_path / "first", three, part)
    rows = [{"variant": name, "seed": 0, "epoch": 0} for name in ("finetune", "stranger")]
    first.append_metrics(rows)
    write(first.variant(*part).best, b"weights")
    Rendezvous(three, first).upload(part)
    second = trained(tmp_path / "second", three, part)
    there = Rendezvous(three, second)
    assert there.has(part) and not there.has(Part("frozen", 0))
    there.upload(part)  # of a pod that was believed to be lost
    third = RunFolder(tmp_path / "third" / "r")
    third.begin(three)
    Rendezvous(three, third).download(part)
    assert third.variant(*part).best.read_bytes() == b"weights"
    assert third.metrics() == first.metrics()[:1] and third.facts() == first.facts()
    assert third.environments() == first.environments()


def test_parts_of_another_configuration_or_other_pictures_are_not_taken(
    three: config.Config, settings: config.Storage, tmp_path: Path
) -> None:
    part, other = three.parts[:2]
    first = trained(tmp_path / "first", three, part)
    Rendezvous(three, first).upload(part)
    longer = tiny_config(optim={"epochs": 3}, storage=settings.model_dump(mode="json"))
    assert not Rendezvous(longer, first).has(part)
    grown = trained(tmp_path / "grown", three, other, digest="another")
    with pytest.raises(UnavailableError, match="trained on other pictures than the other parts"):
        Rendezvous(three, grown).download(part)
    assert grown.variant(*part).result() is None


@pytest.mark.usefixtures("thin")
def test_a_part_of_other_pictures_than_the_first_one_s_is_not_trained(
    settings: config.Storage, tmp_path: Path
) -> None:
    job = tiny_config(storage=settings.model_dump(mode="json"))
    one, other = (RunFolder(tmp_path / name / "r") for name in ("one", "other"))
    first = Rendezvous(job, one)
    first.agree("of a bucket before it grew")
    first.agree("of a bucket before it grew")
    with pytest.raises(UnavailableError, match="not those that the other parts began with"):
        parts.run(job, other, job.parts[1])
    assert not other.metrics() and not first.has(job.parts[1])


def test_parts_that_began_with_other_weights_are_not_taken(
    three: config.Config, tmp_path: Path
) -> None:
    one, two, three_ = three.parts[:3]
    scratch, first = (trained(tmp_path / str(p), three, p) for p in (one, two))
    write(first.path / "weights.sha256", "a")
    for folder, part in ((scratch, one), (first, two)):
        Rendezvous(three, folder).upload(part)
    whole = trained(tmp_path / "whole", three, three_)
    for part in (one, two):
        Rendezvous(three, whole).download(part)
    assert (whole.path / "weights.sha256").read_text() == "a"
    other = trained(tmp_path / "other", three, three_)
    write(other.path / "weights.sha256", "b")
    with pytest.raises(UnavailableError, match="began with other weights than the other parts"):
        Rendezvous(three, other).download(two)
    assert other.variant(*two).result() is None


def test_one_part_does_the_last_step_and_is_still_the_one_when_it_is_retried(
    three: config.Config, tmp_path: Path
) -> None:
    one, other = three.parts[:2]
    folders = [RunFolder(tmp_path / name / "r") for name in ("one", "other", "retried")]
    asked = [
        Rendezvous(three, folder).last(part)
        for folder, part in zip(folders, (one, other, one), strict=True)
    ]
    assert asked == [str(one)] * 3


def test_a_promotion_that_is_lost_half_way_is_finished_from_what_is_published(
    settings: config.Storage, tmp_path: Path
) -> None:
    """An archive that is packed again has other bytes, and a version is written once."""
    storage, registry = Storage(settings), Registry(Storage(settings), "m")
    gate = tiny_config(storage=settings.model_dump(mode="json"), export={"name": "m"})
    lost = exported_run(tmp_path / "lost" / "r", 150)
    publishing.publish(storage, lost)
    candidate = promotion.read_candidate(lost, "m")
    registry.add(candidate.files, candidate.record)

    retried = RunFolder(tmp_path / "retried" / "r")
    retried.begin(lost.config())
    retried.add_environments(lost.environments())  # as the parts have it
    publishing.fetch_published(storage, retried)
    assert retried.manifest() == lost.manifest()
    assert promotion.promote(retried, gate).endswith("/models/m/r/")

    stranger = exported_run(tmp_path / "stranger" / "r", 160)
    environments = json.loads((stranger.path / "environment.json").read_text())
    environments[0]["time"] = f"{stranger.started[:10]}T00:00:00+00:00"
    write(stranger.path / "environment.json", json.dumps(environments))
    with pytest.raises(ConfigurationError, match="another run is there as r"):
        publishing.fetch_published(storage, stranger)


def test_a_run_that_was_not_published_is_not_resumed(
    settings: config.Storage, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "r", 10)
    before = (folder.path / "manifest.json").read_bytes()
    publishing.fetch_published(Storage(settings), folder)
    assert (folder.path / "manifest.json").read_bytes() == before


def test_old_parts_are_pruned_and_those_of_today_are_not(
    three: config.Config, settings: config.Storage, store: ObjectStore, tmp_path: Path
) -> None:
    part = three.parts[0]
    there = Rendezvous(three, trained(tmp_path, three, part))
    there.upload(part)
    storage, later = Storage(settings), datetime.now(UTC) + timedelta(days=3)
    assert pruning.prune(storage, days=2, keep=0, dry_run=False) == []
    [gone] = pruning.prune(storage, days=2, keep=0, dry_run=False, now=lambda: later)
    assert gone.prefix == f"parts/r/{three.digest}/" and not there.has(part)
    assert not keys_of(store, settings)


def test_a_bucket_that_is_not_there_is_said_before_anything_is_trained(
    three: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.pipeline.train_part", lambda *_: pytest.fail("hours of it"))
    lost = three.storage.model_dump(mode="json") | {"uri": "s3://no-such-bucket/x"}
    with pytest.raises(UnavailableError, match=r"^s3://no-such-bucket/x: there is no such"):
        parts.run(tiny_config(storage=lost), RunFolder(tmp_path / "r"), three.parts[0])


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_part_that_arrives_damaged_is_one_line(tmp_path: Path, damage: str) -> None:
    packed, file = tmp_path / "part.tar", tmp_path / "best.safetensors"
    file.write_bytes(os.urandom(5000))
    with tarfile.open(packed, "w") as tar:
        for name in ("a", "b"):
            tar.add(file, name)
    with tarfile.open(packed) as tar:
        header = tar.getmembers()[1].offset
    whole = packed.read_bytes()
    cut, changed = whole[: header + 600], whole[:header] + b"?" * 100 + whole[header + 100 :]
    packed.write_bytes(cut if damage == "cut" else changed)
    with pytest.raises(UnavailableError, match=r"^part\.tar: damaged: ") as caught:
        parts._unpack(packed, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["../outside", "{tmp_path}/outside", "link"])
def test_a_part_that_would_write_elsewhere_is_refused(tmp_path: Path, kind: str) -> None:
    packed = tmp_path / "part.tar"
    member = tarfile.TarInfo(kind.format(tmp_path=tmp_path))
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(packed, "w") as tar:
        tar.addfile(member)
    with pytest.raises(UnavailableError, match="is no file of a part"):
        parts._unpack(packed, tmp_path / "run")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "run" / "link").exists()


@pytest.mark.usefixtures("thin")
def test_a_part_trains_also_where_another_has_the_port_of_prometheus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    wanted = tiny_config(tracking={"prometheus": port})
    run = RunFolder(tmp_path / "r")
    with run.open(wanted), tracking.exposed(RunFolder(tmp_path / "other"), port):
        pipeline.train_part(wanted, run, wanted.parts[0], lambda digest: None)
    assert run.variant(*wanted.parts[0]).finished
    assert f"warning: tracking.prometheus: port {port}: " in capsys.readouterr().err
