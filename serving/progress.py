"""Progress output on stderr: bars on a terminal, plain lines in a log."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# The log of a continuous integration is none to draw in, though it may look like a terminal.
INTERACTIVE = False if os.environ.get("CI") else None  # None: as it looks
console = Console(stderr=True, highlight=False, force_interactive=INTERACTIVE)
above: list[RenderableType] = []  # what is drawn over the bar
Advance = Callable[[float], None]  # called with what is done since the last call
SECONDS_BETWEEN_LINES = 8
SHARE_THAT_TELLS = 0.05  # of a task; before it is done, the rate may be that of a slow start
_last_line = [0.0]  # when one was printed


def duration(seconds: float) -> str:
    """Rounded for people, the same everywhere."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(0, seconds):.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d"


def log(message: str) -> None:
    """Prints one line, above the bar when there is one."""
    _last_line[0] = time.perf_counter()
    console.print(message, soft_wrap=True, markup=False)


def note(message: str) -> None:
    """Prints a line if there was none for some seconds."""
    if time.perf_counter() >= _last_line[0] + SECONDS_BETWEEN_LINES:
        log(message)


def task(label: str, total: float, unit: str = "images") -> AbstractContextManager[Advance]:
    """Shows the progress towards `total`; the block calls the yielded function with increments."""
    return (_bar if console.is_interactive else _lines)(label, total, unit)


@contextmanager
def _bar(label: str, total: float, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with _Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=total, unit=unit, rate=0.0)

        def advance(count: float) -> None:
            done = progress.tasks[0].completed + count
            rate = done / (time.perf_counter() - start)
            progress.update(bar, advance=count, rate=rate)

        yield advance


class _Progress(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        yield from above
        yield from super().get_renderables()


@contextmanager
def _lines(label: str, total: float, unit: str) -> Iterator[Advance]:
    """A line every few seconds, whether there is progress or not: silence looks like a hang."""
    start = time.perf_counter()
    done = 0.0
    over = threading.Event()

    def advance(count: float) -> None:
        nonlocal done
        done += count
        note(line())

    def line() -> str:
        so_far = f"{label}: {done:.0f}/{total:.0f} {unit}"
        if done <= SHARE_THAT_TELLS * total:
            return so_far
        rate = done / (time.perf_counter() - start)
        return f"{so_far} · {rate:.1f}/s · {duration((total - done) / rate)} left"

    def keep_talking() -> None:
        while not over.wait(1):
            note(line())

    talking = threading.Thread(target=keep_talking, daemon=True)
    talking.start()
    try:
        yield advance
    finally:
        over.set()
        talking.join()
