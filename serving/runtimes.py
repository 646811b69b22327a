"""The network behind one small interface: OpenVINO on a CPU, torch on a GPU."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Predict = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From pictures uint8 [N, 3, H, W], N any number, to logits float32 [N, C]."""

PROGRAM = "network.pt2"  # torch.export; the reference, and what a GPU runs
IR = "network.xml"  # OpenVINO; what a CPU runs


def load(folder: Path, gpu: int | None) -> Predict:
    """The network of an unpacked archive.

    Args:
        gpu: its number, or None for the CPU.
    """
    return (
        load_program(folder / PROGRAM, f"cuda:{gpu}") if gpu is not None else load_ir(folder / IR)
    )


def load_program(path: Path, device: str) -> Predict:
    """The exported program: float32 on a CPU, bf16 and channels-last on a GPU."""
    import torch

    network = torch.export.load(path).module().to(device)
    is_gpu = device.startswith("cuda")
    if is_gpu:
        network = network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_gpu):
            logits = network(torch.from_numpy(images).to(device))
        result: NDArray[np.float32] = logits.float().cpu().numpy()
        return result

    return predict


@functools.cache
def core() -> Any:
    """The process's one OpenVINO core, which must never be freed.

    Its CPU plugin gives the thread a signal stack (openvino#11894) and takes it back in its
    destructor. A second core that is not freed in exactly the opposite order leaves the thread with
    one that is unmapped, and the next signal that Python should handle kills the process.
    """
    import openvino

    return openvino.Core()


def load_ir(path: Path, threads: int = 1) -> Predict:
    """The IR on so many threads.

    Pinning is off: two workers would otherwise pin to the same core (measured: 31 instead of 55
    images/s with two single-thread workers on two cores).
    """
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    network = core().compile_model(path, "CPU", settings)

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = network(images)[0]
        return result

    return predict
