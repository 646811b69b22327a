"""A device takes batches of its size, and freed memory stays with the process."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

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


@pytest.mark.parametrize(
    ("precision", "said"), [("fp32", "H200 in float32 without TF32"), ("bf16", "H200 in bfloat16")]
)
def test_float32_on_a_gpu_is_float32_and_is_said_to_be(
    precision: Literal["fp32", "bf16"], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True  # it is False by default, and again at the end
    device = devices.choose(config.Runtime(device="cuda", precision=precision))
    assert str(device) == said
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_what_is_left_of_an_earlier_network_is_not_measured_with_the_next() -> None:
    network = torch.nn.Linear(1, 1)
    network.itself = network
    left = weakref.ref(network)
    del network
    assert left() is not None
    devices.Device(torch.device("cpu"), torch.float32).start_measuring()
    assert left() is None


def test_compiled_code_is_kept_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the root is read-only, importing PyTorch's compiler would end the job."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    (file := tmp_path / "file").touch()
    devices.keep_compiled(file / "compiled")
    assert "compiled code is not kept for the next run: " in capsys.readouterr().err
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    devices.keep_compiled(tmp_path / "cache" / "compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "compiled")
