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
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from conftest import MODEL, ROOT, free_port

FAST = {"SERVING_ENDPOINT_SECONDS": "1", "SERVING_WORKERS": "2"}


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

    def wait_until_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while get(f"{self.address}/readyz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
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
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)
    except OSError:
        return 0, Message(), {}


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start(archive: Path, folder: Path, user: int | None = None, **environment: str) -> Service:
    """Starts a service on free ports; `folder` is the only place it may write to."""
    folder.mkdir(parents=True)
    if user is not None:
        os.chown(folder, user, user)
    port, metrics = free_port(), free_port()
    variables = {**os.environ, **FAST, "MODEL_URI": str(archive), **environment}
    variables |= {"SERVING_PORT": str(port), "SERVING_METRICS_PORT": str(metrics)}
    variables |= {"SERVING_STATE_DIR": str(folder)}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving"],
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=file,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    return Service(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}", log)


def stop(service: Service) -> int:
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(60)
