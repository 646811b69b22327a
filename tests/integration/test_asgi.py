"""The engine in one process: its queue, its batches, and a batch that hangs."""

import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import urllib3
from conftest import free_port

from serving import asgi, supervisor
from serving.handler import Handler
from serving.settings import Settings


class Answering:
    """A handler that answers when it is told to, with what each request has sent."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.may, self.begun = threading.Event(), threading.Event()

    def handle(self, rows: list[dict[str, Any]], context: asgi.Context) -> list[dict[str, Any]]:
        self.batches.append([row["body"] for row in rows])
        self.begun.set()
        assert self.may.wait()
        for index, row in enumerate(rows):
            if row["body"] == b"bad":
                context.set_response_status(400, "bad_image", index)
                context.set_response_header(index, "X-Refusal", "bad_image")
        return [{"sent": row["body"].decode()} for row in rows]


@pytest.fixture
def handler() -> Answering:
    return Answering()


@dataclass
class Client:
    url: str

    def post(self, body: bytes, timeout: float | None = None) -> Any:
        return urllib3.request("POST", f"{self.url}/p", body=body, retries=False, timeout=timeout)

    def metrics(self) -> str:
        return urllib3.request("GET", f"{self.url}/metrics").data.decode()


@pytest.fixture
def delay() -> int:
    """Milliseconds."""
    return 200


@pytest.fixture
def client(
    handler: Answering, archive: Path, delay: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    """Of an engine with one thread, batches of two, and two that may wait."""
    monkeypatch.setattr(asgi, "SharingHandler", lambda *_: handler)
    settings = Settings(
        model_uri=str(archive), workers=1, batch_size=2, queue_size=2, batch_delay_ms=delay
    )
    port = free_port()
    server = asgi.server(asgi.Engine(archive, settings), port)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield Client(f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("delay", [60_000])  # a full batch waits for nothing
def test_requests_share_a_batch_and_each_gets_its_own_answer(
    client: Client, handler: Answering
) -> None:
    handler.may.set()
    got: dict[bytes, Any] = {}

    def send(body: bytes) -> None:
        got[body] = client.post(body)

    threads = [threading.Thread(target=send, args=[body]) for body in (b"good", b"bad")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(handler.batches[0]) == [b"bad", b"good"]
    assert got[b"good"].status == 200 and got[b"good"].json() == {"sent": "good"}
    assert got[b"bad"].status == 400 and got[b"bad"].headers["X-Refusal"] == "bad_image"
    metrics = client.metrics()
    assert "Requests2XX 1.0" in metrics and "Requests4XX 1.0" in metrics


def test_a_full_queue_is_told_at_once_and_nothing_that_waits_is_lost(
    client: Client, handler: Answering
) -> None:
    statuses: list[int] = []

    def send() -> None:
        statuses.append(client.post(b"x").status)

    first = threading.Thread(target=send)
    first.start()
    assert handler.begun.wait()
    rest = [threading.Thread(target=send) for _ in range(6)]
    for thread in rest:
        thread.start()
    while len(statuses) < 4:  # the batch holds one, the queue two
        rest[0].join(0.05)
    assert statuses == [503] * 4
    handler.may.set()
    for thread in [first, *rest]:
        thread.join()
    assert sorted(statuses) == [200] * 3 + [503] * 4


def test_nobody_works_for_a_client_that_has_left(client: Client, handler: Answering) -> None:
    first = threading.Thread(target=client.post, args=[b"first"])
    first.start()
    assert handler.begun.wait()
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        client.post(b"gone", timeout=0.5)
    last = threading.Thread(target=client.post, args=[b"last"])
    last.start()
    for _ in range(3):  # answers, so the engine has seen what was before
        client.metrics()
    handler.may.set()
    for thread in (first, last):
        thread.join()
    assert handler.batches == [[b"first"], [b"last"]]


def test_the_engine_never_closes_a_connection_that_the_gateway_would_use(
    client: Client, handler: Answering
) -> None:
    """By uvicorn's own 5 s it did, and a request that came at that moment was lost."""
    handler.may.set()
    with closing(http.client.HTTPConnection(urlsplit(client.url).netloc)) as link:
        # Where its connection was closed it fails, and opens no other.
        for pause in (6.0, 0.0):
            link.request("POST", "/p", b"x")
            assert link.getresponse().read() == b'{"sent":"x"}'
            time.sleep(pause)
    [idle] = re.findall(r"keepalive (\d+)s", (supervisor.GATEWAY / "Caddyfile").read_text())
    assert int(idle) < asgi.KEEP_SECONDS


def test_an_answer_that_is_no_json_is_an_error_and_the_thread_lives(
    client: Client, handler: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.may.set()
    with monkeypatch.context() as patch:
        patch.setattr(handler, "handle", lambda *_: [{"probability": float("nan")}])
        assert client.post(b"x").status == 500
    assert client.post(b"x").status == 200


def test_an_answer_that_is_no_json_costs_no_other_one(
    handler: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"probability": float("nan")}, {"id": "\ud800"}, {"probability": 0.5}]
    monkeypatch.setattr(handler, "handle", lambda *_: answers)
    batch = [asgi.Waiting(b"", {}) for _ in answers]
    responses = asgi.respond(cast(Handler, handler), batch)
    assert [one.status_code for one in responses] == [500, 500, 200]
    assert responses[-1].body == b'{"probability":0.5}'


def test_a_batch_that_hangs_ends_the_process() -> None:
    code = (
        "import time; from concurrent.futures import Future; from serving import asgi\n"
        "from serving.settings import Settings\n"
        "engine = object.__new__(asgi.Engine)\n"
        "engine.settings = Settings(model_uri='x', response_seconds=1, batch_size=1)\n"
        "import queue; engine.queue = queue.Queue(); engine.queue.put(asgi.Waiting(b'', {}))\n"
        "handler = type('H', (), {'handle': lambda *_: time.sleep(6000)})()\n"
        "engine._work(handler)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 1
    assert "a batch takes too long" in done.stderr
