"""Damaged files are named in one line, or made again where that costs nothing but time; and what
else can end a job early."""

import errno
import random
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from command import called
from conftest import tiny_config
from drawings import make_photos

from jobs import config, inspection, pipeline, runs
from jobs.data import index
from jobs.data.dataset import load
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Diverged, Trained
from jobs.runs import RunFolder, VariantFolder
from jobs.train import models, plan
from jobs.train.training import Trainer
from serving import archive as archives
from serving.archive import ModelError
from serving.files import replacing


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace(file: Path) -> None:
    file.write_bytes(b"something else")


Damage = Callable[[Path], None]
every_damage = pytest.mark.parametrize("damage", [cut, flip, replace])


def refused(work: Callable[[], object], file: Path) -> str:
    with pytest.raises(UnavailableError) as error:
        work()
    said = str(error.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said


def variant_of(folder: Path) -> VariantFolder:
    return VariantFolder(folder / "variants" / "scratch", RunFolder(folder))


@pytest.mark.usefixtures("thin")
def test_a_checkpoint_of_another_training_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = tiny_config(), RunFolder(tmp_path)
    with arguments[1].open(arguments[0]):
        variant = arguments[1].variant("scratch", 0)
        variant.save_checkpoint({"network": {}})
        monkeypatch.setattr(plan, "outline", lambda *_: "")
        job = pipeline.Job(*arguments)
        refused(lambda: job.train(arguments[0].variants[0], 0), variant.checkpoint)


@every_damage
def test_damaged_arrays_of_a_run_are_named(damage: Damage, tmp_path: Path) -> None:
    file = tmp_path / "test_predictions.npz"
    runs.write_arrays(file, {"logits": np.random.default_rng(0).normal(size=(50, 10))})
    damage(file)
    refused(lambda: runs.read_arrays(file), file)


@pytest.mark.parametrize("name", ["manifest.json", "environment.json", "metrics.jsonl"])
def test_damaged_records_of_a_run_are_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('{"files":\n')
    folder = RunFolder(tmp_path)
    read = {
        "manifest.json": folder.manifest,
        "environment.json": lambda: folder.started,
        "metrics.jsonl": folder.metrics,
    }
    refused(read[name], file)


def test_a_damaged_configuration_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {source: [")
    refused(RunFolder(tmp_path).config, tmp_path / "config.yaml")


@pytest.mark.parametrize("damage", [cut, replace])
def test_damaged_weights_of_a_run_are_named(damage: Damage, tmp_path: Path) -> None:
    variant = variant_of(tmp_path)
    variant.save_best({"weight": torch.arange(10_000)}, 0, 0.5)
    damage(variant.best)
    with pytest.raises(UnavailableError, match=f"weights {variant.best}: unreadable: "):
        models.read(variant.best)


def test_a_damaged_stand_in_of_the_cache_is_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "stand-in.safetensors"
    variant = variant_of(tmp_path)
    variant.save_best({"weight": torch.arange(10_000)}, 0, 0.5)
    kept.write_bytes(variant.best.read_bytes())
    cut(kept)
    assert not pipeline._take_stand_in(variant, kept)
    assert f"stand-in: trained again: weights {kept}: unreadable" in capsys.readouterr().err
    kept.write_bytes(variant.best.read_bytes())
    assert pipeline._take_stand_in(variant, kept)


def test_a_stand_in_that_cannot_be_kept_for_others_costs_this_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = variant_of(tmp_path)
    variant.save_best({"weight": torch.arange(10)}, 0, 0.5)
    (file := tmp_path / "file").touch()
    pipeline._keep_stand_in(variant, file / "stand-in.safetensors")
    assert "weights: other runs have to train them again: " in capsys.readouterr().err
    pipeline._keep_stand_in(variant, tmp_path / "stand-in.safetensors")
    assert (tmp_path / "stand-in.safetensors").read_bytes() == variant.best.read_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> config.Data:
    make_photos(tmp_path / "photos", train=6, test=2, size=(16, 16))
    root, cache = str(tmp_path / "photos"), str(tmp_path / "cache")
    return config.Data(source="folder", root=root, cache=cache, input_size=75, validation=0.2)


@pytest.mark.parametrize("is_file", [True, False], ids=["a file", "an index"])
def test_a_full_disk_says_of_which_file(tmp_path: Path, *, is_file: bool) -> None:
    file = tmp_path / "index.sqlite"
    if is_file:
        with pytest.raises(OSError, match=f"No space left on device: '{file}'"), replacing(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert not list(tmp_path.iterdir())
    else:
        with (
            pytest.raises(UnavailableError, match=f"^{file}: No space left on device$"),
            index.opened(tmp_path, "CREATE TABLE t (x)") as db,
        ):
            db.execute("PRAGMA max_page_count = 2")
            db.execute("INSERT INTO t VALUES (zeroblob(100000))")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("damage", [cut, replace])
def test_damaged_pixels_of_the_cache_are_decoded_again(
    photos: config.Data, damage: Damage, *, begun: bool
) -> None:
    before = load(photos)
    digest = before.description.digest if begun else None  # a run's, which remembers its pictures
    [file] = [p for p in Path(photos.cache).glob("pictures-*/pixels-*") if not p.suffix]
    everything = torch.arange(len(before.train))
    expected = before.train.raw(everything).clone()
    del before
    damage(file)
    assert torch.equal(load(photos, digest).train.raw(everything), expected)


def test_a_damaged_index_of_the_cache_is_named(photos: config.Data) -> None:
    load(photos)
    [file] = Path(photos.cache).glob("pictures-*/index.sqlite")
    replace(file)
    refused(lambda: load(photos), file)
    file.unlink()
    assert load(photos).classes == ("cat", "dog")
    with sqlite3.connect(file) as db:
        assert db.execute("SELECT count(*) FROM pictures").fetchone() == (16,)


@every_damage
def test_a_damaged_selection_is_found_anew(
    photos: config.Data, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = load(photos).description.digest
    [file] = Path(photos.cache).glob("pictures-*/pixels-*.npz")
    damage(file)
    assert load(photos, digest).description.digest == digest
    assert f"looked up again: {file}: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, replace])
def test_damaged_features_of_an_inspection_are_made_again(
    photos: config.Data, damage: Damage
) -> None:
    made = []

    def features(images: Any) -> torch.Tensor:
        made.append(len(images))
        return torch.ones(len(images), 2048)

    job = SimpleNamespace(
        dataset=load(photos),
        config=SimpleNamespace(data=photos),
        pretrained={},
        features=features,
        device="cpu",
    )
    first = inspection._features(cast(pipeline.Job, job))
    inspection._features(cast(pipeline.Job, job))
    assert sum(made) == len(first) == 16, "kept"
    [file] = Path(photos.cache).glob("features-*.npy")
    damage(file)
    assert np.array_equal(inspection._features(cast(pipeline.Job, job)), first)
    assert sum(made) == 2 * 16
    assert np.array_equal(np.load(file), first)


def test_a_damaged_archive_is_one_line_wherever_it_is_damaged(
    archive: Path, tmp_path: Path
) -> None:
    small, bad = tmp_path / "small.mar", tmp_path / "bad.mar"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(small, "w", 8) as part:
        for entry in whole.infolist():
            if entry.file_size < 100_000:
                part.writestr(entry.filename, whole.read(entry))
    draw, found = random.Random(0), 0
    for attempt in range(120):
        content = bytearray(small.read_bytes())
        if attempt % 3:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        bad.write_bytes(content)
        for read in (archives.open_model, lambda file: archives.unpack(file, tmp_path / "files")):
            try:
                read(bad)
            except ModelError as error:
                found += 1
                assert str(error).startswith(f"{bad}: ") and "\n" not in str(error)
    assert found > 200


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("where", [(plan, "outline"), (Trainer, "__init__")])
def test_too_little_memory_of_a_gpu_is_one_line_that_says_what_to_set(
    where: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee more.")

    monkeypatch.setattr(*where, full)
    with pytest.raises(ConfigurationError, match=r"smaller optim.batch_size .*9 GiB") as error:
        pipeline.run(tiny_config(), RunFolder(tmp_path))
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_the_checkpoint_of_a_variant_that_diverged_stays_and_is_not_listed(tmp_path: Path) -> None:
    variant = variant_of(tmp_path)
    variant.save_checkpoint({"epoch": 1})
    variant.save_result(Diverged(variant="scratch", seed=0, reason="planted"))
    assert variant.load_checkpoint() == {"epoch": 1}
    variant.run.add_environment({})
    variant.run.write_manifest()
    assert set(variant.run.manifest().files) == {
        "environment.json",
        "variants/scratch/result.json",
    }
    variant.save_result(Trained(seconds=1.0))
    assert variant.load_checkpoint() is None


@pytest.mark.usefixtures("thin")
def test_one_variant_that_diverges_ends_its_training_with_1(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    arguments = ["--set", "optim.learning_rate=1e30", "--set", "optim.epochs=1"]
    done = called("train", "scratch", "--config", tiny_yaml, "--out", tmp_path, *arguments)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "scratch has no result: the loss was no longer finite in epoch 1, step " in line


@pytest.mark.usefixtures("thin")
def test_a_stand_in_that_diverges_is_no_variants_fault(tmp_path: Path) -> None:
    optim = {"epochs": 1, "batch_size": 20, "learning_rate": 1e38}
    stand_in = {"source": "stand-in", "stand_in": {"images": 60, "optim": optim}}
    wanted = tiny_config(weights=stand_in)
    with pytest.raises(ConfigurationError, match=r"^weights.stand_in.optim: the loss was no long"):
        pipeline.train(wanted, RunFolder(tmp_path / "r"), "frozen")
    assert not (tmp_path / "r/variants/frozen/result.json").exists()


@pytest.mark.usefixtures("thin")
def test_weights_that_were_replaced_meanwhile_are_not_those_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    network = models.build(1000, aux=False)
    torch.save(network.state_dict(), file)
    wanted = tiny_config(weights={"source": str(file)})
    run = RunFolder(tmp_path / "r")
    pipeline.train(wanted, run, "finetune")
    torch.nn.init.zeros_(network.fc.bias)
    torch.save(network.state_dict(), file)
    with pytest.raises(UnavailableError, match=f"^weights {file}: not those that this run began"):
        pipeline.train(wanted, run, "frozen")


@pytest.mark.usefixtures("thin")
def test_weights_that_the_last_step_spoils_end_their_variant_alone(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    """No loss comes after the only step; the others are trained and compared."""
    settings = [
        "optim.epochs=1",
        "optim.batch_size=60",
        "variants.scratch.optim.learning_rate=1e30",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = called("run", "--config", tiny_yaml, "--out", tmp_path, "--run-id", "r", *arguments)
    assert done.returncode == 0, done.stderr
    assert "scratch: stopped: no epoch's answers were finite; the other variants" in done.stderr
    variants = RunFolder(tmp_path / "r").comparison().variants
    assert [v.status for v in variants.values()] == ["diverged", "done", "done"]


@pytest.mark.usefixtures("thin")
def test_a_second_job_of_a_run_says_so_and_leaves_and_a_crash_frees_it(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    wanted = config.load(str(tiny_yaml), ())
    command = ("train", "frozen", "--config", tiny_yaml, "--out", tmp_path, "--run-id", "r")
    with RunFolder(tmp_path / "r").open(wanted):
        second = called(*command)
    assert second.returncode == 2
    assert f"error: {tmp_path / 'r'}: another process is working on this run" in second.stderr
    assert (tmp_path / "r" / ".lock").exists(), "as a crash leaves it"
    assert called(*command, "--set", "optim.epochs=1").returncode == 2, "another configuration"
    assert called(*command).returncode == 0
