"""Two nights on a bucket that grows in between: trained, exported, compared and promoted. And two
whose GPU is given back before the export."""

import json
import time
from pathlib import Path

import pytest
import yaml
from command import job
from conftest import tiny
from object_store import BUCKET
from test_mirror import Pictures, png

from jobs import config
from jobs.delivery import publishing
from jobs.delivery.registry import Registry
from jobs.delivery.storage import Storage
from jobs.demo import ObjectStore
from jobs.runs import RunFolder


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_the_second_night_s_model_is_compared_on_the_first_night_s_pictures_and_promoted(
    store: ObjectStore, credentials: None, settings: config.Storage, tmp_path: Path
) -> None:
    pictures = Pictures(store, f"nights-{time.monotonic_ns()}", tmp_path / "cache")
    pictures.fill(120)  # of each class; half as many for the test
    own = {"train_images": None, "test_images": None, "validation": 0.25}
    raw = tiny(
        data={**pictures.settings.model_dump(mode="json"), **own},
        export={"enabled": True, "name": "own"},
        storage=settings.model_dump(mode="json"),
        promotion={"tolerance": 100.0},
    )
    raw["variants"] = raw["variants"][2:]
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(raw))
    said, digests = {}, set()
    for night in ("first", "second"):
        command = ("run", "--config", file, "--run-id", night, "--promote")
        done = job(*command, "--out", tmp_path / "runs")
        assert done.returncode == 0, done.stderr
        said[night] = done.stderr
        facts = json.loads((tmp_path / "runs" / night / "data.json").read_text())
        digests.add(facts["digest"])
        assert facts["classes"] == ["cat", "dog"] and f"s3://{BUCKET}" in facts["source"]
        for i in range(10):
            pictures.put(f"train/cat/new{i}.png", png(5000 + i))
            pictures.put(f"test/dog/new{i}.png", png(6000 + i))
    assert len(digests) == 2 and facts["images"]["test"] == 130
    assert "of 10 new test images are right" not in said["first"]
    assert "of 10 new test images are right; what follows is about the 120" in said["second"]
    channel = Registry(Storage(settings), "own").channel("production")
    assert channel is not None and channel.version == "second"


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_what_a_gpu_has_trained_is_exported_and_promoted_elsewhere_once(
    settings: config.Storage, tmp_path: Path
) -> None:
    """As k8s/components/delivery does it: one job trains, another looks every ten minutes."""
    raw = tiny(export={"enabled": False}, storage=settings.model_dump(mode="json"))
    raw["variants"] = raw["variants"][2:]
    file, runs = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(raw))
    storage = Storage(settings)
    registry = Registry(storage, "inception_v3_cifar10")

    def night(name: str, *options: str) -> RunFolder:
        done = job("run", "--config", file, "--out", runs, "--run-id", name, *options)
        assert done.returncode == 0, done.stderr
        return RunFolder(runs / name)

    def deliver(code: int = 0) -> str:
        done = job("deliver", runs)
        assert done.returncode == code, done.stderr
        return done.stderr

    def published(run: RunFolder) -> list[str]:
        there = storage.get(f"{publishing.run_key(run)}/manifest.json")
        assert there is not None
        return [name for name in json.loads(there.body)["files"] if name.endswith(".mar")]

    first = night("first")
    assert published(first) == [] and registry.channel("production") is None
    deliver()
    assert published(first) == [first.archive(registry.name)]
    assert registry.channel("production").version == "first"  # type: ignore[union-attr]
    assert "nothing to deliver" in deliver()

    second = night("second", "--set", "promotion.min_accuracy=100.0")
    exported = job("export", second.path)  # and then S3 was out of reach
    assert exported.returncode == 0 and published(second) == []
    assert "100 % are needed" in deliver(code=4)
    assert published(second) == [second.archive(registry.name)]
    assert "nothing to deliver" in deliver(), "the gate would only say the same again"
    assert registry.channel("production").version == "first"  # type: ignore[union-attr]
