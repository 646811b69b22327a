"""Claim: `--help` answers in half a second, and a finished run is left alone in a few.

    python -m benchmarks.start                     (some 2 minutes on 2 cores)

Each is the wall time of a whole process: importing the command line; `--help`; from the start of
`train scratch` on generated 75-pixel pictures to the checkpoint after its first step; `run` of a
run that is finished already.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml

from benchmarks import record

TINY = {
    "data": {"source": "generated", "train_images": 20, "test_images": 20, "input_size": 75},
    "weights": {"source": "random"},
    "optim": {"epochs": 1, "batch_size": 4, "aux_weight": 0.0},
    "variants": [{"name": "scratch", "init": "random"}],
    "runtime": {"checkpoint_every": 1},
    "export": {"enabled": False},
}
JOBS = (sys.executable, "-m", "jobs")


def seconds(command: tuple[str, ...]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def first_step(command: tuple[str, ...], checkpoint: Path) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    found = time.perf_counter() - start
    process.kill()
    process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "tiny.yaml"
        config.write_text(yaml.safe_dump(TINY))
        run = ("--config", str(config), "--out", work, "--run-id")
        subprocess.run((*JOBS, "run", *run, "done"), check=True, capture_output=True)

        def to_first_step(n: int) -> float:
            checkpoint = Path(work) / f"{n}" / "variants" / "scratch" / "last.ckpt"
            return first_step((*JOBS, "train", "scratch", *run, f"{n}"), checkpoint)

        measurements: dict[str, Callable[[int], float]] = {
            "import jobs.cli": lambda _: seconds((sys.executable, "-c", "import jobs.cli")),
            "--help": lambda _: seconds((*JOBS, "--help")),
            "first step": to_first_step,
            "finished run": lambda _: seconds((*JOBS, "run", *run, "done")),
        }
        found = {
            name: [measure(n) for n in range(options.rounds)]
            for name, measure in measurements.items()
        }
    record.show(
        ("", "median, s", "least", "most"),
        [(name, median(values), min(values), max(values)) for name, values in found.items()],
    )
    record.save("start", options.out, options.rounds, {"seconds": found})


if __name__ == "__main__":
    main()
