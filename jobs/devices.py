"""The compute device: its precision, threads and reported properties."""

import ctypes
import gc
import importlib.util
import os
import platform
import resource
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from jobs import distributed
from jobs.config import Evaluation, Runtime, Variant
from jobs.errors import ConfigurationError, first_line
from serving.processes import cores
from serving.progress import log

# Training images from which compiling one graph for a GPU is worth its minute or so: an estimate,
# not yet measured. On a CPU it is not (see docs/performance.md).
COMPILING_PAYS = 200_000
# mallopt(3): no block is mapped by itself, and the heap's end is never given back.
_MMAP_MAX, _TRIM_THRESHOLD = (-4, 0), (-1, -1)


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype  # of convolutions and matrix products; weights stay float32
    compile: bool | Literal["auto"] = "auto"

    def autocast(self) -> AbstractContextManager[None]:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def compiles(self, variant: Variant, num_images: int) -> bool:
        """Whether a variant's training step is to be compiled.

        Args:
            num_images: how many are trained on with the same code, over epochs, variants and seeds.
        """
        if variant.cached:
            return False  # its trunk runs once, and the head is too small to benefit
        if self.compile != "auto":
            return self.compile
        return self.device.type == "cuda" and num_images >= COMPILING_PAYS

    def missing_to_compile(self) -> str | None:
        """What this machine lacks to compile the step, in a few words; None if nothing."""
        gpu = self.device.type == "cuda"
        given, *usual = ("CC", "gcc", "clang") if gpu else ("CXX", "g++", "clang++")
        if not any(shutil.which(name) for name in (os.environ.get(given), *usual) if name):
            return f"no {' or '.join(usual)}"
        if gpu and importlib.util.find_spec("triton") is None:
            return "no Triton"
        header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
        return _unfit_for_code() if header.is_file() else f"no {header}"

    def scored_at_once(self, evaluation: Evaluation) -> int:
        """How many images are scored in one batch."""
        if evaluation.batch_size != "auto":
            return evaluation.batch_size
        return 500 if self.device.type == "cuda" else 50

    def aside(self) -> AbstractContextManager[None]:
        """A context for another thread: what a GPU does in it runs beside the work that is queued
        from now on, and after what is queued already."""
        if self.device.type != "cuda":
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def start_measuring(self) -> None:
        """Resets the peak, once earlier networks are freed: compiled ones are reference cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: on a GPU since :meth:`start_measuring`, on a CPU of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def __str__(self) -> str:
        exact = self.device.type == "cuda" and self.dtype is torch.float32
        precision = str(self.dtype).removeprefix("torch.") + " without TF32" * exact
        return f"{name_of(self.device)} in {precision}"


def choose(runtime: Runtime) -> Device:
    """The configured device and precision; on a CPU, as many threads as there are cores, and
    freed memory stays with the process.

    Raises:
        ConfigurationError: a GPU was asked for and there is none, or there are fewer on this
            machine than processes.
    """
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("runtime.device: cuda asked for, but PyTorch sees no GPU")
    if kind == "cuda":
        device = _own_gpu()
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    set_threads()
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(kind) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Device(device, dtype, runtime.compile)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """
    Raises:
        ConfigurationError: the block takes more memory than the GPU has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"{what}: the GPU's memory is too small; smaller optim.batch_size or "
            f"evaluation.batch_size may fit ({first_line(error)})"
        ) from None


def keep_compiled(folder: Path) -> None:
    """Keeps compiled code in this folder for the next run, unless the environment names another.
    If it cannot be made, PyTorch's temporary folder stays.

    PyTorch names it after all that it depends on: its own version, CUDA's, Triton's, the GPU's.
    Importing its compiler sets the variable, too: to a temporary folder.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is None or given == default_cache_dir():
        try:  # where PyTorch's compiler is imported, it makes this folder
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log(f"compiled code is not kept for the next run: {error}")
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _unfit_for_code() -> str | None:
    """Why compiled code cannot be kept and run where it is to be, if anything is in the way."""
    try:
        folder = cache_dir()  # creates it
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    return f"{folder} is mounted noexec" if os.statvfs(folder).f_flag & os.ST_NOEXEC else None


def _own_gpu() -> torch.device:
    """This process's GPU: the n-th of the machine for the n-th process on it."""
    index, there = distributed.local_rank(), torch.cuda.device_count()
    if index >= there:
        raise ConfigurationError(
            f"--nproc-per-node {distributed.local_size()}: this machine has {there} GPUs"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    # So that float32 is float32: by default, cuDNN's convolutions use ten of its 23 bits (TF32).
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", index)


def set_threads() -> None:
    """One thread for each core of this process's share; alone, it heeds OMP_NUM_THREADS."""
    together = distributed.size() > 1  # torchrun sets the variable itself then, to 1
    if together or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // distributed.local_size()))


def keep_freed_memory() -> None:
    """Every training step takes the same large blocks again. glibc would give each back to the
    kernel in between, which then has to clear it anew, page by page (docs/performance.md)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # else it is not glibc
        for option in (_MMAP_MAX, _TRIM_THRESHOLD):
            libc.mallopt(*option)


def has_bf16(kind: str) -> bool:
    """Whether the hardware has instructions for bf16, rather than an emulation, and PyTorch may use
    them (ATEN_CPU_CAPABILITY)."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return allowed and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({cores()} cores)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
