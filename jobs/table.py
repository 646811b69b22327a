"""Tables that the commands print on standard output."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from serving.progress import INTERACTIVE

if TYPE_CHECKING:
    from jobs.delivery.pruning import Item
    from jobs.delivery.registry import Channel
    from jobs.results import Comparison, Diverged, Summary
    from jobs.watching import Progress
    from serving.archive import Version

NAME = 24  # characters of a variant's name, which are shown however narrow the terminal is
SPARED = ("memory", "trained", "img/s", "ECE")  # on a narrow terminal; the report has them


def show(comparison: "Comparison") -> None:
    """Prints the variants side by side, then what the comparison says in words."""
    console = output()
    console.print(f"data: {comparison.data.source}", markup=False)
    console.print(f"pretrained: {comparison.weights}", markup=False)
    balanced = ["balanced %"] * any(v.test.balanced for v in comparison.done.values())
    columns = ["test %", "95 %", *balanced, "loss", "ECE", "trained", "seconds", "img/s", "memory"]
    shown = _side_by_side(comparison, columns)
    shortened = max(0, max(map(len, comparison.variants)) - NAME)
    for column in SPARED:
        if console.measure(shown).maximum - shortened > console.width:
            columns.remove(column)
            shown = _side_by_side(comparison, columns)
    console.print(shown)
    for sentence in comparison.sentences:
        console.print(sentence, markup=False)


def _side_by_side(comparison: "Comparison", columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("variant")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, variant in comparison.variants.items():
        cells = _cells(variant)
        style = "bold" * (name == comparison.winner)
        table.add_row(name, *(cells.get(column, "") for column in columns), style=style)
    return table


def _cells(variant: "Summary | Diverged") -> dict[str, str]:
    if variant.status == "diverged":
        return {"test %": variant.status}
    accuracy = f"{variant.accuracy_mean * 100:.2f}"
    if variant.accuracy_spread is not None:
        accuracy += f" ± {variant.accuracy_spread * 100:.2f}"
    return {
        "test %": accuracy,
        "95 %": f"{variant.accuracy_low * 100:.1f}–{variant.accuracy_high * 100:.1f}",
        "balanced %": _balanced(variant),
        "loss": f"{variant.test.loss:.3f}",
        "ECE": f"{variant.test.calibration_error:.3f}",
        "trained": f"{variant.trainable_parameters:,}",
        "seconds": f"{variant.seconds:.0f}",
        "img/s": f"{variant.images_per_second:,.0f}",
        "memory": f"{variant.peak_memory_bytes / 2**30:.1f} GiB",
    }


def _balanced(variant: "Summary") -> str:
    """The first seed's, where the test set's classes differ in size."""
    balanced = variant.test.balanced
    if balanced is None:
        return ""
    share, low, high = (x * 100 for x in (balanced.value, balanced.low, balanced.high))
    return f"{share:.2f} ({low:.1f}–{high:.1f})"


def progress(parts: Sequence["Progress"]) -> Table:
    """How far each is; the seed is left out where all have the same."""
    table = Table(box=None, pad_edge=False)
    seeds = len({part.seed for part in parts}) > 1
    columns = ["variant", *["seed"] * seeds, "epoch", "loss", "accuracy %", "test %", "img/s"]
    for number, column in enumerate([*columns, "left"]):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for part in parts:
        table.add_row(
            part.variant,
            *[str(part.seed)] * seeds,
            f"{part.epoch}/{part.epochs}",
            _number(part.loss, ".3f"),
            _number(part.accuracy, ".2%").rstrip("%"),
            _number(part.test, ".2%").rstrip("%"),
            _number(part.images_per_second, ",.0f"),
            _left(part),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _left(part: "Progress") -> str:
    if part.diverged:
        return "diverged"
    if part.ends is None or part.epoch == part.epochs:
        return ""
    return _duration(datetime.fromisoformat(part.ends) - datetime.now(UTC))


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
    return _duration(datetime.now(UTC) - time)


def _duration(time: timedelta) -> str:
    seconds = time.total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
