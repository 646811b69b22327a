"""The job through its CUDA path, on a GPU that is only said to be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, tiny
from stub_gpu.build import NotHereError, build

from jobs.runs import RunFolder


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is a build without CUDA")
    try:
        return build(tmp_path_factory.mktemp("stub") / "gpu")
    except NotHereError as missing:
        pytest.skip(str(missing))


def test_the_job_runs_through_its_cuda_path_in_one_graph_and_its_loop_reads_nothing_back(
    stub: dict[str, str], tmp_path: Path
) -> None:
    raw = tiny(
        data={"train_images": 40, "test_images": 10, "cache": str(tmp_path / "cache")},
        runtime={"device": "cuda", "precision": "bf16", "compile": True},
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    job = ["run", "--config", str(config), "--out", str(tmp_path), "--run-id", "r"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "stub_gpu" / "job.py"), *job],
        cwd=ROOT,
        env={**os.environ, **stub, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["graphs"] <= 2 and found["breaks"] == 0, found
    assert found["reads"] == [0] * 6, "two epochs of three variants"
    run = RunFolder(tmp_path / "r")
    assert run.finished and "H200" in (run.path / "environment.json").read_text()
