"""A service as it runs, for tests: supervisor, TorchServe and Caddy, over HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from conftest import MODEL, ROOT, free_port

LONGEST = 600  # seconds that an answer may take on a busy machine
ENGINES = ("torchserve", "asgi")
FAST = {"SERVING_ENDPOINT_SECONDS": "1", "SERVING_WORKERS": "1"}  # a second takes 5 s to start


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    address: str
    metrics: str
    log: Path

    def events(self) -> list[dict[str, Any]]:
        """What the supervisor has said so far."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if '"logger": "supervisor"' in line]

    def wait_until_ready(self) -> None:
        while get(f"{self.address}/readyz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def predict(self, body: bytes, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
        return get(f"{self.address}/predictions/{MODEL}", body, kind)


def get(url: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
    """Status and JSON; status 0 where there was no answer at all."""
    status, _, answer = exchange(url, body, {"Content-Type": kind})
    return status, answer


def exchange(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Message, dict[str, Any]]:
    """Status, headers and JSON of an answer; status 0 where there was none."""
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=LONGEST) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)
    except OSError:
        return 0, Message(), {}


@contextmanager
def load(service: Service, picture: bytes, label: str, clients: int) -> Iterator[Counter[int]]:
    """Clients that send one picture after the other; the statuses they got, counted as they come.

    Every 200 has the right label, and every 503 says when to come back.
    """
    statuses: Counter[int] = Counter()
    stopped = threading.Event()
    url = f"{service.address}/predictions/{MODEL}"

    def client() -> None:
        while not stopped.is_set():
            status, headers, answer = exchange(url, picture, {"Content-Type": "image/png"})
            statuses[status] += 1
            assert status != 200 or answer["label"] == label
            assert status != 503 or (headers["Retry-After"] == "1" and answer["error"]["code"])

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


LEAK = """
import os, sys, threading, time
kept = []
def leak():
    while not os.path.exists({go!r}):  # or a slow start would have leaked it all
        time.sleep(0.1)
    while True:
        kept.append(bytearray(b"x") * {megabytes}_00_000)
        time.sleep(0.1)
if "serving.asgi" in sys.orig_argv:
    threading.Thread(target=leak, daemon=True).start()
"""


def leaking(folder: Path, megabytes: int) -> dict[str, str]:
    """An environment in which the engine `asgi` keeps so much more each second, once there is a
    file `go` in that folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        LEAK.format(megabytes=megabytes, go=str(folder / "go"))
    )
    return {"PYTHONPATH": str(folder)}


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start(
    archive: Path, folder: Path, *, prefix: Sequence[str] = (), **environment: str
) -> Service:
    """Starts a service on free ports; `folder` is the only place it may write to.

    `prefix` is a command that runs it, in a namespace of its own for example.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, metrics = free_port(), free_port()
    variables = {**os.environ, **FAST, "MODEL_URI": str(archive), **environment}
    variables |= {"SERVING_PORT": str(port), "SERVING_METRICS_PORT": str(metrics)}
    variables |= {"SERVING_STATE_DIR": str(folder)}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "serving"],
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=file,
        )
    return Service(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}", log)


@contextmanager
def running(
    archive: Path, folder: Path, *, prefix: Sequence[str] = (), **environment: str
) -> Iterator[Service]:
    """A service that is ready, and is stopped in the end if the test has not done so."""
    service = start(archive, folder, prefix=prefix, **environment)
    try:
        service.wait_until_ready()
        yield service
    finally:
        code = stop(service) if service.process.poll() is None else 0
    assert code == 0


def stop(service: Service) -> int:
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait()
