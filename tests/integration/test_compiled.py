"""What a run has compiled, the next one finds in the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from jobs import devices

# Batch norm as several processes have it, whose operator is our own.
RUN = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch._dynamo.utils import counters
from jobs import devices, distributed
from jobs.train import training, whole_batch

distributed.total = torch.clone  # as from other processes
devices.keep_compiled(Path(sys.argv[1]))
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
network[1].__class__ = whole_batch.WholeBatchNorm
training.compile_step(network)
network(torch.ones(2, 3, 8, 8)).sum().backward()
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_miss"], found["fxgraph_cache_hit"],
                  counters["aot_autograd"]["autograd_cache_hit"]]))
"""


def run(cache: Path, scratch: Path) -> list[int]:
    """Graphs that were compiled, graphs that were not, and whole steps that were not even traced
    for a gradient."""
    scratch.mkdir()
    given = {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}  # where torch would keep it by itself
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | given
    command = [sys.executable, "-c", RUN, str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_next_run_compiles_nothing(tmp_path: Path) -> None:
    if missing := devices.Device(torch.device("cpu"), torch.float32).missing_to_compile():
        pytest.skip(missing)
    compiled, *found = run(tmp_path / "cache", tmp_path / "first")
    assert compiled >= 2 and found == [0, 0], "forward and backward"
    compiled, *_, steps = run(tmp_path / "cache", tmp_path / "second")
    assert compiled == 0 and steps == 1
