"""The client against servers that misbehave."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from conftest import ROOT

from serving.client import Client, ClientError, Model, Prediction, Score

ANSWER = {
    "label": "cat",
    "probability": 0.9,
    "top": [{"label": "cat", "probability": 0.9}],
    "model": {"name": "m", "version": "1"},
}
PREDICTION = Prediction("cat", 0.9, (Score("cat", 0.9),), Model("m", "1"))

Reply = Callable[[BaseHTTPRequestHandler], None]


def answers(status: int, body: object, **headers: str) -> Reply:
    def reply(request: BaseHTTPRequestHandler) -> None:
        data = json.dumps(body).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return reply


def cuts(request: BaseHTTPRequestHandler) -> None:
    """Closes without a word."""
    request.close_connection = True


def cuts_inside(request: BaseHTTPRequestHandler) -> None:
    """Closes in the middle of the answer."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"{")
    request.close_connection = True


def stalls(request: BaseHTTPRequestHandler) -> None:
    time.sleep(1)
    answers(200, ANSWER)(request)


FINE = answers(200, ANSWER)
FULL = answers(503, {"error": {"code": "http_503", "message": "full"}}, Retry_After="1")


class Request(NamedTuple):
    path: str
    key: str | None
    sender: tuple[str, int]


@contextmanager
def server(*replies: Reply) -> Iterator[tuple[str, list[Request]]]:
    """Gives the replies one after the other, the last one for ever; notes the requests."""
    seen: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(Request(self.path, self.headers["Authorization"], self.client_address))
            replies[min(len(seen), len(replies)) - 1](self)

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has left is what some of these tests are about."""

    listener = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", seen
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@pytest.mark.parametrize(
    "trouble",
    [
        [FULL],
        [answers(429, {}), answers(502, "no object")],
        [cuts],
        [cuts_inside],
        [cuts, cuts_inside],
    ],
    ids=["503", "429 and 502", "a cut connection", "a cut answer", "both"],
)
def test_what_may_pass_is_asked_again(trouble: Sequence[Reply]) -> None:
    with server(*trouble, FINE) as (url, seen), closing(Client(url, model="m")) as client:
        assert client.predict(b"x") == PREDICTION
        assert len(seen) == len(trouble) + 1


def test_it_waits_as_long_as_it_is_told() -> None:
    with server(FULL, FINE) as (url, _), closing(Client(url, model="m")) as client:
        start = time.monotonic()
        client.predict(b"x")
        assert time.monotonic() - start >= 1


def test_it_waits_longer_each_time_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("serving.client.time.sleep", waits.append)
    with (
        server(answers(503, {})) as (url, _),
        closing(Client(url, model="m")) as client,
        pytest.raises(ClientError, match="Unavailable"),
    ):
        client.predict(b"x")
    assert sum(waits) >= 7.5, "longer than a service takes to come back: docs/reliability.md"
    waits.clear()
    with (
        server(FULL) as (url, _),
        closing(Client(url, model="m", retries=8)) as client,
        pytest.raises(ClientError, match="full"),
    ):
        client.predict(b"x")
    least = [1, 1, 1, 2, 4, 8, 16, 32]
    assert all(wait >= seconds for wait, seconds in zip(waits, least, strict=True)), waits


@pytest.mark.parametrize("status", [400, 401, 404, 405, 413, 415, 500])
def test_a_refusal_is_final(status: int) -> None:
    failure = answers(status, {"error": {"code": "no", "message": "because"}}, Retry_After="1")
    with server(failure, FINE) as (url, seen), closing(Client(url, model="m")) as client:
        with pytest.raises(ClientError, match="because") as caught:
            client.predict(b"x")
        assert (caught.value.status, caught.value.code) == (status, "no")
        assert caught.value.unavailable == (status == 500)
        assert len(seen) == 1


def test_patience_ends() -> None:
    full = answers(503, {})
    with server(full) as (url, seen), closing(Client(url, model="m", retries=1)) as client:
        with pytest.raises(ClientError, match="Service Unavailable") as caught:
            client.predict(b"x")
        assert (caught.value.status, caught.value.code) == (503, "http_503")
        assert caught.value.unavailable and len(seen) == 2


def test_a_timeout_is_not_repeated() -> None:
    with server(stalls) as (url, seen), closing(Client(url, model="m", timeout=0.2)) as client:
        with pytest.raises(ClientError, match="timed out") as caught:
            client.predict(b"x")
        assert caught.value.unavailable and caught.value.status is None
        while not seen:  # the server may be slower than the client is patient
            time.sleep(0.01)
        assert len(seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        "no object",
        {},
        {**ANSWER, "top": [1]},
        {**ANSWER, "model": 1},
        {**ANSWER, "probability": "high"},
        {**ANSWER, "probability": None},
    ],
)
def test_an_answer_that_is_no_prediction_is_an_error(body: object) -> None:
    reply = answers(200, body)
    with server(reply) as (url, _), closing(Client(url, model="m")) as client:
        with pytest.raises(ClientError, match="not a prediction") as caught:
            client.predict(b"x")
        assert caught.value.code == "bad_answer" and caught.value.unavailable


def test_it_asks_for_the_models_name_once_and_sends_its_key() -> None:
    names = answers(200, {"models": ["a model"]})
    with server(names, FINE) as (url, seen), closing(Client(url, key="secret")) as client:
        assert list(client.predict_many([b"x", b"y"])) == [PREDICTION] * 2
        assert seen[0].path == "/v1/models"
        assert [request.path for request in seen[1:]] == ["/predictions/a%20model"] * 2
        assert {request.key for request in seen} == {"Bearer secret"}


def test_it_asks_for_abstention_and_sets_and_takes_them() -> None:
    unknown = {**ANSWER, "label": None, "familiarity": 0.01, "set": ["cat", "dog"]}
    with (
        server(answers(200, unknown)) as (url, seen),
        closing(Client(url, model="m", abstain=0.05, confidence=0.9)) as client,
    ):
        got = client.predict(b"x")
    assert seen[0].path == "/predictions/m?abstain=0.05&confidence=0.9"
    assert (got.label, got.familiarity, got.set) == (None, 0.01, ("cat", "dog"))


def test_it_does_not_choose_among_models() -> None:
    names = answers(200, {"models": ["a", "b"]})
    with (
        server(names) as (url, _),
        closing(Client(url)) as client,
        pytest.raises(ClientError, match="which model"),
    ):
        client.predict(b"x")


def test_a_few_connections_serve_many_pictures() -> None:
    with server(FINE) as (url, seen), closing(Client(url, model="m", concurrency=3)) as client:
        assert list(client.predict_many([b"x"] * 30)) == [PREDICTION] * 30
        assert len({request.sender for request in seen}) <= 3


@pytest.mark.parametrize(
    ("url", "key"), [("ftp://host", None), ("http://", None), ("http://h", "two\nlines")]
)
def test_arguments_that_make_no_client_are_refused(url: str, key: str | None) -> None:
    with pytest.raises(ValueError, match=r"address|key"):
        Client(url, key=key)


def test_the_command_loads_neither_torch_nor_the_supervisor() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'serving.supervisor'} & set(sys.modules)"
    code = f"import sys, serving.cli; sys.exit(bool({heavy}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pictures_are_taken_as_answers_are() -> None:
    taken = 0

    def pictures() -> Iterator[bytes]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield b"x"

    with server(FINE) as (url, _), closing(Client(url, model="m", concurrency=2)) as client:
        answers_ = client.predict_many(pictures())
        assert next(answers_) == PREDICTION and taken < 10
        answers_.close()  # type: ignore[attr-defined]
