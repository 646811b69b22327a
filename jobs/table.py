"""Tables that the commands print on standard output."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from serving.progress import INTERACTIVE, duration

if TYPE_CHECKING:
    from jobs.delivery.pruning import Item
    from jobs.delivery.registry import Channel
    from jobs.results import Comparison, Diverged, Summary
    from jobs.watching import Progress
    from serving.archive import Version

NAME = 24  # characters of a variant's name that are shown however narrow the terminal is
SPARED = ("memory", "trained", "img/s", "ECE")  # on a narrow one; the report has them


def show(comparison: "Comparison") -> None:
    """Prints the variants side by side, then what the comparison says in words."""
    console = output()
    console.print(f"data: {comparison.data.source}", markup=False)
    console.print(f"pretrained: {comparison.weights}", markup=False)
    table = Table(box=None, pad_edge=False)
    balanced = ["balanced %"] * any(v.test.balanced for v in comparison.done.values())
    columns = ["variant", "test %", "95 %", *balanced, "loss", "ECE", "trained", "seconds"]
    columns += ["img/s", "memory"]
    rows = [columns, *([name, *_cells(v)] for name, v in comparison.variants.items())]
    for spared in SPARED:
        if _width(rows) > console.width:
            number = columns.index(spared)
            for row in rows:
                del row[number : number + 1]  # one that has diverged is shorter
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows[1:]:
        table.add_row(*row, style="bold" * (row[0] == comparison.winner))
    console.print(table)
    for sentence in comparison.sentences:
        console.print(sentence, markup=False)


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes at least."""
    name, *others = (max(map(len, column)) for column in zip_longest(*rows, fillvalue=""))
    return min(name, NAME) + sum(2 + width for width in others)


def _cells(variant: "Summary | Diverged") -> list[str]:
    if variant.status == "diverged":
        return [variant.status]
    accuracy = f"{variant.accuracy_mean * 100:.2f}"
    if variant.accuracy_spread is not None:
        accuracy += f" ± {variant.accuracy_spread * 100:.2f}"
    return [
        accuracy,
        f"{variant.accuracy_low * 100:.1f}–{variant.accuracy_high * 100:.1f}",
        *_balanced(variant),
        f"{variant.test.loss:.3f}",
        f"{variant.test.calibration_error:.3f}",
        f"{variant.trainable_parameters:,}",
        f"{variant.seconds:.0f}",
        f"{variant.images_per_second:,.0f}",
        f"{variant.peak_memory_bytes / 2**30:.1f} GiB",
    ]


def _balanced(variant: "Summary") -> list[str]:
    """The first seed's, where the test set's classes differ in size."""
    balanced = variant.test.balanced
    if balanced is None:
        return []
    share, low, high = (x * 100 for x in (balanced.value, balanced.low, balanced.high))
    return [f"{share:.2f} ({low:.1f}–{high:.1f})"]


def progress(parts: Sequence["Progress"]) -> Table:
    """How far each variant with each seed is."""
    table = Table(box=None, pad_edge=False)
    columns = ("variant", "seed", "epoch", "loss", "accuracy %", "test %", "img/s", "left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for part in parts:
        table.add_row(
            part["variant"],
            str(part["seed"]),
            f"{part['epoch']}/{part['epochs']}",
            _number("{:.3f}", part["loss"]),
            _number("{:.2%}", part["accuracy"]).rstrip("%"),
            _number("{:.2%}", part["test"]).rstrip("%"),
            _number("{:,.0f}", part["images_per_second"]),
            _left(part),
        )
    return table


def _number(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _left(part: "Progress") -> str:
    if part["diverged"]:
        return "diverged"
    if part["ends"] is None or part["epoch"] == part["epochs"]:
        return ""
    return duration((datetime.fromisoformat(part["ends"]) - datetime.now(UTC)).total_seconds())


def show_models(versions: Sequence["Version"], channels: Mapping[str, "Channel"]) -> None:
    """Prints a model's versions, the newest first, and which channels point to each."""
    from serving.archive import ARCHIVE

    table = Table(box=None)
    for column in ("version", "variant", "test %", "images", "age", "MiB", "channel"):
        right = column in ("test %", "images", "age", "MiB")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for version in versions:
        model = version.description
        pointing = [name for name, at in channels.items() if at.version == model.version]
        table.add_row(
            model.version,
            model.variant,
            f"{model.test.accuracy * 100:.2f}" if model.test else "",
            f"{model.data.images.test:,}",
            _age(datetime.fromisoformat(version.time)),
            f"{version.files[ARCHIVE].size / 2**20:.1f}",
            ", ".join(pointing),
            style="bold" * bool(pointing),
        )
    output().print(table if versions else "no versions yet")


def show_pruned(items: Sequence["Item"], *, dry_run: bool) -> None:
    console = output()
    for item in items:
        console.print(f"{item.prefix}  {_age(item.modified)}  {item.size / 2**20:.1f} MiB")
    freed = sum(item.size for item in items) / 2**20
    would = "would be " * dry_run
    console.print(f"{len(items)} {would}deleted, {freed:.1f} MiB {would}freed")


def output() -> Console:
    console = Console(highlight=False, force_interactive=INTERACTIVE)
    if not console.is_terminal:
        console.width = 100
    return console


def _age(time: datetime) -> str:
    return duration((datetime.now(UTC) - time).total_seconds())
