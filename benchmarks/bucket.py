"""Pictures from S3 against a plain boto3 loop, and against the same files on the disk, in turns.

    python -m benchmarks.bucket --pictures CIFAR10_FOLDER/train

The S3 server is SeaweedFS on the same cores. `loop` is boto3's `get_object`, one after the other,
into files; `threads` does that in ten threads, as many as `aws s3 sync` has; `mirror` is the local
copy of `data.root: s3://…`, from nothing; `decode` makes arrays of it; `disk` does the same with a
folder; `night` is a call that finds nothing new. Memory is the peak of a process that lists made-up
objects and takes them, without fetching, through all indexes to the arrays that training keeps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from jobs import config
from jobs.data import decoding, index, mirror, origins
from jobs.data.listing import in_folders
from jobs.demo import ObjectStore

BUCKET = "pictures"
KEYS = {"aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark-secret"}
CLASSES = ("a", "b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="JPEGs are taken from below this folder")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=1_000_000, help="of the made-up listing")
    parser.add_argument("--worker", type=int, help="list so many made-up objects, in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    os.environ |= {name.upper(): value for name, value in KEYS.items()}
    if options.worker:
        print(json.dumps(listed(options.worker)))
        return
    if not options.pictures:
        parser.error("--pictures is needed")
    figures = measure(options.pictures, options.count, options.rounds)
    record.show(("", "pictures/s"), list(figures["pictures_per_second"].items()))
    print({name: f"{ratio:.2f}" for name, ratio in figures["ratios"].items()})
    figures["listing"] = [apart(count) for count in (options.objects // 10, options.objects)]
    record.show(
        ("objects", "s", "MiB at most", "MiB before"),
        [[row[k] for k in ("objects", "seconds", "peak", "before")] for row in figures["listing"]],
    )
    record.save("bucket", options.out, options.rounds, figures)


def measure(pictures: Path, count: int, rounds: int) -> dict[str, Any]:
    files = sorted(pictures.rglob("*.jpg"))
    bodies = [file.read_bytes() for file in files[:: max(1, len(files) // count)][:count]]
    with tempfile.TemporaryDirectory() as work:
        store = ObjectStore(Path(work) / "s3", KEYS, BUCKET)
        store.start()
        try:
            fill(store, Path(work) / "folder", bodies)
            rates: dict[str, list[float]] = {}
            for number in range(rounds):
                for name, seconds in timed(store, Path(work), f"{number}").items():
                    rates.setdefault(name, []).append(len(bodies) / seconds)
        finally:
            store.kill()
    typical = {name: median(found) for name, found in rates.items()}
    pairs = (("mirror", "loop"), ("mirror", "threads"), ("mirror", "decode"), ("decode", "disk"))
    return {
        "pictures": len(bodies),
        "bytes": sum(map(len, bodies)),
        "pictures_per_second": typical,
        "all": rates,
        "ratios": {f"{a}/{b}": typical[a] / typical[b] for a, b in pairs},
    }


def fill(store: ObjectStore, folder: Path, bodies: list[bytes]) -> None:
    client = store.client()

    def put(entry: tuple[int, bytes]) -> None:
        number, body = entry
        key = f"train/{CLASSES[number % 2]}/{number:06}.jpg"
        client.put_object(Bucket=BUCKET, Key=key, Body=body)
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, enumerate(bodies)))


def timed(store: ObjectStore, work: Path, name: str) -> dict[str, float]:
    """Seconds of each way, in the same round."""
    client = store.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    target = work / f"plain-{name}"
    for label in CLASSES:
        (target / "train" / label).mkdir(parents=True)

    def get(key: str) -> None:
        (target / key).write_bytes(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def threads() -> None:
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(get, keys))

    s3 = config.S3(endpoint_url=store.address, region="us-east-1", path_style=True)
    here = config.Data(source="folder", root=str(work / "folder"), cache=str(work / f"d-{name}"))
    there = here.model_copy(
        update={"root": f"s3://{BUCKET}", "s3": s3, "cache": str(work / f"m-{name}")}
    )

    def copied() -> None:
        with mirror.refreshed(there):
            pass

    def decoded() -> None:
        with mirror.refreshed(there) as found:
            decoding.decoded(found, there)

    return {
        "loop": seconds(lambda: list(map(get, keys))),
        "threads": seconds(threads),
        "mirror": seconds(copied),
        "decode": seconds(decoded),
        "disk": seconds(lambda: decoding.decoded(in_folders(work / "folder"), here)),
        "night": seconds(decoded),
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def apart(count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bucket", "--worker", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return record.last_line(done.stdout)


def listed(count: int) -> dict[str, float]:
    """From the listing to the arrays that training keeps, of objects that nobody has."""

    def entries(self: origins.Bucket) -> Iterator[origins.Entry]:
        for number in range(count):
            key = f"train/{CLASSES[number % 2]}/a name of usual length {number:09}.jpg"
            yield origins.Entry(key, f'"{number:032x}"', 100_000)

    origins.Bucket.entries = entries  # type: ignore[assignment, method-assign]
    origins.Bucket.fetch = lambda *_: True  # type: ignore[method-assign]
    settings = config.Data(source="folder", root=f"s3://{BUCKET}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before, start = memory("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        settings = settings.model_copy(update={"cache": work})
        with (
            index.opened(Path(work) / "store", decoding.SCHEMA) as db,
            mirror.refreshed(settings) as found,
        ):
            decoding._note(db, found)
            with db:
                db.execute("UPDATE pictures SET row = 0, digest = randomblob(32)")
            rows = decoding._rows(db, "train", dict.fromkeys(CLASSES, 0))
            assert len(rows) == count
    taken = time.perf_counter() - start
    return {"objects": count, "seconds": taken, "peak": memory("VmHWM"), "before": before}


def memory(kind: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{kind}:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
