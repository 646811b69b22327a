"""Modules that run in processes of their own and talk through a pipe."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Child:
    pipe: "Connection[Any, Any]"
    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def last_words(self) -> str:
        """Of a child that has ended: the last line of its output, or its exit code."""
        self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else str(self.process.returncode)


@contextmanager
def child(folder: Path, module: str, *arguments: str) -> Iterator[Child]:
    """Runs a module that is first looked for in a folder, until the block is left.

    Its last argument is the descriptor of its end of the pipe, which breaks when it ends.
    """
    ours, theirs = multiprocessing.Pipe()
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with ours, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(theirs.fileno())],
            cwd=folder,  # where -m looks first
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        theirs.close()
        try:
            yield Child(ours, process, said)
        finally:
            process.kill()
            process.wait()
