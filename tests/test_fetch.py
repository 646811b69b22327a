"""A model arrives whole and as the one that was meant, or not at all."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.runs import sha256
from serving.archive import ModelError
from serving.fetch import fetch


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An address that serves `tmp_path`/www, with one archive of noise in it."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "m.mar").write_bytes(bytes(range(256)) * 10_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_archive_comes_over_http_with_its_digest(web: str, tmp_path: Path) -> None:
    source, target = tmp_path / "www" / "m.mar", tmp_path / "got.mar"
    assert fetch(f"{web}/m.mar", sha256(source), target) == target
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("path", "digest", "complaint"),
    [
        ("m.mar", "0" * 64, "its SHA-256 is"),
        ("m.mar", None, "its digest is needed"),
        ("absent.mar", "0" * 64, "answers 404"),
    ],
)
def test_what_is_not_the_archive_leaves_nothing_behind(
    web: str, tmp_path: Path, path: str, digest: str | None, complaint: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=complaint):
        fetch(f"{web}/{path}", digest, tmp_path / "got.mar")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_copied_and_another_scheme_refused(tmp_path: Path) -> None:
    source = tmp_path / "m.mar"
    source.write_bytes(b"archive")
    assert fetch(str(source), None, tmp_path / "copy.mar").read_bytes() == b"archive"
    with pytest.raises(ModelError, match="No such file"):
        fetch(str(tmp_path / "absent"), None, tmp_path / "copy.mar")
    with pytest.raises(ModelError, match="a path, http"):
        fetch("ftp://x/m.mar", None, tmp_path / "copy.mar")
