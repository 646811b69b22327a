"""Builds a GPU that is only said to be there, for a PyTorch with CUDA on a plain machine.

What runs on it shows code paths, graphs, and copies between host and device: never values, and
never speed.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
# The compiler's own header, which no wheel carries: declarations that gcc has no use for.
HOST_DEFINES = """
#define CUDARTAPI
#define CUDA_STDCALL
#define __CUDA_HOSTDEVICE__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __host__
#define __device__
#define __global__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __inline_hint__
#define __no_return__ __attribute__((noreturn))
#define __dv(v)
"""


class NotHereError(Exception):
    """What it takes is missing; says what."""


def build(folder: Path) -> dict[str, str]:
    """Compiles runtime and driver into `folder`; gives the environment that makes use of them.

    Raises:
        NotHereError: no gcc, or no headers of CUDA's runtime in PyTorch's wheels.
    """
    if shutil.which("gcc") is None:
        raise NotHereError("there is no gcc")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    headers = [p.parent for p in wheels.glob("*/include/cuda_runtime_api.h")]
    if not headers:
        raise NotHereError("PyTorch's wheels carry no headers of CUDA: it is a build without")
    (folder / "crt").mkdir(parents=True)
    (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    runtime = folder / "runtime.so"
    _compile(HERE / "runtime.c", runtime, f"-I{folder}", f"-I{headers[0]}")
    (folder / "driver.c").write_text(_driver((headers[0] / "cuda.h").read_text()))
    _compile(folder / "driver.c", folder / "libcuda.so.1")
    return {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder)}


def _driver(header: str) -> str:
    """A driver each of whose functions succeeds, and does nothing."""
    names = set(re.findall(r"CUDAAPI\s+(cu\w+)\s*\(", header))
    names |= {f"{name}{version}" for name in names for version in ("_v2", "_v3")}
    return "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))


def _compile(source: Path, library: Path, *options: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", "-O1", *options, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
