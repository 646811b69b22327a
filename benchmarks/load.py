"""What runs in processes of its own: clients, and the network without a server."""

import http.client
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Thread, local
from typing import NamedTuple
from urllib.parse import urlsplit

WARM_SECONDS = 1.0
TIMEOUT = 120.0
IN_FLIGHT = 200  # requests at a rate, at most
spawn = multiprocessing.get_context("spawn")


class Answer(NamedTuple):
    status: int
    seconds: float
    counts: bool
    """Whether it came after the warm-up and before the end."""


def send(
    url: str, kind: str, bodies: Sequence[bytes], clients: int, seconds: float
) -> list[Answer]:
    """Clients, each with a connection that it keeps, that send the next picture when they have
    the answer to the last; for WARM_SECONDS, which do not count, and then for `seconds`."""
    opens = time.monotonic() + WARM_SECONDS
    closes = opens + seconds
    answers: list[Answer] = []

    def client(number: int) -> None:
        with closing(connect(url)) as link:
            while (start := time.monotonic()) < closes:
                number += 1
                status = exchange(link, url, kind, bodies[number % len(bodies)])
                end = time.monotonic()
                answers.append(Answer(status, end - start, opens <= end <= closes))

    threads = [Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def send_at_rate(
    url: str, kind: str, bodies: Sequence[bytes], rate: float, seconds: float
) -> list[Answer]:
    """So many requests a second, whatever becomes of them: each is sent when its time has come, on
    a connection that is kept and free, and its answer's time is counted from then."""
    opens = time.monotonic() + WARM_SECONDS
    sent: list[Future[Answer]] = []
    kept = local()

    def request(number: int, due: float) -> Answer:
        if not hasattr(kept, "link"):
            kept.link = connect(url)
        status = exchange(kept.link, url, kind, bodies[number % len(bodies)])
        return Answer(status, time.monotonic() - due, due >= opens)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for number in range(int(rate * (WARM_SECONDS + seconds))):
            due = opens - WARM_SECONDS + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            sent.append(pool.submit(request, number, due))
        return [answer.result() for answer in sent]  # or the error of one that got none


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT)


def exchange(link: http.client.HTTPConnection, url: str, kind: str, body: bytes) -> int:
    """The status of the answer, which has been read."""
    link.request("POST", urlsplit(url).path, body, {"Content-Type": kind})
    response = link.getresponse()
    response.read()
    return response.status


def run_apart(of: Callable[..., list[Answer]], *arguments: object) -> list[Answer]:
    """One of these in a process that imports nothing heavy."""
    with spawn.Pool(1) as pool:
        return pool.apply(of, arguments)


def run_raw(
    folder: Path,
    pictures: Sequence[bytes],
    processes: int,
    seconds: float,
    *,
    decoding: bool,
) -> float:
    """Images per second of so many processes of one thread that start together."""
    barrier = spawn.Barrier(processes)
    with spawn.Pool(processes, initializer=_meet_at, initargs=(barrier,)) as pool:
        jobs = [(folder, pictures, seconds, decoding)] * processes
        return sum(pool.starmap(_run_network, jobs, chunksize=1))


_barrier: Barrier


def _meet_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - a barrier reaches a pool's processes only this way
    _barrier = barrier


def _run_network(folder: Path, pictures: Sequence[bytes], seconds: float, decoding: bool) -> float:
    """Images per second, one at a time, with the service's own code."""
    from serving import Predictor

    predictor = Predictor.open(folder, threads=1)
    pixels = [predictor.pixels(picture)[None] for picture in pictures]
    predictor.network(pixels[0])
    _barrier.wait()
    start, count = time.monotonic(), 0
    while (now := time.monotonic()) < start + seconds:
        which = count % len(pictures)
        predictor.network(predictor.pixels(pictures[which])[None] if decoding else pixels[which])
        count += 1
    return count / (now - start)
