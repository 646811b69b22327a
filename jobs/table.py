"""The closing table, on standard output."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(comparison: dict[str, Any]) -> None:
    """Prints the variants side by side, then what the comparison says in words."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    data = comparison["data"]
    table = Table(
        title=f"{data['source']} · {comparison['weights']}", title_justify="left", box=None
    )
    columns = ("variant", "test %", "95 %", "loss", "ECE", "trained", "seconds", "img/s", "memory")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for name, variant in comparison["variants"].items():
        table.add_row(name, *_cells(variant), style="bold" * (name == comparison["winner"]))
    console.print(table)
    for sentence in comparison["sentences"]:
        console.print(sentence, markup=False)


def _cells(variant: dict[str, Any]) -> list[str]:
    if variant["status"] != "done":
        return [variant["status"]]
    test = variant["test"]
    accuracy = f"{variant['accuracy_mean'] * 100:.2f}"
    if variant["accuracy_spread"] is not None:
        accuracy += f" ± {variant['accuracy_spread'] * 100:.2f}"
    return [
        accuracy,
        f"{test['accuracy_low'] * 100:.1f}–{test['accuracy_high'] * 100:.1f}",
        f"{test['loss']:.3f}",
        f"{test['calibration_error']:.3f}",
        f"{variant['trainable_parameters']:,}",
        f"{variant['seconds']:.0f}",
        f"{variant['images_per_second']:,.0f}",
        f"{variant['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]
