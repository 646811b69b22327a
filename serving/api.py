"""The supervisor's own endpoints, on loopback behind the gateway: health, keys, metadata.

Prediction requests come here only to have their key checked, or to be read when they are too large
to be answered.
"""

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from serving.archive import Model
from serving.log import log
from serving.messages import failure
from serving.settings import Settings, SettingsError

NAME = "inception-transfer"
CHUNK = 1 << 16
OPENAPI = Path(__file__).parent / "gateway" / "openapi.yaml"

Answer = tuple[int, dict[str, Any] | bytes]
"""Status, and JSON or a PNG file."""


class Limit:
    """How often each key may ask: a minute's requests at once, and then one at a time as they come
    in again (the generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, per_minute: int | None) -> None:
        self.interval = 60 / per_minute if per_minute else 0.0
        self.free_at: dict[bytes, float] = {}
        """When all requests of a key have come in again."""
        self.lock = threading.Lock()

    def seconds_to_wait(self, key: bytes) -> float:
        """0 for a request that may pass now, and is counted."""
        now = time.monotonic()
        with self.lock:
            free_at = max(self.free_at.get(key, now), now) + self.interval
            if free_at <= now + 60:
                self.free_at[key] = free_at
        return max(0.0, free_at - now - 60)


class Keys:
    """The bearer keys that are valid now."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            SettingsError: the file of keys cannot be read.
        """
        self.file, self.read_at = settings.api_keys_file, 0.0
        self.own = secrets.token_urlsafe()
        """The supervisor's, for the golden picture."""
        self.given = _digests(settings.api_keys.split(","))
        self.in_file: list[bytes] = []
        self.required = bool(self.given) or self.file is not None
        [self.own_digest] = _digests([self.own])
        self.given.append(self.own_digest)
        self.limit = Limit(settings.key_requests_per_minute)
        try:
            self._refresh()
        except (OSError, ValueError) as error:
            raise SettingsError(f"SERVING_API_KEYS_FILE: {error}") from None

    def answer(
        self, header: str, *, counts: bool = True
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Whether a request with this Authorization header may pass: status, body and headers.

        Args:
            counts: whether it is one of those that are limited.
        """
        key = self.accept(header)
        if key is None:
            refusal = failure("unauthorized", "a valid key is needed: Authorization: Bearer …")
            return 401, refusal, {"WWW-Authenticate": "Bearer"}
        limited = counts and key != self.own_digest
        if limited and (seconds := self.limit.seconds_to_wait(key)) > 0:
            refusal = failure("rate_limited", "this key has asked too often; try again")
            return 429, refusal, {"Retry-After": str(math.ceil(seconds))}
        return 200, {}, {}

    def accept(self, header: str) -> bytes | None:
        """The digest of the key in an Authorization header, None if it is not valid; takes the same
        time for every wrong one."""
        with contextlib.suppress(OSError, ValueError):  # a file that is gone changes no keys
            self._refresh()
        scheme, _, key = header.partition(" ")
        # http.server has taken its bytes for Latin-1, where some others are spaces, too.
        digest = hashlib.sha256(key.strip(" \t").encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.given + self.in_file]
        return digest if scheme.lower() == "bearer" and any(matches) else None

    def _refresh(self) -> None:
        """Keys change without a restart: Kubernetes swaps the files of a mounted Secret."""
        if self.file is not None and (changed := self.file.stat().st_mtime) != self.read_at:
            self.in_file = _digests(self.file.read_text().splitlines())
            self.read_at = changed


def _digests(keys: list[str]) -> list[bytes]:
    """Equal lengths make the comparison's time say nothing about a key."""
    return [hashlib.sha256(os.fsencode(key)).digest() for key in map(str.strip, keys) if key]


def routes(
    model: Model, engine: str, ready: Callable[[], str | None], form: Callable[[], str | None]
) -> dict[str, Callable[[], Answer]]:
    """The paths that have an answer.

    Args:
        engine: which one runs the network.
        ready: says what is wrong, None if nothing is.
        form: says which form of the network answers, None before it has.
    """

    def readiness(**extra: Any) -> Answer:
        problem = ready()
        body = {**extra, "ready": problem is None}
        return (200, body) if problem is None else (503, {**body, "reason": problem})

    def found(answer: dict[str, Any] | bytes) -> Callable[[], Answer]:
        return lambda: (200, answer)

    v1, v2 = f"/v1/models/{model.name}", f"/v2/models/{model.name}"
    samples = [one.picture for one in model.golden[: model.description.samples]]
    answers: dict[str, Callable[[], Answer]] = {
        "/livez": found({"live": True}),
        "/readyz": readiness,
        "/openapi.json": found(openapi(model)),
        "/v1/models": found({"models": [model.name]}),
        v1: lambda: readiness(name=model.name),
        f"{v1}/card": found(model.description.model_dump(mode="json")),
        **{f"{v1}/samples/{number}": found(png) for number, png in enumerate(samples)},
        "/v2": found({"name": NAME, "version": version(NAME), "extensions": []}),
        "/v2/health/live": found({"live": True}),
        "/v2/health/ready": readiness,
        v2: lambda: (200, _v2_metadata(model, engine, form())),
        f"{v2}/ready": lambda: readiness(name=model.name),
    }
    versioned = f"{v2}/versions/{model.version}"
    return {**answers, versioned: answers[v2], f"{versioned}/ready": answers[f"{v2}/ready"]}


def _v2_metadata(model: Model, engine: str, form: str | None) -> dict[str, Any]:
    familiarity = {"name": "familiarity", "datatype": "FP64", "shape": [-1]}
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": f"pytorch_{engine}",
        "form": form,
        "forms": model.description.forms,
        "map_size": model.description.map_size,
        "inputs": [{"name": "pictures", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(model.classes)]},
            *([familiarity] if model.description.held_out else []),
        ],
    }


