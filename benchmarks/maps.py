"""Claim: class maps cost those who do not ask for them under 2 %, with ten classes.

    python -m benchmarks.maps                    (some 4 minutes on 2 cores)

The forms that a CPU runs, of an untrained network, as an export writes them and without their third
output, answer one picture after the other in turns, on one thread as a worker of the service does.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import record
from jobs import config
from jobs.data.dataset import load
from jobs.delivery import forms
from jobs.train import models
from serving import runtimes
from serving.archive import FILES, Form

FORMS: tuple[Form, ...] = ("float", "int8")
AT_ONCE = 10  # answers of one side before it is the other's turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--calibration", type=int, default=20, help="pictures, for int8's ranges")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    figures: dict[str, Any] = {"size": options.size, "classes": options.classes}
    with tempfile.TemporaryDirectory() as work:
        write(Path(work), options.size, options.classes, options.calibration)
        for form in FORMS:
            figures[form] = measure(Path(work) / FILES[form][0], options.size, options.rounds)
    columns = ("form", "ms with maps", "without", "ratio", "quarter", "three quarters")
    record.show(columns, [(form, *figures[form].values()) for form in FORMS])
    record.save("maps", options.out, options.rounds, figures)


def write(folder: Path, size: int, classes: int, calibration: int) -> None:
    settings = {"source": "generated", "input_size": size, "test_images": 20}
    data = config.Data.model_validate({**settings, "train_images": 2 * calibration})
    network = models.build(classes, aux=False)
    models.initialise(network, seed=0)
    network.to(memory_format=torch.contiguous_format)
    served = forms.Served(network, size, data.normalization).eval()
    with forms.written(served, load(data).train, calibration, folder):
        pass


def measure(file: Path, size: int, rounds: int) -> dict[str, float]:
    """Milliseconds a picture, medians of the rounds; of the rounds' ratios median and quartiles."""
    sides = {
        "with": runtimes.load_ir(file, (size, size), threads=1),
        "without": runtimes.load_ir(without_maps(file), (size, size), threads=1),
    }
    image = np.random.default_rng(0).integers(256, size=(1, 3, size, size), dtype=np.uint8)
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 0):
            start = time.perf_counter()
            for _ in range(AT_ONCE):
                sides[name](image)
            taken = (time.perf_counter() - start) / AT_ONCE * 1000
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
