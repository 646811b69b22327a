"""The job through its CUDA path, on GPUs that are only said to be there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, free_port, tiny
from stub_gpu.build import NotHereError, build

from jobs.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]
# The best weights, and the state, as their numbers have different types: float32 and int64 each,
# whatever the number of layers. Thousands when each tensor crosses by itself.
COPIES_A_CHECKPOINT = 4
SECONDS = 1200  # for what takes 40 on two free cores: a process that waits for another never ends


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is a build without CUDA")
    try:
        return build(tmp_path_factory.mktemp("stub") / "gpu")
    except NotHereError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    raw = tiny(
        data={"train_images": 40, "test_images": 10, "cache": str(tmp_path / "cache")},
        runtime={"device": "cuda", "precision": "bf16", "compile": True},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(stub: dict[str, str], config: Path, **environment: str) -> subprocess.Popen[str]:
    job = ["run", "--config", str(config), "--out", str(config.parent), "--run-id", "r"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "stub_gpu" / "job.py"), *job],
        cwd=ROOT,
        env={**os.environ, **stub, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What each found, once all of them have done their work."""
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def test_the_job_runs_through_its_cuda_path_in_one_graph_and_its_loop_reads_nothing_back(
    stub: dict[str, str], config: Path
) -> None:
    [found] = ended([start(stub, config)])
    assert found["graphs"] == 1 and found["breaks"] == 0, found
    assert found["reads"] == [0] * 6, "two epochs of three variants"
    assert len(found["checkpoints"]) == 6
    assert max(found["checkpoints"]) <= COPIES_A_CHECKPOINT, found
    run = RunFolder(config.parent / "r")
    assert run.finished and "H200" in (run.path / "environment.json").read_text()


def test_two_gpus_finish_the_job_together(stub: dict[str, str], config: Path) -> None:
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port()), "STUB_GPUS": "2"}
    pair = [start(stub, config, **group, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    first, second = ended(pair)
    assert first["breaks"] == second["breaks"] == 0
    assert not second["checkpoints"] and max(first["checkpoints"]) <= COPIES_A_CHECKPOINT
    run = RunFolder(config.parent / "r")
    [environment] = json.loads((run.path / "environment.json").read_text())
    assert run.finished and environment["processes"] == 2
