"""Several processes give what one gives, write once, stop together, and outlive one another."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, free_port, job, tiny
from safetensors.torch import load_file

from jobs import distributed
from jobs.runs import RunFolder

# Batch norm without a synchronised form on the CPU, so in eval mode wherever one trains.
RAW = tiny(
    data={"train_images": 64, "test_images": 41, "validation": 0.3},
    variants=[
        {"name": "finetune", "init": "pretrained", "batch_norm": "eval"},
        {"name": "frozen", "init": "pretrained", "trainable": "head"},
    ],
    runtime={"checkpoint_every": 1},
    evaluation={"batch_norm_images": 0, "batch_size": 7},
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path


def torchrun(*arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts two processes of the job, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    command += ["--master-port", str(free_port()), "-m", "jobs", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("alone")
    done = job("run", "--config", config, "--out", out, "--run-id", "r")
    assert done.returncode == 0, done.stderr
    return RunFolder(out / "r")


@pytest.fixture(scope="module")
def together(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str, str]:
    """The same job in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("together")
    process = torchrun("run", "--config", config, "--out", out, "--run-id", "r")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return RunFolder(out / "r"), stdout, stderr


def assert_same_up_to_reduction_order(ours: RunFolder, theirs: RunFolder) -> None:
    for name in ("finetune", "frozen"):
        one, other = (
            load_file(f.path / "variants" / name / "best.safetensors") for f in (ours, theirs)
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                tensor, other[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}"
            )
    rows = [
        [(r["variant"], r["epoch"], r["split"]) for r in folder.metrics()]
        for folder in (ours, theirs)
    ]
    assert rows[0] == rows[1]
    for row, expected in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4), row
        assert row["learning_rate"] == expected["learning_rate"]


def test_two_processes_give_what_one_gives(
    alone: RunFolder, together: tuple[RunFolder, str, str]
) -> None:
    assert_same_up_to_reduction_order(together[0], alone)
