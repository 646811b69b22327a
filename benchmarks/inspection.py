"""Claim: `python -m jobs inspect` finds nearly all doubles and leaks, and most wrong labels where
the features tell the classes apart.

    python -m benchmarks.inspection --data FOLDER --weights FILE      (some 15 minutes on 2 cores)

FOLDER has train/<class>/ and test/<class>/, such as CIFAR-10 as JPEG files of 32 pixels, FILE the
trunk's weights. A part of it is copied to `--work` with known faults: labels turned to another
class, doubles among the training pictures, training pictures made from test pictures, each
recompressed, shifted, or made lighter or darker; one double in four is in another class. The same
is done with handwritten digits, of which a network that has seen printed ones knows more than that
trunk does of CIFAR-10. Then all of FOLDER is searched for doubles, for the time it takes.

What is found and was not planted counts as wrong here, and may be right: CIFAR-10 has doubles of
its own (Barz and Denzler 2020). The pages in `--work` show them.
"""

import argparse
import csv
import io
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from jobs import config, inspection
from jobs.data import duplicates
from jobs.data.dataset import load
from jobs.data.sources import digits

WRONG = 0.03  # share of the training pictures that get another class
CHANGES = ("recompressed", "shifted", "brightness")
REACH = 3 / 32  # of the side, by which a picture is shifted at most

