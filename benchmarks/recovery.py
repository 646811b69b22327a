"""Claim: whichever part of the service is killed, or told to stop, clients get answers again soon.

    python -m benchmarks.recovery                      (some 10 minutes; makes an archive first)
    python -m benchmarks.recovery --archive runs/RUN_ID/model/NAME.mar --engine asgi --times 3

Clients send one picture after another. After a random time a worker (of TorchServe, which starts
another), the engine or the gateway is killed with SIGKILL: then the service ends with 1, and is
started again at once, as its process manager would. A client of this package, which asks again,
has to get every answer. Last, a hundred clients send, and the service gets SIGTERM: whatever is in
flight has to be answered with 200. Recovery is the time from the kill to the first right answer to
a request that was sent after it. The process ends with 1 if an answer was none of 200 and 503, or
one that had to come did not.
"""

import argparse
import http.client
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from benchmarks import contenders, record
from benchmarks.archive import make_archive
from benchmarks.serving import photographs
from serving.client import Client, ClientError

CUT_OFF = 0  # in the place of a status: the connection ended without one
PARTS = {
    "torchserve": {"worker": "model_service_worker", "engine": "java", "gateway": "caddy"},
    "asgi": {"engine": "serving.asgi", "gateway": "caddy"},
}
CLIENTS, MANY = 8, 100
RETRIES = 8  # over a minute: a service that does not come back must not keep the client for hours
LONGEST = 120.0


class Answer(NamedTuple):
    sent: float
    came: float
    status: int


@dataclass
class Load:
    """What clients have got so far."""

    answers: list[Answer] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    """By the client that asks again."""

    def in_flight(self, moment: float) -> list[Answer]:
        return [a for a in self.answers if a.sent < moment < a.came]

    def first_after(self, moment: float) -> Answer | None:
        return next((a for a in self.answers if a.sent > moment and a.status == 200), None)


def send(url: str, picture: bytes) -> int:
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(parts.netloc, timeout=LONGEST)) as link:
        try:
            link.request("POST", parts.path, picture, {"Content-Type": "image/jpeg"})
            response = link.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return CUT_OFF


@contextmanager
def loaded(url: str, picture: bytes, clients: int, *, patient: bool) -> Iterator[Load]:
    """Clients that send until the block ends, one of which asks again if `patient`."""
    load, over = Load(), threading.Event()

    def client() -> None:
        while not over.is_set():
            sent = time.monotonic()
            status = send(url, picture)
            load.answers.append(Answer(sent, time.monotonic(), status))
            if status != 200:
                over.wait(0.05)  # what starts needs the cores that asking at once would take

    def ask_again() -> None:
        with Client(f"http://{urlsplit(url).netloc}", retries=RETRIES) as asking:
            while not over.is_set():
                try:
                    asking.predict(picture)
                except ClientError as error:
                    load.unanswered.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    threads += [threading.Thread(target=ask_again)] * patient
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        over.set()
        for thread in threads:
            thread.join()


@dataclass
class Found:
    """Of one part, over all the times that it was killed."""

    times: int = 0
    seconds: list[float] = field(default_factory=list)
    in_flight: Counter[int] = field(default_factory=Counter)
    """Requests that were under way at the moment of the kill, by how they ended."""
    wrong: list[str] = field(default_factory=list)

    def row(self, part: str) -> list[object]:
        took = (statistics.median(self.seconds), max(self.seconds)) if self.seconds else ("", "")
        flown = self.in_flight
        others = sum(flown.values()) - flown[200] - flown[503] - flown[CUT_OFF]
        return [part, self.times, flown[200], flown[503], flown[CUT_OFF], others, *took]


def processes(server: contenders.Server, name: str) -> list[psutil.Process]:
    return [p for p in server.tree() if any(name in word for word in p.cmdline()[:4])]


def kill(
    server: contenders.Server, part: str, name: str, log: Path, picture: bytes, found: Found
) -> contenders.Server:
    """Kills it under load; the service that then runs."""
    contender = server.contender
    with loaded(contender.url, picture, CLIENTS, patient=True) as load:
        time.sleep(random.uniform(1, 4))
        random.choice(processes(server, name)).kill()
        moment = time.monotonic()
        if part != "worker":
            if (code := server.process.wait(LONGEST)) != 1:
                found.wrong.append(f"{part}: the service ended with {code}")
            server = contenders.Server(contender, log, picture)
        while load.first_after(moment) is None and time.monotonic() < moment + LONGEST:
            time.sleep(0.02)
        time.sleep(1)
    note(part, load, moment, found)
    return server


def stop(server: contenders.Server, log: Path, picture: bytes, found: Found) -> contenders.Server:
    """The same with SIGTERM, which nothing that is in flight may notice."""
    with loaded(server.contender.url, picture, MANY, patient=False) as load:
        while len(load.answers) < 2 * MANY:
            time.sleep(0.05)
        server.process.terminate()
        moment = time.monotonic()
        code = server.process.wait(LONGEST)
    found.times += 1
    found.in_flight.update(answer.status for answer in load.in_flight(moment))
    if code != 0 or found.in_flight.keys() != {200}:
        found.wrong.append(f"SIGTERM: the service ended with {code}, {found.in_flight}")
    return contenders.Server(server.contender, log, picture)


def note(part: str, load: Load, moment: float, found: Found) -> None:
    found.times += 1
    found.in_flight.update(answer.status for answer in load.in_flight(moment))
    recovered = load.first_after(moment)
    found.seconds.append(recovered.came - moment if recovered else LONGEST)
    statuses = {answer.status for answer in load.answers}
    found.wrong += [f"{part}: {s}" for s in statuses - {200, 503, CUT_OFF}]
    found.wrong += [f"{part}: never again"] if recovered is None else []
    found.wrong += [f"{part}: the client that asks again: {error}" for error in load.unanswered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="That each part is killed.")
    parser.add_argument("--stops", type=int, default=3, help="SIGTERMs.")
    parser.add_argument("--engine", choices=tuple(PARTS), default="torchserve")
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    random.seed(0)
    parts, picture = PARTS[options.engine], photographs()[0]
    found = {part: Found() for part in (*parts, "SIGTERM")}
    with tempfile.TemporaryDirectory() as work:
        archive = (options.archive or make_archive(Path(work))).resolve()
        make = contenders.asgi if options.engine == "asgi" else contenders.service
        (folder := Path(work) / "state").mkdir()
        log = Path(work) / "log"
        server = contenders.Server(make(archive, folder), log, picture)
        try:
            for part in list(parts) * options.times:
                server = kill(server, part, parts[part], log, picture, found[part])
            for _ in range(options.stops):
                server = stop(server, log, picture, found["SIGTERM"])
        finally:
            server.kill()
            figures = {part: vars(one) for part, one in found.items()}
            record.save(f"recovery-{options.engine}", options.out, options.times, figures)
    heads = ("killed", "times", "in flight: 200", "503", "cut off", "other", "recovery s", "most s")
    record.show(heads, [one.row(part) for part, one in found.items()])
    wrong = [line for one in found.values() for line in one.wrong]
    print("\n".join(wrong[:50]) or "nothing was wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
