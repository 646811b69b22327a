"""Claim: class maps cost those who do not ask for them under 2 % of what the network takes.

    python -m benchmarks.maps --archive MODEL.mar

The forms that a CPU runs, as they are in the archive and without their third output, answer one
picture after the other in turns, on one thread as a worker of the service does. Without `--archive`
one of 299 px and 10 classes is made first, in a few minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.archive import make_archive
from serving import archive, runtimes
from serving.archive import FILES, Form

ONE_BY_ONE = 10  # answers of one side before it is the other's turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, help="one that `jobs export` made")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as files:
        archive.unpack(options.archive or make_archive(Path(work)), Path(files))
        opened = archive.open_model(Path(files))
        of_a_cpu = [form for form in opened.description.forms if form != "program"]
        figures: dict[str, Any] = {}
        for form in of_a_cpu:
            figures[form] = measure(Path(files), form, options.rounds)
    columns = ("form", "ms with maps", "without", "ratio", "quarter", "three quarters")
    record.show(columns, [(form, *found.values()) for form, found in figures.items()])
    record.save("maps", options.out, options.rounds, figures)


def measure(files: Path, form: Form, rounds: int) -> dict[str, Any]:
    """Milliseconds a picture, medians of the rounds; of the rounds' ratios median and quartiles."""
    file = files / FILES[form][0]
    sides = {
        "with": runtimes.load_ir(file, threads=1),
        "without": runtimes.load_ir(without_maps(file), threads=1),
    }
    size = archive.open_model(files).description.data.image_size
    image = np.random.default_rng(0).integers(256, size=(1, 3, *size), dtype=np.uint8)
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 0):
            start = time.perf_counter()
            for _ in range(ONE_BY_ONE):
                sides[name](image)
            taken = (time.perf_counter() - start) / ONE_BY_ONE * 1000
            if number:  # the first round warms up
                milliseconds[name].append(taken)
    pairs = zip(milliseconds["with"], milliseconds["without"], strict=True)
    ratios = [one / other for one, other in pairs]
    low, high = np.quantile(ratios, [0.25, 0.75]).tolist()
    typical = {name: median(values) for name, values in milliseconds.items()}
    return {**typical, "ratio": median(ratios), "quarter": low, "three_quarters": high}


def without_maps(file: Path) -> Path:
    """The same network, its third output taken off."""
    import openvino

    model = runtimes.core().read_model(file)
    model.remove_result(model.get_results()[runtimes.Outputs._fields.index("maps")])
    target = file.with_name(f"{file.stem}-without-maps.xml")
    openvino.save_model(model, target, compress_to_fp16=False)
    return target


if __name__ == "__main__":
    main()
