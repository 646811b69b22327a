"""The report's figures; each function makes one matplotlib figure from a run's results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray

from jobs.report.coverage import Coverage
from jobs.results import Summary
from jobs.runs import Row

Array = NDArray[Any]

COLOURS = ("#3366cc", "#dc6a0f", "#2c8c4a", "#9a46b4", "#b8860b", "#008b9a")
STYLES = {"train": ":", "validation": "-", "test": "--"}
GREY = "#667"
NAMED = 40  # classes, at most, that a plot has room to name
LONGEST = 80  # characters of a name for which it has room
rcParams["text.parse_math"] = False  # class names may have dollars


def colours(names: Sequence[str]) -> dict[str, str]:
    """Every variant keeps its colour in all figures."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def drawable(classes: Sequence[str]) -> list[str]:
    """The names, with numbers in place of those that are too long for the plots, or have
    characters which the font has not."""
    font = get_font(findfont(FontProperties()))
    known = font.get_charmap()

    def fits(name: str) -> bool:
        return len(name) <= LONGEST and all(ord(character) in known for character in name)

    return [name if fits(name) else f"class {n}" for n, name in enumerate(classes)]


def curves(rows: Sequence[Row], palette: Mapping[str, str]) -> Figure:
    """Loss, auxiliary loss (where there is one) and accuracy by epoch, one colour a variant, one
    line style a split."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"loss": "loss", "aux_loss": "auxiliary loss", "accuracy": "accuracy, %"}
    if all(row["aux_loss"] is None for row in rows if row["variant"] in palette):
        del titles["aux_loss"]
    panels = figure.subplots(1, len(titles))
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for name, colour in palette.items():
            for split, style in STYLES.items():
                points = _points(rows, name, split, key)
                label = f"{name}, {split}" if len(palette) > 1 else split
                if points:
                    epochs, values = zip(*points, strict=True)
                    panel.plot(epochs, values, style, color=colour, label=label, marker=".")
        _finish(panel, title, "epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _points(rows: Sequence[Row], name: str, split: str, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of every epoch of the split; a test set scored but once is no curve."""
    found = [r for r in rows if r["variant"] == name and r["split"] == split]
    if split == "test" and len(found) == 1:
        return []
    scale = 100 if key == "accuracy" else 1
    return [(r["epoch"] + 1, r[key] * scale) for r in found if r[key] is not None]


def accuracy_by_time(rows: Sequence[Row], split: str, palette: Mapping[str, str]) -> Figure:
    """Accuracy on the selecting split against device-seconds of training."""
    figure, panel = _panel(7, 3.6)
    for name, colour in palette.items():
        found = [r for r in rows if r["variant"] == name and r["split"] == split]
        seconds, accuracies = [r["seconds"] for r in found], [r["accuracy"] * 100 for r in found]
        panel.plot(seconds, accuracies, color=colour, label=name, marker=".")
    _finish(panel, f"{split} accuracy, %", "seconds of training")
    panel.set_xlim(left=0)
    panel.legend(frameon=False)
    return figure


def accuracy_by_cost(done: Mapping[str, Summary], palette: Mapping[str, str]) -> Figure:
    """What each variant reached on the test set, with its interval, against its training time."""
    figure, panel = _panel(5.6, 3.4)
    for name, variant in done.items():
        accuracy, low, high = (
            100 * share
            for share in (variant.accuracy_mean, variant.accuracy_low, variant.accuracy_high)
        )
        reach = [[accuracy - low], [high - accuracy]]
        place = (variant.seconds, accuracy)
        panel.errorbar(*place, reach, fmt="o", color=palette[name], capsize=5, markersize=7)
        panel.annotate(
            f"{name}, {accuracy:.1f} %", place, (9, 3), textcoords="offset points", fontsize=9
        )
    _finish(panel, "test accuracy with its 95 % interval, %", "seconds of training")
    panel.set_xlim(0, 1.3 * max(variant.seconds for variant in done.values()))  # room for names
    return figure


def per_class(
    accuracies: Mapping[str, Sequence[float | None]],
    classes: Sequence[str],
    palette: Mapping[str, str],
) -> Figure:
    """Test accuracy of every class, the variants side by side; of many, of the worst."""
    figure, panel = _panel(11, 3.6)
    width = 0.8 / len(accuracies)
    values_VC = np.array(list(accuracies.values()), float) * 100  # None becomes NaN
    shown = np.sort(values_VC.mean(0).argsort(kind="stable")[:NAMED])
    classes = [classes[i] for i in shown]
    for i, (name, heights) in enumerate(zip(accuracies, values_VC[:, shown], strict=True)):
        places = np.arange(len(classes)) + (i - (len(accuracies) - 1) / 2) * width
        panel.bar(places, heights, width * 0.92, color=palette[name], label=name)
    panel.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
    _finish(panel, "test accuracy by class, %", "")
    panel.set_ylim(0, 100)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def accuracy_by_coverage(covered: Mapping[str, Coverage], palette: Mapping[str, str]) -> Figure:
    """Accuracy on the pictures that are answered against their share of the test set; a mark for
    each threshold."""
    figure, panel = _panel(7, 3.6)
    for name, one in covered.items():
        panel.plot(one.answered * 100, one.accuracy * 100, color=palette[name], label=name)
        for point in one.points:
            text, place = f"{point.threshold:.2f}", (point.answered * 100, point.right * 100)
            panel.plot(*place, "o", color=palette[name])
            panel.annotate(text, place, (3, 4), textcoords="offset points", fontsize=7)
    _finish(panel, "accuracy on the pictures that get an answer, %", "share of them, %")
    panel.set_xlim(0, 100)
    panel.legend(frameon=False)
    return figure


