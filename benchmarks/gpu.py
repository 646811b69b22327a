"""Claim: on one H200, all 60,000 images of CIFAR-10, five epochs of three variants with evaluation
after each: at least 5,500 images/s in training and 22,000 in inference, the whole job in at most
100 s once code is compiled and 180 s the first time.

    python -m benchmarks.gpu --data FOLDER --weights FILE --config h200

FOLDER has train/<class>/ and test/<class>/, FILE the trunk's weights. The job runs as a user runs
it, in a process of its own, several times: not compiled; compiled for the first time (which also
fills the compiler's cache); compiled again from that cache. But for the wall time, all numbers come
from the run folders. The archive is left out: packing it is a CPU's work. The pictures are decoded
once, before the first run, in a job that trains nothing but the frozen variant; its own time is
given too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from jobs.runs import RunFolder

RUNS = {"eager": False, "compiled, first": True, "compiled, again": True}


def run(command: list[str], settings: list[str], folder: Path) -> float:
    """Wall seconds of a job in a process of its own."""
    where = ["--out", str(folder.parent), "--run-id", folder.name]
    changes = [part for setting in settings for part in ("--set", setting)]
    start = time.perf_counter()
    jobs = [sys.executable, "-m", "jobs", *command, *where, *changes]
    subprocess.run(jobs, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _read(folder: RunFolder) -> dict[str, Any]:
    rows = folder.metrics()
    result = json.loads((folder.path / "comparison.json").read_text())
    return {
        "data": result["data"]["source"],
        "images": result["data"]["images"],
        "weights": result["weights"],
        "device": json.loads((folder.path / "environment.json").read_text())[-1]["device"],
        "variants": {
            name: {
                "test_accuracy": variant["test"]["accuracy"],
                "training_seconds": variant["seconds"],
                "peak_memory_bytes": variant["peak_memory_bytes"],
                "training_images_per_second": _rates(rows, name, "train"),
                "scoring_images_per_second": _rates(rows, name, "validation"),
            }
            for name, variant in result["variants"].items()
        },
    }


def _rates(rows: list[dict[str, Any]], variant: str, split: str) -> list[float]:
    """By epoch; the first ones have the compiling in them."""
    wanted = [r for r in rows if (r["variant"], r["split"]) == (variant, split)]
    return [row["images_per_second"] for row in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--config", default="h200")
    parser.add_argument("--set", action="append", default=[], help="further settings of the job")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        settings = ["data.source=folder", f"data.root={options.data}", f"data.cache={work}/cache"]
        settings += [f"weights.source={options.weights}", "export.enabled=false", *options.set]
        config = ["--config", options.config]
        decoding = run(["train", "frozen", *config], settings, Path(work) / "decoding")
        found: dict[str, dict[str, Any]] = {}
        for name in options.runs:
            chosen = [*settings, f"runtime.compile={json.dumps(RUNS[name])}"]
            folder = Path(work) / name.replace(", ", "-")
            found[name] = {"wall_seconds": run(["run", *config], chosen, folder)}
            found[name] |= _read(RunFolder(folder))
    rows = [
        (
            name,
            f["wall_seconds"],
            median(v["training_images_per_second"]),
            median(v["scoring_images_per_second"]),
            f"{v['test_accuracy']:.2%}",
            variant,
        )
        for name, f in found.items()
        for variant, v in f["variants"].items()
    ]
    columns = ("run", "wall s", "training img/s", "scoring img/s", "test", "variant")
    record.show(columns, rows)
    record.save(
        "gpu", options.out, 1, {"config": options.config, "decoding": decoding, "runs": found}
    )


if __name__ == "__main__":
    main()
