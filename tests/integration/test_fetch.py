"""A model arrives whole and as the one that was meant, or not at all."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import tiny_config
from object_store import BUCKET, exported_run
from typer.testing import CliRunner

from jobs import config
from jobs.delivery.promotion import promote
from jobs.demo import ObjectStore
from serving import cli
from serving.archive import ModelError, unpacked
from serving.fetch import fetch, located
from serving.files import digest_of


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
    assert fetch(f"{web}/m.mar", digest_of(source), target) == target
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("path", "digest", "complaint"),
    [
        ("m.mar", "0" * 64, r"^http://[0-9.:]+/m.mar: its SHA-256 is"),
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


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"),
        *("[fd00:ec2::254]", "[fd20:ce::254]", "168.63.129.16", "100.100.100.200"),
    ],
)
def test_nothing_is_asked_where_clouds_keep_credentials(tmp_path: Path, host: str) -> None:
    with pytest.raises(ModelError, match="may be where clouds keep credentials"):
        fetch(f"http://{host}/latest/m.mar", "0" * 64, tmp_path / "got.mar")


def test_no_redirect_is_followed(tmp_path: Path) -> None:
    class Elsewhere(Quiet):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/m.mar")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(ModelError, match="answers 302"):
        fetch(f"http://127.0.0.1:{server.server_port}/m.mar", "0" * 64, tmp_path / "got.mar")
    server.shutdown()
    server.server_close()


def test_a_file_is_copied_and_another_scheme_refused(tmp_path: Path) -> None:
    source = tmp_path / "m.mar"
    source.write_bytes(b"archive")
    assert fetch(str(source), None, tmp_path / "copy.mar").read_bytes() == b"archive"
    with pytest.raises(ModelError, match="No such file"):
        fetch(str(tmp_path / "absent"), None, tmp_path / "copy.mar")
    with pytest.raises(ModelError, match="Invalid IPv6"):
        fetch("http://[::1/m.mar", "0" * 64, tmp_path / "copy.mar")
    with pytest.raises(ModelError, match="a path, http"):
        fetch("ftp://x/m.mar", None, tmp_path / "copy.mar")


def test_what_is_no_archive_takes_no_archives_place(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, wrong = tmp_path / "out" / "m.mar", tmp_path / "wrong.mar"
    wrong.write_bytes(b"no archive")
    monkeypatch.setenv("MODEL_URI", str(archive))
    done = CliRunner().invoke(cli.app, ["fetch", str(target)])
    assert done.exit_code == 0 and digest_of(target) == digest_of(archive)
    monkeypatch.setenv("MODEL_URI", str(wrong))
    done = CliRunner().invoke(cli.app, ["fetch", str(target)])
    assert done.exit_code == 3 and f"{wrong}: not a model archive" in done.stderr
    assert digest_of(target) == digest_of(archive)
    assert list(target.parent.iterdir()) == [target]
    done = CliRunner().invoke(cli.app, ["fetch", "."])
    assert done.exit_code == 3 and done.stderr.startswith("error: ")


def test_what_was_checked_is_what_is_opened(archive: Path, tmp_path: Path) -> None:
    """… though another file takes the place of the one that was meant."""
    meant = tmp_path / "m.mar"
    shutil.copyfile(archive, meant)
    target = tmp_path / "state" / "m.mar"
    model = located(str(meant), digest_of(meant), target, None)
    meant.write_bytes(b"another")
    assert model.path == target and digest_of(target) == digest_of(archive)
    with pytest.raises(ModelError, match="SHA-256"):
        located(str(meant), digest_of(target), tmp_path / "again.mar", None)
    assert located(str(archive), None, tmp_path / "no.mar", None).path == archive
    with unpacked(archive) as folder:  # which is as good, where it is any that is meant
        assert located(str(folder), None, tmp_path / "no.mar", None).path == folder
    with pytest.raises(ModelError, match=r"^/nowhere: no such file$"):
        located("/nowhere", digest_of(target), tmp_path / "no.mar", None)


@pytest.fixture
def promoted(
    settings: config.Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """Where a model lies in S3 after a promotion, and its archive."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", settings.endpoint_url or "")
    run = exported_run(tmp_path / "run-1", right=150)
    promote(run, tiny_config(storage=settings.model_dump(), export={"name": "m"}))
    return f"{settings.uri}/models/m", run.path / "model" / "m.mar"


def test_a_version_and_a_channel_lead_to_the_archive_in_s3(
    promoted: tuple[str, Path], tmp_path: Path
) -> None:
    root, archive = promoted
    target = tmp_path / "got.mar"
    for uri in (f"{root}/run-1/", f"{root}/run-1", f"{root}/channels/production.json"):
        assert fetch(uri, None, target).read_bytes() == archive.read_bytes()
        target.unlink()
    assert fetch(f"{root}/run-1/model.mar", digest_of(archive), target) == target
    for uri, digest, complaint in (
        (f"{root}/run-1/", "0" * 64, "by its version.json"),
        (f"{root}/run-1/model.mar", None, "its digest is needed"),
        (f"{root}/run-2/", None, "NoSuchKey"),
        (f"{root}/channels/next.json", None, "NoSuchKey"),
    ):
        with pytest.raises(ModelError, match=complaint):
            fetch(uri, digest, tmp_path / "other.mar")
    assert not (tmp_path / "other.mar").exists()


@pytest.mark.parametrize("version", ["a#1", "a?b"])
def test_a_version_may_have_a_name_that_an_address_of_the_web_could_not(
    settings: config.Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", settings.endpoint_url or "")
    run = exported_run(tmp_path / version, right=150)
    promote(run, tiny_config(storage=settings.model_dump(), export={"name": "m"}))
    root, archive = f"{settings.uri}/models/m", run.path / "model" / "m.mar"
    for number, uri in enumerate((f"{root}/{version}/", f"{root}/channels/production.json")):
        assert digest_of(fetch(uri, None, tmp_path / f"{number}.mar")) == digest_of(archive)
    fetch(f"{root}/{version}/model.mar", digest_of(archive), tmp_path / "by-digest.mar")


@pytest.mark.parametrize("uri", ["s3://b/models/m/v/", "s3://b/m.mar"])
def test_an_endpoint_of_the_environment_that_is_no_address_is_named(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    complaint = f"^{uri}: AWS_ENDPOINT_URL: Invalid endpoint: localhost:9000$"
    with pytest.raises(ModelError, match=complaint):
        fetch(uri, "0" * 64, tmp_path / "got.mar")


def test_an_archive_that_was_changed_in_s3_is_refused(
    promoted: tuple[str, Path], store: ObjectStore, tmp_path: Path
) -> None:
    root, _ = promoted
    key = f"{root.removeprefix(f's3://{BUCKET}/')}/run-1/model.mar"
    store.client().put_object(Bucket=BUCKET, Key=key, Body=b"something else")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        fetch(f"{root}/run-1/", None, tmp_path / "got.mar")
