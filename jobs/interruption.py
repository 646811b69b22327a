"""Turns SIGTERM and SIGINT into a cooperative shutdown flag, checked between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.errors import Interrupted

_received: list[str] = []


def asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return bool(_received)


def interrupted() -> Interrupted:
    name = _received[0] if _received else "another process was asked to stop"
    return Interrupted(f"{name}: state saved, the same command resumes from there")


def check() -> None:
    """Raises :class:`Interrupted` once a signal has asked the job to stop."""
    if asked():
        raise interrupted()


@contextmanager
def graceful() -> Iterator[None]:
    """Lets the first signal end the work at the next :func:`check`; a second one kills at once.
    In other threads than the main one it does nothing, as signals go to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        _received.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
