"""A device takes batches of its size, and freed memory stays with the process."""

import subprocess
import sys

import pytest
import torch

from jobs import config, devices


@pytest.mark.parametrize(("kind", "images"), [("cuda", 500), ("cpu", 50)])
def test_as_many_are_scored_at_once_as_suits_the_device_or_as_asked_for(
    kind: str, images: int
) -> None:
    device = devices.Device(torch.device(kind), torch.bfloat16)
    assert device.scored_at_once(config.Evaluation()) == images
    assert device.scored_at_once(config.Evaluation(batch_size=7)) == 7


def test_freed_memory_is_taken_again_without_asking_the_kernel() -> None:
    code = """
import resource, torch
from jobs import config, devices

devices.choose(config.Runtime(device="cpu"))
faults = []
for _ in range(8):
    block = torch.ones(2**24)  # 64 MiB: 16,384 pages
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[3])  # the first ones find their places
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
