"""The whole job, on few real pictures with a real pretrained trunk at the real size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import job
from conftest import changed_at
from safetensors.torch import load_file

from jobs import config
from jobs.runs import RunFolder
from serving.files import digest_of

pytestmark = pytest.mark.slow


TRAIN, TEST = 30, 10  # of each of the ten classes
VARIANTS = config.load("cifar10-small").variants[1:]  # scratch has no pretrained trunk


@pytest.fixture(scope="module")
def photos(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 60,000 take a minute to decode; test_data.py does so."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in (real_data / "cifar10" / split).iterdir():
            (folder / split / label.name).mkdir(parents=True)
            for picture in sorted(label.iterdir())[:count]:
                (folder / split / label.name / picture.name).hardlink_to(picture)
    return folder


@pytest.fixture(scope="module")
def run(
    real_data: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, list[str]]:
    out = tmp_path_factory.mktemp("real-run")
    weights = real_data / "inception_v3_backbone_fp16.safetensors"
    settings = {
        "data.source": "folder",
        "data.root": photos,
        "data.cache": out / "cache",
        "data.train_images": 10 * TRAIN,
        "data.test_images": 10 * TEST,
        "data.validation": 0.2,
        "weights.source": weights,
        "evaluation.batch_norm_images": 100,
        "export.calibration_images": 10,
        "variants": json.dumps([variant.model_dump(mode="json") for variant in VARIANTS]),
        **{f"variants.{variant.name}.optim.epochs": 1 for variant in VARIANTS},
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    arguments = ["run", "--config", "cifar10-small", *arguments, "--out", str(out), "--run-id", "r"]
    done = job(*arguments)
    assert done.returncode == 0, done.stderr
    return RunFolder(out / "r"), arguments


def test_every_file_is_listed_with_its_digest(run: tuple[RunFolder, list[str]]) -> None:
    folder, _ = run
    manifest = json.loads((folder.path / "manifest.json").read_text())
    there = {path.relative_to(folder.path).as_posix() for path in changed_at(folder.path)}
    assert there - {"manifest.json"} == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert digest_of(folder.path / name) == entry["sha256"], name


def test_the_frozen_trunk_did_not_move_and_the_others_did(
    run: tuple[RunFolder, list[str]], real_data: Path
) -> None:
    folder, _ = run
    trunk = load_file(real_data / "inception_v3_backbone_fp16.safetensors")
    frozen = load_file(folder.path / "variants" / "frozen" / "best.safetensors")
    assert all(torch.equal(frozen[name], tensor.float()) for name, tensor in trunk.items())
    assert not any(name.startswith("AuxLogits") for name in frozen)
    finetune = load_file(folder.path / "variants" / "finetune" / "best.safetensors")
    weights = [name for name in trunk if name.endswith("conv.weight")]
    assert not any(torch.equal(finetune[name], trunk[name].float()) for name in weights)
    with np.load(folder.path / "variants" / "frozen" / "kernels.npz") as kernels:
        for layer in ("Conv2d_1a_3x3", "Conv2d_2a_3x3"):
            assert np.array_equal(kernels[f"{layer}.before"], kernels[f"{layer}.after"])


def test_fine_tuning_learns_and_says_what_it_started_from(
    run: tuple[RunFolder, list[str]],
) -> None:
    folder, _ = run
    result = json.loads((folder.path / "comparison.json").read_text())
    chance = 1 / len(result["data"]["classes"])
    assert result["variants"]["finetune"]["test"]["accuracy_low"] > chance
    assert "inception_v3_backbone_fp16.safetensors" in result["weights"]
    assert "ImageNet" not in result["weights"]
    aux = [r["aux_loss"] for r in folder.metrics() if r["split"] == "train"]
    assert len(aux) == 2 and aux[0] > 0 and aux[1] is None


def test_a_second_call_does_nothing_more(run: tuple[RunFolder, list[str]]) -> None:
    folder, arguments = run
    before = changed_at(folder.path)
    again = job(*arguments)
    assert again.returncode == 0 and "is finished; --run-id" in again.stderr
    assert changed_at(folder.path) == before
