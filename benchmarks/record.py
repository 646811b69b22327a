"""What a measurement leaves behind: a table for people, and a JSON with what it was made on."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs import environment
from jobs.config import Runtime
from jobs.devices import choose
from jobs.runs import now, write_json

RESULTS = Path(__file__).parent / "results"


def save(name: str, folder: Path, n: int, figures: dict[str, Any]) -> None:
    """Writes `folder`/`name`.json: the figures, how often they were taken, machine and versions."""
    made_on = environment.describe(choose(Runtime()))
    options = [Path(o).name if Path(o).is_absolute() else o for o in sys.argv[1:]]  # whose disk?
    made_on["command"] = [f"python -m benchmarks.{Path(sys.argv[0]).stem}", *options]
    write_json(folder / f"{name}.json", {"time": now(), "n": n, **figures, "made_on": made_on})


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row))
    Console().print(table)


def last_line(stdout: str) -> dict[str, Any]:
    """What a child process measured: JSON in the last line that it printed."""
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return result
