"""The supervisor's own endpoints keep its log whole, which the gateway writes to as well."""

import http.client
import io
import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from serving import api, processes
from serving.log import log
from serving.settings import Settings

RESET = struct.pack("ii", 1, 0)  # closing then ends a connection at once


@pytest.fixture
def port() -> int:
    def fail() -> api.Answer:
        raise LookupError("a mistake")

    [port] = processes.free_ports(1)
    keys = api.Keys(Settings(model_uri="x", api_keys="k"))
    api.serve(port, {"/fail": fail, "/fine": lambda: (200, {"fine": True})}, keys)
    return port


@pytest.fixture
def requests_end() -> Callable[[], None]:
    """Waits for the threads of the requests since; those of other tests' servers may never end."""
    before = set(threading.enumerate())

    def wait() -> None:
        for thread in set(threading.enumerate()) - before:
            if "process_request_thread" in thread.name:
                thread.join()

    return wait


def test_that_a_connection_was_reset_is_not_logged(
    port: int, requests_end: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    for begun in (b"", b"GET /fine HT", b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/fine")
        assert connection.getresponse().read() == b'{"fine": true}'
        connection.sock.sendall(begun)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()
    requests_end()
    assert capfd.readouterr().err == ""


def test_a_mistake_of_its_own_is_one_line_of_json(
    port: int, requests_end: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/fail")
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
    requests_end()
    record = json.loads(capfd.readouterr().err)
    assert (record["event"], record["error"]) == ("error", "LookupError('a mistake')")
    assert "in fail" in record["traceback"]


def test_of_a_key_that_is_good_the_status_is_all(port: int) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for key, status in (("k", 200), ("another", 401)):
            connection.request("GET", "/auth", headers={"Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, status == 401)


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a buffer, as in the image, where PYTHONUNBUFFERED is set."""
    pieces: list[bytes] = []

    class File(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, piece: bytes) -> int:  # type: ignore[override]
            pieces.append(bytes(piece))
            return len(piece)

    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(File(), write_through=True))  # type: ignore[type-var]
    log("starting", port=1)
    [piece] = pieces
    assert piece.endswith(b"\n") and json.loads(piece)["port"] == 1
