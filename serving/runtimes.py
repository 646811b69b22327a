"""One interface to the network's runtimes: OpenVINO on a CPU, torch on a GPU."""

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram


Array = NDArray[np.float32]


class Outputs(NamedTuple):
    """What one run of the network gives for N pictures."""

    logits: Array
    """[N, C]."""
    features: Array
    """[N, 2048], the inputs of its last layer; [N, 0] of archives that give none."""
    maps: Array
    """[N, C, h, w], what each place says for each class: the mean over the places is the logit less
    the class's bias. [N, 0, 0, 0] of archives that give none."""


Predict = Callable[[NDArray[np.uint8]], Outputs]
"""From images uint8 [N, 3, H, W], N any number but 0."""

CHUNK = 32  # pictures that the network takes at once
_loading = threading.Lock()


def load(
    path: Path, gpu: int | None, size: tuple[int, int], threads: int | None = None, callers: int = 1
) -> Predict:
    """A form of the network, ready for batches of any size.

    Args:
        path: a program (.pt2) or an IR (.xml); a GPU runs a program.
        gpu: its number, or None for the CPU.
        size: height and width of the images that will come.
        threads: of the CPU; by default one for each core.
        callers: threads that will call it at the same time, which share those of the CPU.
    """
    if gpu is not None:
        return in_chunks(load_compiled(path, f"cuda:{gpu}", size), CHUNK)
    if path.suffix == ".pt2":
        return in_chunks(load_program(path), CHUNK)
    return in_chunks(load_ir(path, size, threads, callers), CHUNK)


def in_chunks(predict: Predict, size: int) -> Predict:
    """Bounds the memory of a call, whatever the number of pictures."""

    def predict_all(images: NDArray[np.uint8]) -> Outputs:
        return joined([predict(images[i : i + size]) for i in range(0, len(images), size)])

    return predict_all


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of all parts as one, in their order."""
    return Outputs(*map(np.concatenate, zip(*parts, strict=True)))


def outputs(given: Sequence[Array]) -> Outputs:
    """Outputs from the arrays that a form gives; earlier archives give the first one or two."""
    count = len(given[0])
    absent = np.empty((count, 0), np.float32), np.empty((count, 0, 0, 0), np.float32)
    return Outputs(*given, *absent[len(given) - 1 :])


def load_program(path: Path) -> Predict:
    """The exported program as it is, in float32 on the CPU."""
    import torch

    network = torch.export.load(path).module()

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> Outputs:
        return from_torch(network(torch.tensor(images)))  # a picture's array may be read-only

    return predict


def from_torch(found: "Tensor | tuple[Tensor, ...]") -> Outputs:
    """Outputs from what a program gives, which in the earliest archives is no tuple."""
    tensors = found if isinstance(found, tuple) else (found,)
    return outputs([tensor.float().cpu().numpy() for tensor in tensors])


def load_compiled(path: Path, device: str, size: tuple[int, int], chunk: int = CHUNK) -> Predict:
    """The exported program in bf16 and channels-last, compiled and warmed for batches to `chunk`.

    One graph serves all sizes; only a batch of one would need its own, so it is doubled.
    """
    import torch

    network = torch.compile(on_device(torch.export.load(path), device), dynamic=True)

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> Outputs:
        batch = torch.tensor(images if len(images) > 1 else images.repeat(2, axis=0))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = from_torch(network(batch.to(device)))
        return Outputs(*(array[: len(images)] for array in found))

    for count in range(1, chunk + 1):
        predict(np.zeros((count, 3, *size), np.uint8))
    return predict


def on_device(program: "ExportedProgram", device: str) -> "nn.Module":
    """The program's network on a device and in channels-last; it was traced on the CPU, which its
    graph remembers in checks of its own."""
    import torch
    from torch.export.passes import move_to_device_pass

    network = move_to_device_pass(program, device).module()
    return network.to(memory_format=torch.channels_last)


@functools.cache
def core() -> Any:
    """The process's one OpenVINO core, which must never be freed.

    Its CPU plugin gives the thread a signal stack (openvino#11894) and takes it back in its
    destructor. A second core that is not freed in exactly the opposite order leaves the thread with
    one that is unmapped, and the next signal that Python should handle kills the process.
    """
    import openvino

    return openvino.Core()


def load_ir(
    path: Path, size: tuple[int, int], threads: int | None = None, callers: int = 1
) -> Predict:
    """The IR on so many threads, by default one for each core; each caller at the same time has a
    share of them to itself. It has run once, on an empty image of `size` (H, W).

    It computes in float32 wherever it is not in integers: bf16, which OpenVINO would take where
    there are instructions for it, was off by 44 % of the logits' spread on a network that is hardly
    trained, and answers would hang on the machine. Pinning is off: two workers would otherwise pin
    to the same core (measured: 31 instead of 55 images/s with two single-thread workers on two
    cores).
    """
    settings: dict[str, Any] = {"NUM_STREAMS": callers, "ENABLE_CPU_PINNING": False}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    # With the first array that it takes, OpenVINO's binding imports from numpy inside a C++ lock,
    # and whoever comes second waits for that lock with Python's held. Two threads whose first runs
    # met stopped for good: here none meet.
    with _loading:
        network = core().compile_model(path, "CPU", settings)
        network.create_infer_request().infer(np.zeros((1, 3, *size), np.uint8))
    own = threading.local()

    def predict(images: NDArray[np.uint8]) -> Outputs:
        if not hasattr(own, "request"):
            own.request = network.create_infer_request()
        return outputs(list(own.request.infer(images).values()))

    return predict
