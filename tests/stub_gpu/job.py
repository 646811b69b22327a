"""`python -m jobs` on the stub: convolutions and products, whose libraries want a real GPU, are
stand-ins with the same shapes, and compiled code is the traced code; all else is the job's own.

Prints, as the last line of stdout, what JSON `{graphs, breaks, reads}` it found; `reads` has an
entry for every epoch of training: copies from the device to the host in its loop.
"""

import ctypes
import functools
import json
import runpy
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from jobs.train import training

runtime = ctypes.CDLL(None)
runtime.stub_reads.restype = ctypes.c_long


def convolution(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def counted(train_epoch: Any, reads: list[int]) -> Any:
    def train(*arguments: Any) -> None:
        before = runtime.stub_reads()
        train_epoch(*arguments)
        reads.append(runtime.stub_reads() - before)

    return train


def main() -> None:
    reads: list[int] = []
    torch.set_num_threads(1)
    torch.backends.cudnn.enabled = False
    torch.compile = functools.partial(torch.compile, backend=traced)
    for layer, name, stand_in in (
        (nn.Conv2d, "_conv_forward", convolution),
        (nn.Linear, "forward", linear),
    ):
        setattr(layer, name, stand_in)
    training.train_epoch = counted(training.train_epoch, reads)
    training.SECONDS_BETWEEN_CHECKPOINTS = 3600  # none is on its way while the next epoch trains
    try:
        runpy.run_module("jobs", run_name="__main__", alter_sys=True)
    finally:  # it ends by leaving Python
        breaks = sum(counters["graph_break"].values())
        graphs = counters["stats"]["unique_graphs"]
        print(json.dumps({"graphs": graphs, "breaks": breaks, "reads": reads}))


if __name__ == "__main__":
    main()
