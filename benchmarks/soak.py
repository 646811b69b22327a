"""Claim: the service answers good, bad and slow clients for hours, and its memory does not grow.

    python -m benchmarks.soak                           (half an hour; makes an archive first)
    python -m benchmarks.soak --engine asgi --archive runs/RUN_ID/model/NAME.mar --seconds 120

Good clients send photographs and want the label that they got first. Bad ones send what is no
picture, a quarter of a gigapixel, and bodies with random errors, and want a status below 500. Slow
ones take seconds to send a photograph and want its label. Silent ones send half a head and go
away, or stay. Anybody may be told 503 with Retry-After. Every second the memory of all of the
service's processes is added up. The process ends with 1 where an answer was none of these, or
where memory grew by more than `--growth` MB from the end of the first quarter.
"""

import argparse
import http.client
import io
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil
from PIL import Image

from benchmarks import contenders, fuzz, record
from benchmarks.archive import make_archive
from benchmarks.serving import photographs

MB = 1e6
SIDE = 16_000  # of the picture that is too large to decode


@dataclass
class Seen:
    """What clients were told, and what no client should be told."""

    statuses: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, kind: str, status: int, fine: bool, what: object) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if not fine:
            self.unexpected.append(f"{kind}: {status} {what}"[:300])


Client = Callable[[SplitResult, list[bytes], Seen, random.Random], None]


def exchange(url: SplitResult, body: bytes, kind: str) -> tuple[int, dict[str, Any], bool]:
    """Status, answer, and whether it says when to come back; status 0 where there is no answer."""
    with closing(http.client.HTTPConnection(str(url.hostname), url.port, timeout=60)) as link:
        try:
            link.request("POST", url.path, body, {"Content-Type": kind})
            response = link.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return 0, {"error": repr(error)}, False
        return response.status, answer, "Retry-After" in response.headers


def good(url: SplitResult, files: list[bytes], seen: Seen, rng: random.Random) -> None:
    labels: dict[int, str] = {}
    while not seen.over.is_set():
        number = rng.randrange(len(files))
        status, answer, later = exchange(url, files[number], "image/jpeg")
        fine = status == 200 and labels.setdefault(number, answer["label"]) == answer["label"]
        seen.note("good", status, fine or (status == 503 and later), answer)


def bad(url: SplitResult, files: list[bytes], seen: Seen, rng: random.Random) -> None:
    huge = io.BytesIO()
    Image.new("1", (SIDE, SIDE)).save(huge, "PNG")
    never = [b"", b"no picture", files[0][:1000], huge.getvalue()]
    made = fuzz.bodies(files)
    while not seen.over.is_set():
        if rng.random() < 0.2:
            status, answer, later = exchange(url, rng.choice(never), "image/jpeg")
            fine = 400 <= status < 500
        else:
            _, kind, body = rng.choice(made)
            status, answer, later = exchange(url, fuzz.mutated(body, rng), kind)
            fine = status == 200 or 400 <= status < 500
        seen.note("bad", status, fine or (status == 503 and later), answer)
        seen.over.wait(0.02)


def slow(url: SplitResult, files: list[bytes], seen: Seen, rng: random.Random) -> None:
    while not seen.over.is_set():
        body = rng.choice(files)
        with closing(http.client.HTTPConnection(str(url.hostname), url.port, timeout=60)) as link:
            try:
                link.putrequest("POST", url.path)
                link.putheader("Content-Type", "image/jpeg")
                link.putheader("Content-Length", str(len(body)))
                link.endheaders()
                for start in range(0, len(body), len(body) // 10):
                    link.send(body[start : start + len(body) // 10])
                    time.sleep(rng.uniform(0.1, 0.3))
                response = link.getresponse()
                answer, later = json.loads(response.read()), "Retry-After" in response.headers
                fine = "label" in answer or (response.status == 503 and later)
                seen.note("slow", response.status, fine, answer)
            except (OSError, http.client.HTTPException, ValueError) as error:
                seen.note("slow", 0, False, repr(error))


def silent(url: SplitResult, files: list[bytes], seen: Seen, rng: random.Random) -> None:
    del files
    while not seen.over.is_set():
        links = []
        for _ in range(20):
            with suppress(OSError):
                link = socket.create_connection((url.hostname, url.port), timeout=10)
                link.sendall(f"POST {url.path} HTTP/1.1\r\nHost: x\r\nContent-Le".encode())
                links.append(link)
        seen.over.wait(rng.uniform(0, 10))
        for link in links:
            link.close()
        seen.statuses["silent, opened"] += len(links)


CLIENTS: list[Client] = [good, good, good, good, bad, bad, slow, slow, silent]


def memory(server: contenders.Server) -> dict[str, float]:
    """MB of each process of the service, by its number and name."""
    used = {}
    for process in server.tree():
        with suppress(psutil.NoSuchProcess):
            used[f"{process.pid} {process.name()}"] = process.memory_info().rss / MB
    return used


def growth(totals: list[float]) -> float:
    """From the end of the first quarter (medians of a tenth) to the end, in the units given."""
    tenth = max(1, len(totals) // 10)
    first = totals[len(totals) // 4 :][:tenth]
    return statistics.median(totals[-tenth:]) - statistics.median(first)


def slope(totals: list[float]) -> float:
    """MB an hour, by least squares, from the end of the first quarter on; a value is a second."""
    rest = totals[len(totals) // 4 :]
    return statistics.linear_regression(range(len(rest)), rest).slope * 3600


def soak(server: contenders.Server, seconds: float) -> tuple[Seen, list[dict[str, float]]]:
    url, files, seen = urlsplit(server.contender.url), photographs(), Seen()
    threads = [
        threading.Thread(target=client, args=(url, files, seen, random.Random(number)))
        for number, client in enumerate(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        time.sleep(1)
        samples.append(memory(server))
    seen.over.set()
    for thread in threads:
        thread.join()
    if server.process.poll() is not None:
        seen.unexpected.append("the service ended")
    return seen, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--engine", choices=("torchserve", "asgi"), default="torchserve")
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--growth", type=float, default=100, help="MB that are still fine.")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        archive = (options.archive or make_archive(Path(work))).resolve()
        make = contenders.asgi if options.engine == "asgi" else contenders.service
        (folder := Path(work) / "state").mkdir()
        server = contenders.Server(make(archive, folder), Path(work) / "log", photographs()[0])
        stack.callback(server.kill)
        seen, samples = soak(server, options.seconds)
    totals = [sum(sample.values()) for sample in samples]
    figures = {
        "engine": options.engine,
        "seconds": options.seconds,
        "answers": dict(sorted(seen.statuses.items())),
        "unexpected": seen.unexpected[:50],
        "memory_mb": {"first": samples[0], "last": samples[-1], "most": max(totals)},
        "growth_mb": growth(totals),
        "slope_mb_an_hour": slope(totals),
    }
    record.show(("answers", "n"), list(figures["answers"].items()))
    print("\n".join(seen.unexpected[:50]) or "no unexpected answer")
    print(f"memory: {totals[-1]:.0f} MB, {figures['growth_mb']:+.0f} MB since the first quarter")
    record.save(f"soak-{options.engine}", options.out, len(samples), figures)
    sys.exit(bool(seen.unexpected) or figures["growth_mb"] > options.growth)


if __name__ == "__main__":
    main()
