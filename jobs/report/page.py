"""PNG plots and one self-contained HTML page, made from the files of a run folder."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from jobs import results
from jobs.report import coverage, html, plots
from jobs.report.coverage import Coverage
from jobs.results import Comparison
from jobs.runs import ENVIRONMENT, RunFolder, read_arrays
from serving.explanations import overlay
from serving.files import write
from serving.messages import TOP, softmax
from serving.progress import duration

# Lecture 44 of IIT Kharagpur's deep-learning course: test accuracy after five epochs; all three
# networks together took 147 min 58 s on one GPU.
LECTURE = {"scratch": 0.8120, "finetune": 0.9411, "frozen": 0.7439}
LECTURE_SECONDS = 147 * 60 + 58
LAYERS = {"Conv2d_1a_3x3": "first convolution", "Conv2d_2a_3x3": "second convolution"}
DPI = 110


def write_report(folder: RunFolder) -> None:
    """Writes report/*.png and report/index.html; needs comparison.json and the variants' files."""
    comparison = folder.comparison()
    target = folder.path / "report"
    pictures: dict[str, str] = {}
    marks = {}
    covered = {name: coverage.read(folder.variant(name).path) for name in comparison.done}
    for name, figure in _figures(folder, comparison, covered):
        png = io.BytesIO()
        figure.savefig(png, dpi=DPI, format="png", metadata={"Software": None})
        write(target / f"{name}.png", png.getvalue())
        if name == "time" or name.endswith("curves"):
            marks[name] = plots.marks(figure)
        pictures[name] = html.data_uri(png.getvalue(), "png")
    write(target / "index.html", _page(folder, comparison, pictures, marks, covered))


def _figures(
    folder: RunFolder, comparison: Comparison, covered: Mapping[str, Coverage]
) -> Iterator[tuple[str, Figure]]:
    done = comparison.done
    if not done:
        return
    classes = plots.drawable(comparison.data.classes)
    worst = folder.path / "doubles.npz"
    if comparison.data.doubles:
        yield "doubles", plots.doubles(read_arrays(worst), classes)
    colours = plots.colours(list(comparison.variants))
    palette = {name: colour for name, colour in colours.items() if name in done}
    yield "cost", plots.accuracy_by_cost(done, palette)
    first_seed = folder.config().runtime.seeds[0]
    rows = [row for row in folder.metrics() if row["seed"] == first_seed]
    yield "curves", plots.curves(rows, palette)
    yield "time", plots.accuracy_by_time(rows, comparison.selected_on, palette)
    accuracies = {name: variant.test.per_class for name, variant in done.items()}
    yield "classes", plots.per_class(accuracies, classes, palette)
    yield "coverage", plots.accuracy_by_coverage(covered, palette)
    for name in done:
        yield f"{name}-curves", plots.curves(rows, {name: palette[name]})
        test, kernels = (
            read_arrays(folder.variant(name).path / f"{kept}.npz")
            for kept in ("test_predictions", "kernels")
        )
        predicted = test["logits"].argmax(1)
        yield f"{name}-confusion", plots.confusion(test["labels"], predicted, classes, name)
        for layer in LAYERS:
            yield f"{name}-{layer}", plots.kernels(kernels, layer)


def _answers(variant: Path, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of each kept picture the likeliest classes, the true one among them, and what spoke for the
    answer; none of a run from before there was such a file."""
    if not (variant / "examples.npz").is_file():
        return []
    kept, test = (read_arrays(variant / f"{n}.npz") for n in ("examples", "test_predictions"))
    found = []
    for row, pixels, class_map in zip(kept["rows"], kept["pixels"], kept["maps"], strict=True):
        logits, true = test["logits"][row], test["labels"][row]
        probabilities, likeliest = softmax(logits[None])[0], np.argsort(-logits, kind="stable")
        shown = dict.fromkeys([*likeliest[:TOP], true])  # once each, in this order
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        says_where = class_map.size > 1  # of smaller inputs it has one place
        one = {
            "row": row,
            "right": likeliest[0] == true,
            "true": classes[true],
            "top": [(classes[i], probabilities[i], i == true) for i in shown],
            "picture": html.picture_uri(picture),
            "lit": html.picture_uri(overlay(picture, class_map)) if says_where else None,
        }
        found.append(one)
    return found


def _money(seconds: float, price_per_hour: float) -> str:
    money = seconds / 3600 * price_per_hour
    return f"{money:,.2f}" if money >= 1 else f"{money:.2g}"


def _page(
    folder: RunFolder,
    comparison: Comparison,
    pictures: Mapping[str, str],
    marks: Mapping[str, list[tuple[float, float, str]]],
    covered: Mapping[str, Coverage],
) -> str:
    lecture = LECTURE if comparison.data.source == "CIFAR-10" else {}
    classes, config = comparison.data.classes, folder.config()
    drawn = plots.drawable(classes)
    return html.render(
        "page.html",
        comparison=comparison,
        data=comparison.data,
        variants=comparison.variants,
        pictures=pictures,
        marks=marks,
        covered=covered,
        answers={n: _answers(folder.variant(n).path, classes) for n in comparison.done},
        layers=LAYERS,
        coarse=max(comparison.data.image_size) < html.COARSE,
        palette=plots.colours(list(comparison.variants)),
        numbered={d: n for d, n in zip(drawn, classes, strict=True) if d != n},
        named=plots.NAMED,
        lecture=lecture,
        lecture_minutes=round(LECTURE_SECONDS / 60),
        architecture=results.read(folder.path / "architecture.json", results.ARCHITECTURE),
        environments=results.read(folder.path / ENVIRONMENT, results.STARTS),
        augmentations=[f"{v.name}: {config.augmentation(v)}" for v in config.variants],
        keep=config.evaluation.keep,
        price=config.runtime.price_per_hour,
        duration=duration,
        money=_money,
        config_yaml=(folder.path / "config.yaml").read_text(),
    )
