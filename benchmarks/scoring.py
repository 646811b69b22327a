"""`python -m serving score` against other ways to answer for the same pictures, in turns.

    python -m benchmarks.scoring --archive MODEL.mar --images 1000

`score` is the whole of it, from files to Parquet. `loop` calls a `Predictor` with one picture after
the other; `network` is the archive's network in one process for each core, its pictures decoded
before; `service` posts them to `python -m serving`, eight clients at a time. Memory is the peak of
a process that scores, over one that only opens the archive.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import contenders, load, record
from benchmarks.archive import make_archive
from benchmarks.serving import photographs
from serving import Predictor
from serving.archive import unpacked
from serving.processes import cores
from serving.scoring import score

OTHERS = ("network", "loop", "service")
CLIENTS = 8  # what the service's throughput needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, help="one that `jobs export` made")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", type=Path, help="score this folder, in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(scored(options.archive, options.worker)))
        return
    with tempfile.TemporaryDirectory() as work:
        archive = (options.archive or make_archive(Path(work))).resolve()
        figures = measure(archive, Path(work), options.images, options.rounds)
    record.show(("", "images/s"), list(figures["images_per_second"].items()))
    print({name: f"{ratio:.2f}" for name, ratio in figures["score_over"].items()})
    record.save("scoring", options.out, options.rounds, figures)


def measure(archive: Path, work: Path, images: int, rounds: int) -> dict[str, Any]:
    pictures = photographs()
    folder = work / "pictures"
    folder.mkdir()
    for index in range(images):
        (folder / f"{index:06}.jpg").write_bytes(pictures[index % len(pictures)])
    rates: dict[str, list[float]] = {name: [] for name in ("score", *OTHERS)}
    peaks = []
    with unpacked(archive) as files, serving(archive, work / "service", pictures[0]) as server:
        for _ in range(rounds):
            done = apart(archive, folder)
            rates["score"].append(images / done["seconds"])
            peaks.append(done["bytes_beyond"])
            seconds = done["seconds"] / 2
            rates["network"].append(load.run_raw(files, pictures, cores(), seconds, decoding=False))
            rates["loop"].append(looped(files, pictures, seconds))
            rates["service"].append(posted(server.contender, pictures, seconds))
    typical = {name: median(found) for name, found in rates.items()}
    return {
        "images": images,
        "images_per_second": typical,
        "all": rates,
        "score_over": {name: typical["score"] / typical[name] for name in OTHERS},
        "peak_bytes_beyond_the_archive": max(peaks),
    }


@contextmanager
def serving(archive: Path, folder: Path, picture: bytes) -> Iterator[contenders.Server]:
    folder.mkdir()
    server = contenders.Server(contenders.service(archive, folder), folder / "log", picture)
    try:
        yield server
    finally:
        server.kill()


def posted(service: contenders.Contender, pictures: list[bytes], seconds: float) -> float:
    answers = load.run_apart(load.send, service.url, service.kind, pictures, CLIENTS, seconds)
    return sum(answer.counts and answer.status == 200 for answer in answers) / seconds


def looped(files: Path, pictures: list[bytes], seconds: float) -> float:
    predictor = Predictor.open(files)
    predictor(pictures[0])
    start, count = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        predictor(pictures[count % len(pictures)])
        count += 1
    return count / (time.monotonic() - start)


def apart(archive: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scoring", "--archive", str(archive)]
    done = subprocess.run(
        [*command, "--worker", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return record.last_line(done.stdout)


def scored(archive: Path, folder: Path) -> dict[str, float]:
    threads = cores()
    predictor = Predictor.open(archive, threads=threads, callers=threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as out:
        seconds = score(predictor, str(folder), Path(out) / "answers", threads).seconds
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "bytes_beyond": beyond * 1024}


if __name__ == "__main__":
    main()