Faults = dict[str, set[str]]
"""Paths of the planted pictures: `labels`, `doubles` and `leaks`, and `moved`, those of the doubles
that are in another class and so have a wrong label, too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--work", type=Path, default=Path("build/inspection"))
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--doubles", type=int, default=200, help="… and as many leaks")
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    counts = {"train": options.train, "test": options.test}
    photos = chosen(options.data, counts)
    drawn = written(options.work / "digits-as-they-are")
    runs = {
        "CIFAR-10, JPEG copy": (photos, [f"weights.source={options.weights}", _size(options.size)]),
        "handwritten digits": (drawn, ["weights.source=stand-in", _size(75)]),
    }
    figures: dict[str, Any] = {}
    for name, (pictures, settings) in runs.items():
        root = options.work / name.partition(",")[0].replace(" ", "-")
        faults = plant(pictures, root / "data", min(options.doubles, len(pictures) // 20))
        settings += [f"data.root={root / 'data'}", f"data.cache={options.work / 'cache'}"]
        started = time.perf_counter()
        inspection.inspect(_config(settings), root / "page")
        seconds = time.perf_counter() - started
        found = judged(root / "page" / "findings.csv", faults)
        figures[name] = {"pictures": len(pictures), "seconds": seconds, "faults": found}
        rows = [(f"{name}: {kind}", *f.values()) for kind, f in found.items()]
        heads = ("fault", "planted", "found", "recall", "reported", "precision", "of the surest")
        record.show(heads, rows)
    figures["doubles of all pictures"] = timed(options.data, options.work / "cache")
    print(figures["doubles of all pictures"])
    record.save("inspection", options.out, 1, figures)


def _size(side: int) -> str:
    return f"data.input_size={side}"


def _config(settings: list[str]) -> config.Config:
    everything = ["data.source=folder", "data.train_images=null", "data.test_images=null"]
    return config.load("quickstart", [*everything, "data.validation=0.1", *settings])


def chosen(folder: Path, counts: dict[str, int]) -> list[Path]:
    """Files of each split, as many of each class as of any other, the first by name."""
    files = []
    for split, count in counts.items():
        classes = sorted((folder / split).iterdir())
        for place in classes:
            files += sorted(place.iterdir())[: count // len(classes)]
    return files


def written(folder: Path) -> list[Path]:
    """The digits of scikit-learn as PNG files, a third of them for the test."""
    pixels, labels = digits.handwritten()
    files = []
    for i, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        file = folder / ("train" if i % 3 else "test") / str(label) / f"{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
        files.append(file)
    return files


def plant(files: list[Path], root: Path, doubles: int) -> Faults:
    """Copies the files to `root`, with faults."""
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    train = [file for file in files if file.parts[-3] == "train"]
    test = [file for file in files if file.parts[-3] == "test"]
    classes = sorted({file.parts[-2] for file in files})
    order = rng.permutation(len(train))
    turned, doubled = np.split(order, [round(WRONG * len(train))])
    wrong = {train[i] for i in turned}
    faults: Faults = {"labels": set(), "doubles": set(), "leaks": set(), "moved": set()}
    for file in files:
        split, label = own = file.parts[-3:-1]
        if file in wrong:
            label = _another(label, classes, rng)
        path = f"{split}/{label}/{own[1]}-{file.name}"  # numbers may be the same in two classes
        faults["labels"] |= {path} if file in wrong else set()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / path)
    leaked = [test[i] for i in rng.choice(len(test), doubles, replace=False)]
    for i, file in enumerate([*(train[i] for i in doubled[:doubles]), *leaked]):
        label = file.parts[-2]
        if moved := i < doubles and i % 4 == 0:
            label = _another(label, classes, rng)
        path = f"train/{label}/x{i:03}-{CHANGES[i % 3]}.png"
        changed(Image.open(file).convert("RGB"), CHANGES[i % 3], rng).save(root / path)
        faults["doubles" if i < doubles else "leaks"].add(path)
        faults["moved"] |= {path} if moved else set()
    return faults


def _another(label: str, classes: list[str], rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in classes if name != label]))


def changed(picture: Image.Image, change: str, rng: np.random.Generator) -> Image.Image:
    if change == "recompressed":
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=50)
        return Image.open(file)
    pixels = np.asarray(picture)
    if change == "shifted":
        reach = max(1, round(REACH * len(pixels)))
        down, right = rng.integers(-reach, reach + 1, 2)
        edges = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        side = len(pixels)
        moved = edges[reach + down : reach + down + side, reach + right : reach + right + side]
        return Image.fromarray(moved)
    factor = rng.choice([rng.uniform(0.7, 0.85), rng.uniform(1.15, 1.3)])
    return Image.fromarray(np.clip(pixels * factor, 0, 255).astype(np.uint8))


def judged(file: Path, faults: Faults) -> dict[str, dict[str, float]]:
    """Of each kind of faults: how many were planted and found, and how many were reported."""
    reported: dict[str, list[str]] = {"labels": [], "doubles": [], "leaks": []}
    names = {"label": "labels", "leak": "leaks", "duplicate": "doubles", "conflict": "doubles"}
    copies = faults["doubles"] | faults["leaks"]
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["kind"] in names:  # of a pair, the copy may be either
                both = (row["path"], row["other"])
                path = next((p for p in both if p in copies), row["path"])
                reported[names[row["kind"]]].append(path)
    reported["doubles"] = [path for path in reported["doubles"] if path not in faults["leaks"]]
    return {
        "wrong labels": _counted(faults["labels"], reported["labels"], faults["moved"]),
        "doubles": _counted(faults["doubles"], reported["doubles"], set()),
        "leaks": _counted(faults["leaks"], reported["leaks"], set()),
    }


def _counted(planted: set[str], reported: list[str], also: set[str]) -> dict[str, float]:
    """Precision counts what was not planted as such and is one all the same as found; `surest` is
    that of the first ones, as many as there are."""
    unique = list(dict.fromkeys(reported))
    found, real = len(planted & set(unique)), planted | also
    right = [path in real for path in unique]
    return {
        "planted": len(planted),
        "found": found,
        "recall": found / max(1, len(planted)),
        "reported": len(unique),
        "precision": sum(right) / max(1, len(unique)),
        "surest": sum(right[: len(real)]) / max(1, min(len(real), len(unique))),
    }


def timed(folder: Path, cache: Path) -> dict[str, float]:
    """Seconds to search all pictures of a folder for doubles, once they are decoded."""
    settings = [f"data.root={folder}", f"data.cache={cache}"]
    dataset = load(_config(settings).data)
    started = time.perf_counter()
    small = duplicates.thumbnails(dataset)
    doubles = duplicates.among(dataset, small, torch.device("cpu"))
    return {
        "pictures": len(small),
        "seconds": time.perf_counter() - started,
        "findings": len(doubles.findings),
        "leaked test pictures": len(doubles.leaked),
    }


if __name__ == "__main__":
    main()
