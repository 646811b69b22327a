"""A folder of the cache with an index in SQLite, held by one process at a time."""

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from jobs import locks
from jobs.errors import UnavailableError

PAGE = 1000  # entries between two commits, and in memory at once


@contextmanager
def opened(folder: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """The folder's index, while no other process has it; waits for one that does.

    What was not committed when a process was killed is gone, and the rest is there.

    Raises:
        UnavailableError: the index is damaged, or the disk is full.
    """
    file = folder / "index.sqlite"
    with locks.held(folder / ".lock", f"{folder}: waiting for another process that fills it"):
        try:
            with closing(sqlite3.connect(file)) as db:
                db.executescript(schema)
                yield db
        except sqlite3.DatabaseError as error:
            # Errors of Python's own module have no code.
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise UnavailableError(f"{file}: {os.strerror(errno.ENOSPC)}") from None
            raise UnavailableError(f"{file}: {error}; {folder} may be deleted") from None


class Held:
    """A file that no process removes as long as any holds it; see :func:`remove`."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            FileNotFoundError: it is gone.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        if not os.fstat(self._descriptor).st_nlink:
            raise FileNotFoundError(path)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def remove(path: Path) -> bool:
    """Removes a file unless it is held; whether it has."""
    with path.open("rb") as file:
        free = locks.try_lock(file.fileno())
        if free:
            path.unlink()
        return free


def pages(db: sqlite3.Connection, query: str) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a query in pages, sorted by their first column, a unique text. Each page is asked
    for only after the caller is done with the one before, and sees what it has written.

    Args:
        query: with a condition that ends in `> ?`, on that column.
    """
    last = ""
    while rows := db.execute(f"{query} ORDER BY 1 LIMIT {PAGE}", (last,)).fetchall():
        yield rows
        last = rows[-1][0]
