"""A real S3 server for tests, and a proxy in front of it that can fail as networks do."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from botocore.loaders import JSONFileLoader
from conftest import free_port, tiny_config

from jobs import config
from jobs.demo import ObjectStore, identity
from jobs.results import Facts
from jobs.runs import RunFolder, now, write_arrays
from serving.archive import ARCHIVE, PREDICTIONS, Counts, Data, Description, Version, describe_file
from serving.files import write

KEY, SECRET, BUCKET = "test-key", "test-secret", "runs-of-tests"
READER = {"aws_access_key_id": "reader", "aws_secret_access_key": "reader-secret"}


def start_store(folder: Path) -> ObjectStore:
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    store = ObjectStore(folder, keys, BUCKET)
    store.identities.append(identity("reader", READER, f"Read:{BUCKET}", f"List:{BUCKET}"))
    store.start()
    return store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS on loopback with one bucket, shared by all tests; each takes its own prefix."""
    with pytest.MonkeyPatch.context() as patch:
        # A client reads what S3 is from 2 MB of JSON, which takes longer than most requests here.
        kept = functools.cache(JSONFileLoader().load_file)
        patch.setattr(JSONFileLoader, "load_file", staticmethod(kept))
        store = start_store(tmp_path_factory.mktemp("s3"))
        yield store
        store.kill()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(
    store: ObjectStore, credentials: None, request: pytest.FixtureRequest
) -> config.Storage:
    """Storage of this test alone."""
    return settings_of(store.address, prefix=f"{request.node.name}-{time.monotonic_ns()}")


def settings_of(address: str, prefix: str) -> config.Storage:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in prefix)
    return config.Storage(
        uri=f"s3://{BUCKET}/{name}",
        endpoint_url=address,
        region="us-east-1",
        path_style=True,
        attempts=2,
    )


def keys_of(store: ObjectStore, settings: config.Storage, prefix: str = "") -> list[str]:
    """Keys of all objects, relative to the settings' prefix."""
    root = (settings.uri or "").removeprefix(f"s3://{BUCKET}/") + "/"
    pages = store.client().get_paginator("list_objects_v2")
    found = pages.paginate(Bucket=BUCKET, Prefix=root + prefix)
    return [e["Key"].removeprefix(root) for page in found for e in page.get("Contents", [])]


def finished_run(path: Path, size: int = 9_000_000, *, day: str = "2026-01-31") -> RunFolder:
    """A finished run folder with little in it but one file of `size` random bytes."""
    folder = RunFolder(path)
    with folder.open(tiny_config()):
        folder.add_environment({"device": "a test"})
        environment = folder.path / "environment.json"
        environment.write_text(environment.read_text().replace(folder.started[:10], day))
        write(folder.path / "variants" / "a" / "best.safetensors", os.urandom(size))
        write(folder.path / "metrics.jsonl", '{"loss": 1.0}\n')
        folder.write_manifest()
    return folder


class Proxy:
    """Passes TCP on to a server, until it is told to stall: it then takes what comes and says
    nothing, and passes nothing on. `swallow` loses the server's answers alone."""

    def __init__(self, target: str) -> None:
        self.target = int(target.rsplit(":", 1)[1])
        self.stalled = threading.Event()
        self.swallow = threading.Event()
        self.passed = 0  # bytes to the server
        self.stall_after: int | None = None
        self.stalled_at = 0.0
        port = free_port()
        self.listener = socket.create_server(("127.0.0.1", port))
        self.address = f"http://127.0.0.1:{port}"
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.sockets.append(client)
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # it is down
                    client.close()
                    continue
                self.sockets.append(server)
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up:
                    self.passed += len(data)
                if self.stall_after is not None and self.passed > self.stall_after:
                    self.stalled_at = self.stalled_at or time.monotonic()
                    self.stalled.set()
                if self.stalled.is_set() or (not up and self.swallow.is_set()):
                    continue
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(store: ObjectStore) -> Iterator[Proxy]:
    proxy = Proxy(store.address)
    yield proxy
    proxy.close()


def exported_run(
    path: Path,
    right: int,
    images: int = 200,
    digest: str = "d",
    name: str = "m",
    first: int = 0,
    leaked: Sequence[int] = (),
) -> RunFolder:
    """A run as `export` leaves it, of a model that gets the first `right` test images right, whose
    digests depend on `digest` and their numbers, which begin at `first`; those at `leaked` are in
    training, too."""
    import numpy as np
    import torch

    from jobs.train.evaluation import scores

    folder = finished_run(path, 1000)
    numbers = np.arange(first, first + images)
    pictures = [sha256(f"{digest} {number}".encode()).digest() for number in numbers]
    digests = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, 32)
    labels = numbers % 10
    predicted = np.where(np.arange(images) < right, labels, (labels + 1) % 10)
    logits = np.eye(10, dtype=np.float32)[predicted]
    model = folder.path / "model" / name
    learned = np.isin(np.arange(images), leaked)
    write_arrays(
        model.with_suffix(".npz"),
        {"logits": logits, "labels": labels, "digests": digests, "leaked": learned},
    )
    write(model.with_suffix(".mar"), os.urandom(5000))
    description = Description(
        name=name,
        version=folder.run_id,
        variant="frozen",
        seed=0,
        weights="random weights",
        data=Data(
            source="generated",
            classes=tuple("abcdefghij"),
            image_size=(32, 32),
            images=Counts(train=80, validation=20, test=images),
            test_digest=digest,
        ),
        selected_on="validation",
        forms=("int8", "float", "program"),
        test=scores(torch.from_numpy(logits), torch.from_numpy(labels)),
    )
    files = {
        ARCHIVE: describe_file(model.with_suffix(".mar")),
        PREDICTIONS: describe_file(model.with_suffix(".npz")),
    }
    whole = Version(time=now(), files=files, description=description)
    write(model.with_suffix(".json"), whole.to_json())
    facts = Facts(**dict(description.data), digest=digest, skipped=(), leaked=tuple(leaked))
    write(folder.path / "data.json", facts.to_json())
    folder.write_manifest()
    return folder