def openapi(model: Model) -> dict[str, Any]:
    """The service's OpenAPI document, with this model's name and classes in it."""
    text = OPENAPI.read_text().replace("{model}", model.name)
    document: dict[str, Any] = yaml.safe_load(text)
    document["info"]["version"] = version(NAME)
    document["components"]["schemas"]["Label"]["enum"] = list(model.classes)
    if model.description.map_size is None:
        del document["paths"][f"/explanations/{model.name}"]
    return document


class Server(ThreadingHTTPServer):
    """Answers each connection on a thread of its own."""

    daemon_threads = True
    request_queue_size = 1024  # connections that wait: with the usual 5, the gateway waits minutes

    def handle_error(self, *_: Any) -> None:
        """Logs what went wrong, unless it is only that the gateway closed its connection, as it
        does when its client has gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            log("error", error=repr(error), traceback=traceback.format_exc())


def serve(port: int, answers: dict[str, Callable[[], Answer]], keys: Keys) -> None:
    """Answers on loopback, on a thread of its own, for as long as the process lives."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the gateway keeps its connections

        def do_GET(self) -> None:
            # A body, which the gateway should not send and nobody reads, would pass for the next
            # request on this connection, and that may be another client's.
            self.close_connection |= "Content-Length" in self.headers
            self.close_connection |= "Transfer-Encoding" in self.headers
            path = self.path.partition("?")[0].removeprefix("/get")
            if path in ("/auth", "/auth/free"):
                key = self.headers.get("Authorization", "")
                self._send(*keys.answer(key, counts=path == "/auth"))
            elif path in answers:
                self._send(*answers[path]())
            else:
                self._send(404, failure("not_found", "there is nothing here"))

        def do_POST(self) -> None:
            """Reads what the gateway refuses as too large."""
            left = int(self.headers["Content-Length"])
            while left > 0 and (part := self.rfile.read(min(left, CHUNK))):
                left -= len(part)
            if left:  # it is too large even for that, or the client has gone
                self.close_connection = True
            else:
                self._send(413, {})

        def _send(
            self, status: int, answer: dict[str, Any] | bytes, headers: Mapping[str, str] = {}
        ) -> None:
            kind, body = "image/png", answer
            if not isinstance(body, bytes):
                # Where the gateway uses only the status, there is no body: it would not read one,
                # and would then close the connection instead of using it again.
                kind, body = "application/json", json.dumps(body).encode() if body else b""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - its base class's names
        do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """The gateway's access log has it already."""

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