def confusion(labels: Array, predicted: Array, classes: Sequence[str], title: str) -> Figure:
    """True classes down, predictions across, shares of each true class; both int [N]."""
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, panel = _panel(6, 5.4)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                ink = "white" if share > 0.5 else "#223"
                text = str(counts[row, column])
                panel.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    if len(classes) <= NAMED:
        panel.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(classes)), classes, fontsize=8)
    panel.set_xlabel("predicted", color=GREY)
    panel.set_ylabel("true", color=GREY)
    panel.set_title(title, loc="left", fontsize=10)
    return figure


def kernels(arrays: Mapping[str, Array], layer: str) -> Figure:
    """A convolution before training, after, and the difference, on one scale for all three.

    The first layer's 3×3 kernels are shown in colour, as they look at red, green and blue; of the
    second, output channels go down and input channels across.
    """
    before, after = arrays[f"{layer}.before"], arrays[f"{layer}.after"]
    difference = after - before
    height = 2.2 if before.shape[1] == 3 else 4.0  # eight kernels in each of four rows, or a square
    figure = Figure(figsize=(11, height), layout="constrained")
    scale, largest = max(np.abs(before).max(), np.abs(after).max()), np.abs(difference).max()
    change = f"difference (largest change {largest:.2g})"
    if not largest:
        change, largest = "difference: exactly zero", 1.0
    for panel, title, weights, limit in zip(
        figure.subplots(1, 3),
        ("before", "after", change),
        (before, after, difference),
        (scale, scale, largest),
        strict=True,
    ):
        panel.imshow(_tiles(weights / limit), cmap="RdBu", vmin=-1, vmax=1)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_axis_off()
    return figure


def _tiles(kernels_OIHW: Array) -> Array:
    """Lays kernels out as one picture: 8 across in colour, or input against output channels."""
    outputs, inputs, height, width = kernels_OIHW.shape
    if inputs == 3:
        across = 8
        padded = np.pad((kernels_OIHW + 1) / 2, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=1)
        grid = padded.reshape(outputs // across, across, 3, height + 1, width + 1)
        grid = grid.transpose(0, 3, 1, 4, 2)
        return grid.reshape(outputs // across * (height + 1), across * (width + 1), 3)[:-1, :-1]
    return kernels_OIHW.transpose(0, 2, 1, 3).reshape(outputs * height, inputs * width)


def doubles(arrays: Mapping[str, Array], classes: Sequence[str]) -> Figure:
    """Pairs of pictures that are the same, the worst first: what it is, and both classes."""
    count, across = len(arrays["kinds"]), 4
    pixels = arrays["pixels"].reshape(count, 2, *arrays["pixels"].shape[1:])
    figure = Figure(figsize=(11, 1.75 * -(-count // across)), layout="constrained")
    panels = figure.subplots(-(-count // across), across, squeeze=False).flat
    for i, panel in enumerate(panels):
        panel.set_axis_off()
        if i < count:
            panel.imshow(np.concatenate(list(pixels[i]), 2).transpose(1, 2, 0))
            names = sorted({classes[label] for label in arrays["labels"][i]})
            title = f"{arrays['kinds'][i]}, {arrays['scores'][i]:.3f}\n{' and '.join(names)}"
            panel.set_title(title, fontsize=7)
    return figure


def marks(figure: Figure) -> list[tuple[float, float, str]]:
    """The points of all curves: how far they are from the left and the top, in per cent of the
    figure, and what they stand for."""
    figure.draw_without_rendering()  # only then is the layout known
    found = []
    for panel in figure.axes:
        title, x_label = panel.get_title(loc="left"), panel.get_xlabel()
        for line in panel.lines:
            points = np.asarray(line.get_xydata())
            places = figure.transFigure.inverted().transform(panel.transData.transform(points))
            for (x, y), (left, bottom) in zip(points, places * 100, strict=True):
                text = f"{line.get_label()}, {x_label} {x:.4g}: {title} {y:.4g}"
                found.append((left, 100 - bottom, text))
    return found


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, so many inches wide and high."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(panel: Axes, title: str, x_label: str) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x_label, color=GREY, fontsize=9)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8, colors=GREY)
