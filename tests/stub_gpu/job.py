"""`python -m jobs` on the stub: convolutions and products, whose libraries want a real GPU, are
stand-ins with the same shapes, which insist on channels last; compiled code is the traced code, and
several processes talk by gloo in NCCL's place; all else is the job's own.

Prints, as the last line of stdout, what JSON `{graphs, breaks, reads, checkpoints}` it found; the
last two are copies from the device to the host, in every epoch's loop and for every checkpoint.
"""

import ctypes
import functools
import json
import runpy
from typing import Any

import torch
import torch.distributed as dist
from thin import stay_thin
from torch import Tensor, nn
from torch._dynamo.utils import counters

from jobs.train import training, writing

init_process_group = dist.init_process_group
runtime = ctypes.CDLL(None)
runtime.stub_reads.restype = ctypes.c_long


def convolution(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    for name, value in (("input", x), ("weight", weight)):
        in_order = value.is_contiguous(memory_format=torch.channels_last)
        assert in_order or value.is_meta, f"a convolution's {name} is not channels last"
    height, width = (
        (x.shape[2 + i] + 2 * int(self.padding[i]) - self.kernel_size[i]) // self.stride[i] + 1
        for i in range(2)
    )
    shape = x.shape[0], self.out_channels, height, width
    dtype = torch.bfloat16 if x.is_cuda else x.dtype
    y = torch.empty(shape, device=x.device, dtype=dtype, memory_format=torch.channels_last)
    return y + weight.sum() * x.sum().to(dtype)


def linear(self: nn.Linear, x: Tensor) -> Tensor:
    return x[:, : self.out_features] + self.weight.sum() + self.bias


def traced(module: torch.fx.GraphModule, _inputs: Any) -> Any:
    return module.forward


def by_gloo(_backend: str, **arguments: Any) -> None:
    init_process_group("gloo", **arguments)


def counted(work: Any, found: list[int]) -> Any:
    """The same, and how often its thread reads back from the device."""

    def count(*arguments: Any) -> None:
        before = runtime.stub_reads()
        work(*arguments)
        found.append(runtime.stub_reads() - before)

    return count


def main() -> None:
    reads: list[int] = []
    checkpoints: list[int] = []
    stay_thin()
    torch.set_num_threads(1)
    torch.backends.cudnn.enabled = False
    torch.compile = functools.partial(torch.compile, backend=traced)
    for place, name, stand_in in (
        (nn.Conv2d, "_conv_forward", convolution),
        (nn.Linear, "forward", linear),
        (dist, "init_process_group", by_gloo),
        (training, "train_epoch", counted(training.train_epoch, reads)),
        (writing.Writer, "_write", counted(writing.Writer._write, checkpoints)),  # in a thread
    ):
        setattr(place, name, stand_in)
    training.SECONDS_BETWEEN_CHECKPOINTS = 0  # one an epoch, and so on its way in the next
    try:
        runpy.run_module("jobs", run_name="__main__", alter_sys=True)
    finally:  # it ends by leaving Python
        found = {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "reads": reads,
            "checkpoints": checkpoints,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
