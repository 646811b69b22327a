"""`python -m jobs` in processes of its own, which can be killed, stopped and told apart.

They are forked off one that has imported torch and the job already: to start Python and import
them takes seconds each time. That this works too is shown by tests/unit/test_usage.py.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = {"COLUMNS": "200", "NO_COLOR": "1"}
IMPORTED = [
    "jobs.pipeline",
    "jobs.table",
    "jobs.doctor",
    "jobs.delivery.promotion",
    "jobs.report.plots",
]
IMPORTED += ["serving.supervisor", "thin"]
IMPORTED += ["test_parts", "test_promotion", "test_storage"]  # which have functions to be run


def forked(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that will call a function in today's environment; it has the job imported."""
    return _context().Process(target=_call, args=({**os.environ}, function, arguments))


def _call(environment: dict[str, str], function: Callable[..., None], arguments: Any) -> None:
    from thin import stay_thin

    os.environ.clear()
    os.environ.update(environment)
    stay_thin()
    function(*arguments)


def _context() -> ForkServerContext:
    """The process to fork from is started once, and has no threads to lose."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(ROOT):
        for name, value in PLAIN.items():  # consoles are made at import
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # Python 3.11 looks nowhere else
        forkserver.ensure_running()
    return context


class Job:
    """A started `python -m jobs`, or another module; much like a Popen, its output in files."""

    def __init__(self, *arguments: str | Path, module: str = "jobs", **environment: str) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._folder = Path(tempfile.mkdtemp(prefix="job-"))
        self._files = self._folder / "out", self._folder / "err"
        self._whole: tuple[str, str] | None = None
        self.process = forked(_main, module, self.arguments, {**PLAIN, **environment}, *self._files)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end: what it wrote to both outputs."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.said()}"
        self._whole = self.said()
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._whole

    def said(self) -> tuple[str, str]:
        """What it has written so far."""
        if self._whole is not None:
            return self._whole
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err

    def wait_for(self, path: Path) -> None:
        """Returns as soon as a file exists, which the process is to write."""
        while not path.exists():
            assert self.poll() is None, self.said()
            time.sleep(0.01)


def _main(
    module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path
) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = [f"python -m {module}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


def called(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same command in this process, which has imported everything already: where neither its
    start nor its end is the point."""
    from jobs.__main__ import main  # not in the process that others are forked off: they run it

    out, err, code = io.StringIO(), io.StringIO(), 0
    command = ["python -m jobs", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLAIN.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def start_job(*arguments: str | Path, **environment: str) -> Job:
    return Job(*arguments, **environment)


def job(
    *arguments: str | Path, module: str = "jobs", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m jobs` to its end."""
    process = Job(*arguments, module=module, **environment)
    stdout, stderr = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, stdout, stderr)


def stop_when(path: Path, process: Job, number: signal.Signals) -> int:
    """Sends a signal as soon as a file exists; returns the exit code."""
    process.wait_for(path)
    process.send_signal(number)
    process.communicate()
    assert process.returncode is not None
    return process.returncode


@contextlib.contextmanager
def ended(processes: list[Job]) -> Iterator[list[Job]]:
    """Lets none of the processes outlive the block, whatever happens in it."""
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
