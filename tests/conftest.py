"""What tests share: a job small enough for seconds, and the real data where there is some."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jobs import config, data
from jobs.runs import RunFolder
from serving.processes import free_ports

if TYPE_CHECKING:
    from service import Service

pytest_plugins = ["object_store"]

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

TINY: dict[str, Any] = {
    "data": {
        "source": "generated",
        "train_images": 80,
        "test_images": 40,
        "validation": 0.25,
        "input_size": 75,  # the smallest that Inception-v3 takes; no auxiliary head then
    },
    "weights": {"source": "random"},
    "optim": {"epochs": 2, "batch_size": 10, "aux_weight": 0.0, "average_decay": 0.5},
    "variants": [
        {"name": "scratch", "init": "random"},
        {"name": "finetune", "init": "pretrained", "optim": {"learning_rate": 3e-4}},
        {"name": "frozen", "init": "pretrained", "trainable": "head"},
    ],
    "runtime": {"device": "cpu", "precision": "fp32"},
    "evaluation": {"batch_size": 40, "batch_norm_images": 20},
    "export": {"enabled": False, "calibration_images": 20},
}


def tiny(**sections: dict[str, Any]) -> dict[str, Any]:
    """The tiny job as a mapping, with some keys of its sections changed."""
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return raw


def tiny_config(**sections: dict[str, Any]) -> config.Config:
    return config.validate(tiny(**sections))


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny()))
    return path


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as a folder of JPEGs, and a pretrained trunk; see the README of that folder."""
    unpack = SHARED_DATA / "unpack.sh"
    if not unpack.is_file():
        pytest.skip(f"the real data is not at {SHARED_DATA}")
    target = tmp_path_factory.mktemp("real-data")
    subprocess.run(["bash", str(unpack), str(target)], check=True, capture_output=True)
    return target


def start_job(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


def job(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m jobs` to its end."""
    process = start_job(*arguments)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def stop_when(path: Path, process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Sends a signal as soon as a file exists; returns the exit code."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    return process.returncode


MODEL = "inception_v3_cifar10"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny job's frozen variant, trained until it is sure of itself; its run exports it."""
    from jobs import pipeline

    folder = RunFolder(tmp_path_factory.mktemp("runs") / "exported")
    resolved = tiny_config(
        optim={"epochs": 100, "learning_rate": 0.02, "label_smoothing": 0.0},
        export={"enabled": True},
    )
    resolved = resolved.model_copy(update={"variants": resolved.variants[2:]})
    pipeline.run(resolved, folder)
    return folder


@pytest.fixture(scope="session")
def archive(exported: RunFolder) -> Path:
    return exported.path / "model" / f"{MODEL}.mar"


@pytest.fixture(scope="session")
def service(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:
    """One that all tests share which leave it as it is."""
    from service import running

    with running(archive, tmp_path_factory.mktemp("service") / "state") as service:
        yield service


def classes_of(run: RunFolder) -> list[str]:
    classes: list[str] = json.loads((run.path / "data.json").read_text())["classes"]
    return classes


def pictures(run: RunFolder, count: int) -> list[bytes]:
    """The first test pictures as PNG files."""
    files = []
    for picture in data.load(run.config().data).test.raw(torch.arange(count)):
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return files


def predictions(run: RunFolder, count: int) -> list[str]:
    """The job's own labels for them."""
    with np.load(run.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        return [classes_of(run)[i] for i in arrays["logits"][:count].argmax(1)]


def free_port() -> int:
    return free_ports(1)[0]
