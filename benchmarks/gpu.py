"""Claim: on one H200, all 60,000 images of CIFAR-10, five epochs of three variants with evaluation
after each: at least 5,500 images/s in training and 22,000 in inference, the whole job in at most
100 s once code is compiled and 180 s the first time.

    python -m benchmarks.gpu --data FOLDER --weights FILE --config h200
    python -m benchmarks.gpu --stages ceilings,eager-256,compiled-256,scoring --seconds 500

FOLDER has train/<class>/ and test/<class>/, FILE the trunk's weights. Each stage is a process of
its own, and the JSON is written anew after each: one that fails, or for which the seconds do not
suffice, is noted, and the next one begins. The job runs as a user runs it, the archive left out, as
packing it is a CPU's work: not compiled; compiled for the first time, which also fills the
compiler's cache; compiled again from that cache. But for the wall time, its numbers come from the
run folders. Pictures are decoded once, into a cache in the folder of `--work` that the next call
finds. `compiled-again-256` is `compiled-256` from the cache that this has left.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from jobs.runs import RunFolder

BATCHES = (128, 256, 512, 768)
JOBS = {"eager": False, "compiled": True, "compiled-again": True}
TRIALS = {"heuristics": 0, "three-trials": 3}  # of cuDNN's kernels, in steps that are not compiled
STAGES = (
    *("ceilings", "scoring", "checkpoint"),
    *(f"{form}-{batch}" for batch in BATCHES for form in JOBS),
    *(f"{choice}-256" for choice in TRIALS),
    *("decoding", *(f"{form}-job" for form in JOBS)),
)

Stage = Callable[[float], dict[str, Any]]
"""Measures within so many seconds."""


def attempt(stage: Stage, seconds: float) -> dict[str, Any]:
    """What a stage found, or why it found nothing."""
    if seconds <= 0:
        return {"failed": "no time was left"}
    try:
        return stage(seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or [str(error)]
        return {"failed": last[0]}


def stage_of(name: str, options: argparse.Namespace) -> Stage:
    if name.endswith("-job"):
        return functools.partial(_job, name.removesuffix("-job"), options)
    form, _, batch = name.rpartition("-")
    if not batch.isdigit():
        return functools.partial(_part, options, [name], None)
    arguments = ["steps", "--batch", batch]
    if form in TRIALS:
        return functools.partial(_part, options, [*arguments, "--trials", str(TRIALS[form])], None)
    arguments += ["--compiled"] * JOBS[form]
    cache = options.work / f"compiled-{batch}"
    if form == "compiled":
        shutil.rmtree(cache, ignore_errors=True)
    return functools.partial(_part, options, arguments, cache)


def _part(
    options: argparse.Namespace, arguments: list[str], cache: Path | None, seconds: float
) -> dict[str, Any]:
    settings = [part for setting in _settings(options) for part in ("--set", setting)]
    where = ["--config", options.config, *settings]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_parts",
        *arguments,
        *options.part.split(),
        *where,
    ]
    return record.last_line(_run(command, seconds, cache))


def _job(form: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    cache = options.work / "compiled-job"
    if form == "compiled":
        shutil.rmtree(cache, ignore_errors=True)
    changes = [*_settings(options), f"runtime.compile={json.dumps(JOBS[form])}"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "jobs", "run", "--config", options.config]
        command += ["--out", out, "--run-id", form]
        command += [part for change in changes for part in ("--set", change)]
        start = time.perf_counter()
        _run(command, seconds, cache)
        wall = time.perf_counter() - start
        return {"wall_seconds": wall, **_read(RunFolder(Path(out) / form))}


def _run(command: list[str], seconds: float, cache: Path | None) -> str:
    """The stdout of a process, with a compiler's cache of its own if it is given one."""
    environment = {**os.environ, **({"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {})}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=seconds, env=environment
    )
    return done.stdout


def _settings(options: argparse.Namespace) -> list[str]:
    given = {"data.cache": options.work / "cache", "weights.source": options.weights}
    if options.data:
        given |= {"data.source": "folder", "data.root": options.data}
    return [*(f"{k}={v}" for k, v in given.items()), "export.enabled=false", *options.set]


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
            if variant["status"] == "done"
        },
    }


def _rates(rows: list[dict[str, Any]], variant: str, split: str) -> list[float]:
    """By epoch; the first ones have the compiling in them."""
    wanted = [r for r in rows if (r["variant"], r["split"]) == (variant, split)]
    return [row["images_per_second"] for row in wanted]


def show(found: dict[str, dict[str, Any]]) -> None:
    failed = [(name, stage["failed"]) for name, stage in found.items() if "failed" in stage]
    parts = [
        (name, figure, value)
        for name, stage in found.items()
        for figure, value in stage.items()
        if isinstance(value, (int, float))
    ]
    variants = [
        (
            name,
            variant,
            median(figures["training_images_per_second"]),
            median(figures["scoring_images_per_second"]),
            f"{figures['test_accuracy']:.2%}",
        )
        for name, stage in found.items()
        for variant, figures in stage.get("variants", {}).items()
    ]
    record.show(("stage", "figure", ""), parts)
    record.show(("job", "variant", "training img/s", "scoring img/s", "test"), variants)
    record.show(("failed", "why"), failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a folder of pictures, in place of the configuration's data")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--config", default="h200")
    parser.add_argument("--set", action="append", default=[], help="further settings of the job")
    parser.add_argument("--stages", default=",".join(STAGES), help="of these, and in this order")
    parser.add_argument("--seconds", type=float, default=3600, help="for all of them together")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/inception-transfer-benchmark"))
    parser.add_argument("--part", default="", help="options of benchmarks.gpu_parts, in one string")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    options.work = options.work.expanduser().resolve()
    stages = options.stages.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    end = time.monotonic() + options.seconds
    found: dict[str, dict[str, Any]] = {}
    for name in stages:
        found[name] = attempt(stage_of(name, options), end - time.monotonic())
        record.save("gpu", options.out, 1, {"config": options.config, "stages": found})
    show(found)


if __name__ == "__main__":
    main()
