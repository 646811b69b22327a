"""The supervisor's own endpoints, asked without the gateway."""

import contextlib
import socket
from http.server import BaseHTTPRequestHandler

import pytest

from serving import api
from serving.processes import free_ports
from serving.settings import Settings


@pytest.mark.parametrize("length", ["Content-Length: 40", "Transfer-Encoding: chunked"])
def test_what_follows_a_head_with_a_body_is_no_request(length: str) -> None:
    [port] = free_ports(1)
    api.serve(port, {"/fine": lambda: (200, {})}, api.Keys(Settings(model_uri="m.mar")))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(b"GET /fine HTTP/1.1\r\n\r\n")
        assert link.recv(1 << 16).startswith(b"HTTP/1.1 200 "), "a connection lasts"
        hidden = b"GET /nothing HTTP/1.1\r\n\r\n"
        link.sendall(f"GET /fine HTTP/1.1\r\n{length}\r\n\r\n".encode() + hidden)
        answers = b""
        with contextlib.suppress(ConnectionError):  # what it has not read when it closes
            while part := link.recv(1 << 16):
                answers += part
    assert answers.startswith(b"HTTP/1.1 200 ") and answers.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answers


def test_many_connections_may_wait_to_be_taken() -> None:
    server = api.Server(("127.0.0.1", 0), BaseHTTPRequestHandler)  # which takes none
    with contextlib.closing(server.socket), contextlib.ExitStack() as links:
        for _ in range(300):
            address = ("127.0.0.1", server.server_port)
            links.enter_context(socket.create_connection(address, timeout=30))


def test_a_key_may_have_any_characters() -> None:
    # pragma: allowlist nextline secret
    keys = api.Keys(Settings(model_uri="m.mar", api_keys="clé à"))
    as_it_is_read = "Bearer  clé à ".encode().decode("latin-1")
    assert keys.accept(as_it_is_read) and not keys.accept("Bearer cle a")
