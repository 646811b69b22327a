"""Files that stand for something which one process does at a time."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import interruption
from serving.progress import note

SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def held(file: Path, waiting: str) -> Iterator[None]:
    """Holds a file, after whoever holds it; a killed process holds nothing.

    Args:
        waiting: what the log says meanwhile.

    Raises:
        Interrupted: a signal asked this process to stop.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        while not try_lock(lock.fileno()):
            note(waiting)
            interruption.check()
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield


def try_lock(descriptor: int) -> bool:
    """Whether an open file is held from now on, and by this descriptor alone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
