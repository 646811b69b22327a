"""The device that computes, its precision, and what it reports of itself."""

import os
import platform
import resource
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.config import Runtime
from jobs.errors import ConfigurationError


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype  # of convolutions and matrix products; weights stay float32

    def autocast(self) -> AbstractContextManager[None]:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def start_measuring(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: on a GPU since :meth:`start_measuring`, on a CPU of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def __str__(self) -> str:
        return f"{name_of(self.device)} in {str(self.dtype).removeprefix('torch.')}"


def choose(runtime: Runtime) -> Device:
    """The configured device and precision.

    Raises:
        ConfigurationError: a GPU was asked for and there is none.
    """
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("runtime.device: cuda asked for, but PyTorch sees no GPU")
    if kind == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(kind) else "fp32"
    return Device(torch.device(kind), torch.bfloat16 if precision == "bf16" else torch.float32)


def has_bf16(kind: str) -> bool:
    """Whether the hardware has instructions for bf16, rather than an emulation."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({len(os.sched_getaffinity(0))} cores)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
