"""The client and its command: against the service, and against servers that misbehave."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import MODEL, ROOT, free_port, pictures, predictions
from service import Service

from jobs.runs import RunFolder
from serving.client import Client, ClientError, Model, Prediction, Score

ANSWER = {
    "label": "cat",
    "probability": 0.9,
    "top": [{"label": "cat", "probability": 0.9}],
    "model": {"name": "m", "version": "1"},
}
PREDICTION = Prediction("cat", 0.9, (Score("cat", 0.9),), Model("m", "1"))


# Against the service ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten good pictures with a text and a missing file among them."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{number}.png" for number in range(10)]
    for path, picture in zip(paths, pictures(exported, 10), strict=True):
        path.write_bytes(picture)
    (folder / "text.png").write_text("no picture")
    return [*paths[:4], folder / "text.png", *paths[4:], folder / "missing.png"]


def test_every_picture_has_its_answer_in_order_and_the_bad_ones_cost_no_other(
    service: Service, exported: RunFolder, files: list[Path]
) -> None:
    with Client(service.address) as client:
        answers = list(client.predict_many(files))
        first = client.predict(files[0].read_bytes())
    good = [answer for answer in answers if isinstance(answer, Prediction)]
    assert [answer.label for answer in good] == predictions(exported, 10)
    assert good[0].model == Model(MODEL, exported.run_id)
    assert good[0].top[0] == Score(good[0].label, good[0].probability)
    assert first.label == good[0].label
    text, missing = answers[4], answers[11]
    assert isinstance(text, ClientError) and (text.status, text.code) == (400, "bad_image")
    assert isinstance(missing, ClientError) and missing.code == "unreadable"


def test_the_command_prints_a_line_for_each_file(
    service: Service, exported: RunFolder, files: list[Path]
) -> None:
    lines = command(service.address, *files)
    assert lines.returncode == 2, "two of the files have no answer"
    cells = [line.split("\t") for line in lines.stdout.splitlines()]
    assert [label for _, label, _ in cells] == predictions(exported, 10)
    assert "text.png: not a picture" in lines.stderr
    assert "missing.png: No such file" in lines.stderr
    good = command(service.address, *files[:4], "--json")
    assert (good.returncode, good.stderr) == (0, "")
    answers = [json.loads(line) for line in good.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == list(map(str, files[:4]))
    assert [answer["label"] for answer in answers] == predictions(exported, 4)


def test_the_command_draws_a_table_on_a_terminal(service: Service, files: list[Path]) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = command_process(service.address, *files, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)
    assert process.wait() == 2
    assert "probability" in shown and "not a picture" in shown and "%" in shown


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody has the other end
        return b""


def command_process(
    address: str, *arguments: str | Path, stdout: int, stderr: int
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serving", "predict", "--url", address, *arguments],
        cwd=ROOT,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )


def command(address: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    pipe = subprocess.PIPE
    process = command_process(address, *arguments, stdout=pipe, stderr=pipe)
    stdout, stderr = process.communicate()
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("address", "code", "complaint"),
    [
        (f"http://127.0.0.1:{free_port()}", 3, "Connection refused"),
        ("localhost:8080", 2, "not an address"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    address: str, code: int, complaint: str, files: list[Path]
) -> None:
    done = command(address, files[0])
    assert done.returncode == code
    assert complaint in done.stderr and done.stderr.count("\n") == 1


def test_the_command_loads_neither_torch_nor_the_supervisor() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'serving.supervisor'} & set(sys.modules)"
    code = f"import sys, serving.cli; sys.exit(bool({heavy}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Against servers that misbehave -------------------------------------------------------------------

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
        assert len(seen) == 1


@pytest.mark.parametrize("body", ["no object", {}, {**ANSWER, "top": [1]}, {**ANSWER, "model": 1}])
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
