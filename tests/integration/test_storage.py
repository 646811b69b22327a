"""A run reaches a real S3 server whole, once, and only with a manifest at its end."""

import hashlib
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.auth
import duckdb
import pytest
from botocore.awsrequest import AWSResponse
from command import called, forked, start_job
from conftest import ROOT, changed_at, tiny, tiny_config
from object_store import (
    BUCKET,
    READER,
    SECRET,
    Proxy,
    finished_run,
    keys_of,
    settings_of,
    start_store,
)

from jobs import config, doctor, following, watching
from jobs.delivery import storage as storages
from jobs.delivery.publishing import Live, fetch_published, publish, run_key
from jobs.delivery.storage import Storage
from jobs.demo import ObjectStore
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Diverged
from jobs.runs import RunFolder
from serving import progress
from serving.files import digest_of, write
from serving.s3 import Conflict

MIB = 2**20
DAY = "2026-01-31"  # on which `finished_run` started


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "some-run")


def assert_whole(store: ObjectStore, settings: config.Storage, run: RunFolder) -> None:
    """Everything is there, byte for byte by SHA-256, and nothing else."""
    prefix = (settings.uri or "").removeprefix(f"s3://{BUCKET}/")
    files = run.manifest().files
    assert set(keys_of(store, settings, "runs/")) == {
        f"{run_key(run)}/{name}" for name in [*files, "manifest.json"]
    }
    for name in files:
        where = {"Bucket": BUCKET, "Key": f"{prefix}/{run_key(run)}/{name}"}
        body = store.client().get_object(**where)["Body"].read()
        assert hashlib.sha256(body).hexdigest() == files[name].sha256, name


def uploads(store: ObjectStore, settings: config.Storage) -> list[str]:
    """Keys of multipart uploads that are neither completed nor given up."""
    prefix = (settings.uri or "").removeprefix(f"s3://{BUCKET}/")
    found = store.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.mark.parametrize("checksums", ["sha256", "md5"])
def test_a_run_is_published_whole_and_a_second_time_nothing_is_sent(
    store: ObjectStore, settings: config.Storage, tmp_path: Path, checksums: str
) -> None:
    run = finished_run(tmp_path / "some-run", 2 * storages.PART + 1)
    settings = settings.model_copy(update={"checksums": checksums})
    assert publish(Storage(settings), run) == 5
    assert f"runs/dt={DAY}/run_id=some-run/manifest.json" in keys_of(store, settings)
    assert_whole(store, settings, run)
    assert publish(Storage(settings), run) == 0


def test_an_interrupted_publish_goes_on_and_the_manifest_is_last(
    store: ObjectStore,
    settings: config.Storage,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage(settings)
    send = storage.send
    sent: list[Path] = []

    def fail_at_the_third(path: Path, *arguments: Any, **options: Any) -> None:
        if len(sent) == 2:
            raise UnavailableError("the cable was pulled")
        sent.append(path)
        send(path, *arguments, **options)

    monkeypatch.setattr(storage, "send", fail_at_the_third)
    with pytest.raises(UnavailableError, match="the cable was pulled"):
        publish(storage, run)
    assert len(keys_of(store, settings)) == 2
    assert f"{run_key(run)}/manifest.json" not in keys_of(store, settings)
    assert publish(Storage(settings), run) == 3
    assert_whole(store, settings, run)


def test_another_run_under_the_same_id_is_refused(
    store: ObjectStore, settings: config.Storage, run: RunFolder, tmp_path: Path
) -> None:
    publish(Storage(settings), run)
    other = finished_run(tmp_path / "elsewhere" / "some-run", 10)
    environment = other.path / "environment.json"
    environment.write_text(environment.read_text().replace(other.started, f"{DAY}T00:00:00+00:00"))
    other.write_manifest()
    with pytest.raises(ConfigurationError, match="another run is there as some-run"):
        publish(Storage(settings), other)
    assert_whole(store, settings, run)


def test_what_an_export_adds_later_is_published_too(
    store: ObjectStore, settings: config.Storage, run: RunFolder
) -> None:
    publish(Storage(settings), run)
    write(run.path / "model" / "some.mar", b"an archive")
    run.write_manifest()
    assert publish(Storage(settings), run) == 2
    assert_whole(store, settings, run)


def test_a_published_file_that_changes_takes_the_old_manifest_away_first(
    store: ObjectStore, settings: config.Storage, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(Storage(settings), run)
    write(run.path / "metrics.jsonl", '{"loss": 0.5}\n')
    run.write_manifest()
    storage = Storage(settings)
    send, seen = storage.send, []

    def look(*arguments: Any, **options: Any) -> None:
        seen.append(f"{run_key(run)}/manifest.json" in keys_of(store, settings))
        send(*arguments, **options)

    monkeypatch.setattr(storage, "send", look)
    assert publish(storage, run) == 2
    assert seen == [False]
    assert_whole(store, settings, run)


@pytest.mark.parametrize("same", [False, True])
def test_of_two_that_publish_a_run_at_once_one_is_told_unless_they_publish_the_same(
    store: ObjectStore,
    settings: config.Storage,
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same: bool,
) -> None:
    other = RunFolder(tmp_path / "elsewhere" / "some-run")
    shutil.copytree(run.path, other.path)
    if not same:
        write(other.path / "metrics.jsonl", '{"loss": 0.5}\n')
        other.write_manifest()
    storage = Storage(settings)
    put = storage.put

    def put_late(*arguments: Any, **options: Any) -> str:
        publish(Storage(settings), other)
        return put(*arguments, **options)

    monkeypatch.setattr(storage, "put", put_late)
    if same:
        publish(storage, run)
    else:
        told = r"some-run: another process has published it meanwhile; call again$"
        with pytest.raises(UnavailableError, match=told):
            publish(storage, run)
        assert publish(Storage(settings), run) == 2, "the metrics and the manifest"
    assert_whole(store, settings, run)


def test_a_file_that_is_not_what_the_manifest_says_is_not_published(
    settings: config.Storage, run: RunFolder
) -> None:
    write(run.path / "metrics.jsonl", "scribbles\n")
    with pytest.raises(UnavailableError, match=r"metrics.jsonl: changed since the manifest"):
        publish(Storage(settings), run)


def test_an_unfinished_run_is_not_published(settings: config.Storage, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "half")
    with folder.open(tiny_config()):
        pass
    with pytest.raises(UnavailableError, match="not a finished run"):
        publish(Storage(settings), folder)


# What can be wrong with storage


@pytest.mark.parametrize(
    ("changes", "environment", "complaint"),
    [
        ({"uri": "s3://no-such-bucket/x"}, {}, "there is no such bucket"),
        # pragma: allowlist nextline secret
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is not the access key's"),
        ({}, {"AWS_ACCESS_KEY_ID": "nobody"}, "the access key is not known there"),
        ({"endpoint_url": "http://127.0.0.1:9"}, {}, "Could not connect"),
        ({}, {"AWS_PROFILE": "nobody"}, "The config profile .nobody. could not be found"),
        (
            {},
            {
                "AWS_ACCESS_KEY_ID": READER["aws_access_key_id"],
                "AWS_SECRET_ACCESS_KEY": READER["aws_secret_access_key"],
            },
            "access denied; check the credentials and what they may do",
        ),
    ],
)
def test_doctor_says_in_one_line_what_is_wrong_with_storage(
    settings: config.Storage,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    environment: dict[str, str],
    complaint: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError, match=complaint) as caught:
        Storage(settings.model_copy(update={"attempts": 1, **changes})).check()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_doctor_leaves_nothing_behind(store: ObjectStore, settings: config.Storage) -> None:
    finding = doctor._storage(tiny_config(storage=settings.model_dump()))
    assert finding.ok and "may be written to" in finding.detail
    assert not keys_of(store, settings) and not uploads(store, settings)


def test_a_wrong_clock_is_named(settings: config.Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    right = botocore.auth.get_current_datetime
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k) - timedelta(hours=2)
    )
    with pytest.raises(UnavailableError, match="this machine's clock is wrong; set it"):
        Storage(settings).check()


class Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does to credentials that SeaweedFS has no notion of."""

    def do_GET(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_expired_credentials_are_named(settings: config.Storage) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UnavailableError, match="the credentials have expired; renew them"):
            Storage(settings.model_copy(update={"endpoint_url": address})).check()
        server.shutdown()


def test_without_credentials_the_names_of_the_variables_are_told(
    settings: config.Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UnavailableError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        Storage(settings).check()


def test_an_address_that_is_none_is_a_configuration_error(settings: config.Storage) -> None:
    with pytest.raises(ConfigurationError, match=r"^storage: Invalid endpoint: "):
        Storage(settings.model_copy(update={"endpoint_url": "nowhere"}))


# What the server is told, and checks


@pytest.mark.parametrize("checksums", ["sha256", "md5"])
@pytest.mark.parametrize("size", [1000, storages.PART + 1])
def test_what_arrives_damaged_is_refused_by_the_server(
    store: ObjectStore,
    settings: config.Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    checksums: str,
) -> None:
    run = finished_run(tmp_path / "some-run", size)
    storage = Storage(settings.model_copy(update={"checksums": checksums, "attempts": 1}))
    right = storage._checksum
    monkeypatch.setattr(storage, "_checksum", lambda body: right(body[1:]))
    with pytest.raises(UnavailableError, match="arrived damaged and was refused"):
        publish(storage, run)
    assert not keys_of(store, settings) and not uploads(store, settings)


def test_a_store_that_knows_md5_alone_sees_no_newer_checksum(
    settings: config.Storage, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "some-run", storages.PART + 1)
    storage, seen = Storage(settings.model_copy(update={"checksums": "md5"})), []
    storage.client.meta.events.register(
        "before-send.s3", lambda request, **_: seen.append((request.method, dict(request.headers)))
    )
    publish(storage, run)
    assert not [name for _, headers in seen for name in headers if "checksum" in name.lower()]
    assert sum("Content-MD5" in headers for method, headers in seen if method == "PUT") == 6


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}"])
def test_a_manifest_that_is_damaged_in_s3_is_named(
    settings: config.Storage, run: RunFolder, content: bytes
) -> None:
    storage, key = Storage(settings), f"{run_key(run)}/manifest.json"
    storage.put(key, content, replacing=None)
    for read in (publish, fetch_published):
        with pytest.raises(UnavailableError, match=f"^{storage.uri}/{key}: .") as caught:
            read(storage, run)
        assert "\n" not in str(caught.value)


def test_objects_are_encrypted_as_the_settings_say(
    store: ObjectStore, settings: config.Storage, run: RunFolder
) -> None:
    storage = Storage(settings.model_copy(update={"encryption": "s3"}))
    publish(storage, run)
    for name in ("metrics.jsonl", "manifest.json"):
        head = storage.head(f"{run_key(run)}/{name}")
        assert head and head["ServerSideEncryption"] == "AES256"
    assert_whole(store, settings, run)

    storage, seen = Storage(settings.model_copy(update={"encryption": "kms", "kms_key": "k1"})), []

    def answer(request: Any, **_: Any) -> AWSResponse:  # SeaweedFS has no KMS here
        seen.append(dict(request.headers))
        return AWSResponse(request.url, 200, {"ETag": '"1"'}, SimpleNamespace(stream=list))

    storage.client.meta.events.register("before-send.s3.PutObject", answer)
    storage.put("some", b"thing", replacing=None)
    assert seen[0]["x-amz-server-side-encryption"] == b"aws:kms"
    assert seen[0]["x-amz-server-side-encryption-aws-kms-key-id"] == b"k1"


# Kills and stalls


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_an_upload_loses_nothing(
    credentials: None, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "some-run", 120 * MIB)
    store = start_store(tmp_path / "s3")
    proxy = Proxy(store.address)
    try:
        settings = settings_of(proxy.address, "team").model_copy(update={"attempts": 10})
        with ThreadPoolExecutor() as threads:
            published = threads.submit(publish, Storage(settings), run)
            while proxy.passed < 40 * MIB:
                assert not published.done(), published.result()
                time.sleep(0.005)
            store.kill()
            store.start()
            assert published.result() == 5
        assert_whole(store, settings, run)
        assert not uploads(store, settings)
    finally:
        proxy.close()
        store.kill()


def publish_in_a_process(path: Path, settings: config.Storage) -> None:
    storages.PART = 5 * MIB
    publish(Storage(settings), RunFolder(path))


@pytest.mark.slow
def test_a_publisher_killed_anywhere_is_finished_by_the_next(
    store: ObjectStore, proxy: Proxy, settings: config.Storage, tmp_path: Path
) -> None:
    """30 kills, after random numbers of bytes; never is there a manifest without its files."""
    size = 18 * MIB
    run = finished_run(tmp_path / "some-run", size)
    through = settings.model_copy(update={"endpoint_url": proxy.address})
    storage = Storage(settings)
    moments, partial, left = random.Random(0), 0, 0
    for _ in range(30):
        if f"{run_key(run)}/manifest.json" in keys_of(store, settings):
            assert_whole(store, settings, run)
            storage.delete(keys_of(store, settings))
        last = proxy.passed + moments.uniform(0, size)
        process = forked(publish_in_a_process, run.path, through)
        process.start()
        while process.is_alive() and proxy.passed < last:
            time.sleep(0.001)
        process.kill()
        process.join()
        partial += 0 < len(keys_of(store, settings)) < 5
        left += bool(uploads(store, settings))
    assert partial >= 5 and left >= 3, f"the kills missed the work: {partial}, {left}"
    publish(storage, run)
    assert_whole(store, settings, run)
    assert not uploads(store, settings)


def test_a_network_that_stalls_ends_within_the_timeouts(
    settings: config.Storage, proxy: Proxy, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "some-run", 60 * MIB)
    changes = {"endpoint_url": proxy.address, "read_timeout": 5.0}
    proxy.stall_after = 20 * MIB
    with pytest.raises(UnavailableError, match=r"timeout|timed out"):
        publish(Storage(settings.model_copy(update={**changes, "attempts": 1})), run)
    assert proxy.stalled.is_set()
    assert time.monotonic() - proxy.stalled_at < 25, "by default it takes 30 s"


# While a run trains


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.05)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for module in (following, progress):
        monkeypatch.setattr(module, "log", lines.append)
    return lines


def sending(folder: RunFolder, settings: config.Storage) -> AbstractContextManager[None]:
    return following.following({"S3": Live(folder, settings).look})


def row(epoch: int) -> dict[str, Any]:
    return {"variant": "a", "seed": 0, "epoch": epoch, "split": "train", "loss": 1.0}


def until(condition: Any) -> None:
    while not condition():
        time.sleep(0.02)


def published_metrics(storage: Storage, run: RunFolder) -> bytes | None:
    found = storage.get(f"{run_key(run)}/metrics.jsonl")
    return found.body if found else None


@pytest.fixture
def training(tmp_path: Path, settings: config.Storage) -> Iterator[RunFolder]:
    """A run that is under way."""
    folder = RunFolder(tmp_path / "live")
    with folder.open(tiny_config()):
        folder.add_environment({"device": "a test"})
        yield folder


def test_metrics_appear_epoch_by_epoch_and_never_a_manifest(
    store: ObjectStore, settings: config.Storage, training: RunFolder, hurried: None
) -> None:
    storage, file = Storage(settings), training.path / "metrics.jsonl"
    with sending(training, settings):
        for epoch in range(3):
            training.append_metrics([row(epoch)])
            until(lambda: published_metrics(storage, training) == file.read_bytes())
        whole = file.read_bytes()
        with file.open("ab") as half:
            half.write(b'{"half a line')
        training.append_metrics([row(3)])
    assert published_metrics(storage, training) == file.read_bytes() != whole  # at the end, too
    names = {key.rpartition("/")[2] for key in keys_of(store, settings)}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl"}


def test_a_run_that_is_started_again_goes_on_with_its_metrics_in_s3(
    settings: config.Storage, training: RunFolder, hurried: None
) -> None:
    for epoch in range(2):
        with sending(training, settings):
            training.append_metrics([row(epoch)])
    expected = (training.path / "metrics.jsonl").read_bytes()
    assert published_metrics(Storage(settings), training) == expected


def test_a_run_elsewhere_is_watched_in_s3_until_it_is_published_there(
    settings: config.Storage,
    training: RunFolder,
    hurried: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watching, "SECONDS_BETWEEN_LOOKS", 0.1)
    given = settings.model_dump(include={"endpoint_url", "region", "path_style"})
    options = [f"storage.{key}={value}" for key, value in given.items()]
    where = f"{settings.uri}/{run_key(training)}"
    with pytest.raises(UnavailableError, match=r"no config\.yaml is there"):
        watching.state(where, options)
    whole = row(0) | {
        "variant": "frozen",
        "accuracy": 0.5,
        "images_per_second": 9.0,
        "seconds": 1.0,
    }
    with sending(training, settings):
        training.append_metrics([whole])
        until(lambda: published_metrics(Storage(settings), training))
        watcher = threading.Thread(target=watching.watch, args=(where, options))
        watcher.start()
        until(lambda: "epoch 1 of 2" in capsys.readouterr().out)
        said = watching.state(where, options)
        assert not said["finished"] and [p["epoch"] for p in said["parts"]] == [0, 0, 1]
        training.append_metrics([whole | {"epoch": 1, "accuracy": 0.75}])
    storage = Storage(settings)
    lost = Diverged(variant="scratch", seed=0, reason="the loss was no longer finite")
    training.variant("scratch", 0).save_result(lost)
    training.write_manifest()
    for name in ("variants/scratch/result.json", "manifest.json"):
        body = (training.path / name).read_bytes()
        storage.put(f"{run_key(training)}/{name}", body, replacing=None)
    watcher.join()
    assert capsys.readouterr().out == (
        "frozen with seed 0, epoch 2 of 2, train: accuracy 75.00 % · loss 1.000 · 9 images/s\n"
    )
    said = watching.state(where, options)
    assert said["finished"] and said["parts"][0]["diverged"]


@pytest.mark.usefixtures("hurried")
def test_storage_that_is_down_warns_once_a_minute_and_at_the_end(
    settings: config.Storage, training: RunFolder, warnings: list[str]
) -> None:
    away = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    with sending(training, away):
        for epoch in range(20):
            training.append_metrics([row(epoch)])
            time.sleep(0.05)
        until(lambda: warnings)
    first, last = warnings
    assert "not in S3 yet, training continues" in first and "Could not connect" in first
    assert "the last metrics are not in S3: " in last and "Could not connect" in last


@pytest.mark.usefixtures("hurried")
def test_storage_that_stalls_holds_the_end_up_for_a_bounded_time_and_can_undo_nothing(
    settings: config.Storage,
    training: RunFolder,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    monkeypatch.setattr(following, "SECONDS_AT_THE_END", 0.5)
    storage = Storage(settings)
    slow = settings.model_copy(update={"endpoint_url": proxy.address, "read_timeout": 60.0})
    with sending(training, slow):
        training.append_metrics([row(0)])
        until(lambda: published_metrics(storage, training))
        etag = storage.head(f"{run_key(training)}/metrics.jsonl")["ETag"]  # type: ignore[index]
        proxy.stalled.set()
        training.append_metrics([row(1)])
        time.sleep(0.3)
        begin = time.monotonic()
    assert time.monotonic() - begin < 50
    assert "the last metrics are not in S3: no answer" in warnings[-1]
    final = b"what the end of the run sends\n"
    storage.put(f"{run_key(training)}/metrics.jsonl", final, replacing=etag)
    late = Live(training, settings)
    late.storage, late.sent["metrics.jsonl"] = storage, (b"older", etag)
    with pytest.raises(Conflict):
        late._send(storage, "metrics.jsonl")
    assert published_metrics(storage, training) == final
    proxy.close()
    for one in threading.enumerate():
        if one.name == "metrics to S3":
            one.join()  # what it says then belongs to no other test


def test_what_is_sent_is_no_older_than_what_it_replaces(tmp_path: Path) -> None:
    """The end of the run sends all rows while a late look asks what is there."""
    folder = RunFolder(tmp_path)
    write(tmp_path / "environment.json", json.dumps([{"time": "2026-01-01T00:00:00"}]))
    write(tmp_path / "metrics.jsonl", "one\n")
    sent: list[bytes] = []
    asked: list[str] = []

    def head(key: str) -> dict[str, str] | None:
        asked.append(key)
        if key.endswith("manifest.json"):
            return None
        write(tmp_path / "metrics.jsonl", "one\ntwo\n")
        return {"ETag": "of both"}

    def put(_: str, content: bytes, replacing: str) -> str:
        sent.append(content)
        return replacing

    storage: Any = SimpleNamespace(head=head, put=put)
    Live(folder, config.Storage())._send(storage, "metrics.jsonl")
    assert sent == [b"one\ntwo\n"]
    Live(folder, config.Storage())._send(storage, "config.yaml")
    names = [key.rpartition("/")[2] for key in asked]
    assert names == ["metrics.jsonl", "manifest.json"], "of a file that is not there yet, nothing"


@pytest.mark.usefixtures("hurried")
def test_metrics_never_go_into_another_run_that_is_finished(
    store: ObjectStore, settings: config.Storage, tmp_path: Path, warnings: list[str]
) -> None:
    there = finished_run(tmp_path / "there" / "same", 10)
    publish(Storage(settings), there)
    folder = RunFolder(tmp_path / "here" / "same")
    with folder.open(tiny_config()):
        write(folder.path / "environment.json", json.dumps([{"time": there.started}]))
        with sending(folder, settings):
            folder.append_metrics([row(0)])
            until(lambda: [w for w in warnings if "a finished run is there as same" in w])
    assert_whole(store, settings, there)


def test_metrics_never_go_into_a_run_that_another_process_has_published_meanwhile(
    store: ObjectStore, settings: config.Storage, training: RunFolder, tmp_path: Path
) -> None:
    live = Live(training, settings)
    training.append_metrics([row(0)])
    live.look()
    there = finished_run(tmp_path / "there" / training.run_id, 10, day=training.started[:10])
    publish(Storage(settings), there)
    training.append_metrics([row(1)])
    with pytest.raises(Conflict):
        live.look()
    with pytest.raises(ConfigurationError, match="a finished run is there as live"):
        live.look()
    assert_whole(store, settings, there)


def small_job(tmp_path: Path, settings: config.Storage, epochs: int) -> Path:
    raw = tiny(optim={"epochs": epochs}, storage=settings.model_dump())
    raw["variants"] = raw["variants"][:1]
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(raw))
    return file


@pytest.mark.slow
def test_a_job_shows_its_epochs_in_s3_while_it_trains_and_all_of_it_at_the_end(
    store: ObjectStore, settings: config.Storage, tmp_path: Path
) -> None:
    file = small_job(tmp_path, settings, epochs=6)
    process = start_job("run", "--config", file, "--out", tmp_path, "--run-id", "r")

    def live() -> list[str]:
        return [key for key in keys_of(store, settings) if key.endswith("/metrics.jsonl")]

    while not live():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    folder = RunFolder(tmp_path / "r")
    assert not folder.finished and len(folder.metrics()) < 12
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_whole(store, settings, folder)


@pytest.mark.usefixtures("thin", "undrawn")
def test_a_job_finishes_without_storage_and_is_published_later(
    settings: config.Storage, tmp_path: Path
) -> None:
    file = small_job(tmp_path, settings, epochs=1)
    away = ("--set", "storage.endpoint_url=http://127.0.0.1:9", "--set", "storage.attempts=1")
    begin = time.monotonic()
    done = called("run", "--config", file, "--out", tmp_path, "--run-id", "r", *away)
    minutes = (time.monotonic() - begin) / 60
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not published: ") == 1
    assert done.stderr.count("warning: ") <= 2 + minutes  # one at the end, about the last metrics
    folder = RunFolder(tmp_path / "r")
    later = f"`publish {folder.path} --set storage.uri={settings.uri}` does it"
    assert later in " ".join(done.stderr.split())
    before = digest_of(folder.path / "manifest.json")

    failed = called("publish", folder.path, *away)
    assert failed.returncode == 3 and "Could not connect" in failed.stderr
    sent = called("publish", folder.path, "--set", f"storage.endpoint_url={settings.endpoint_url}")
    assert sent.returncode == 0, sent.stderr
    assert f"{len(folder.manifest().files) + 1} files sent" in sent.stdout
    assert digest_of(folder.path / "manifest.json") == before
    for path in changed_at(folder.path):
        assert SECRET.encode() not in path.read_bytes()
    for output in (done, failed, sent):
        assert SECRET not in output.stdout + output.stderr


# Reading it in place


def test_the_documented_query_reads_the_metrics_of_many_runs(
    store: ObjectStore, settings: config.Storage, tmp_path: Path
) -> None:
    storage = Storage(settings)
    for number, day in enumerate(("2026-01-30", "2026-01-31", "2026-01-31")):
        run = finished_run(tmp_path / f"run-{number}", 10, day=day)
        (run.path / "metrics.jsonl").unlink()
        for epoch in range(2):
            best = 0.5 + 0.1 * number + 0.01 * epoch
            run.append_metrics([row(epoch) | {"split": "validation", "accuracy": best}])
        run.write_manifest()
        publish(storage, run)
    bucket = tmp_path / "bucket"  # DuckDB's httpfs is not to be had offline
    for key in keys_of(store, settings):
        if key.endswith("/metrics.jsonl"):
            (bucket / key).parent.mkdir(parents=True)
            storage.fetch(key, bucket / key, lambda _: None)

    text = (ROOT / "docs" / "storage.md").read_text()
    query = text.split("```sql")[1].split("```")[0]
    assert "s3://bucket/prefix" in query
    found = duckdb.sql(query.replace("s3://bucket/prefix", str(bucket)))
    assert found is not None
    rows = [(str(day), run, variant, round(b, 2)) for day, run, variant, b in found.fetchall()]
    assert rows == [
        ("2026-01-31", "run-2", "a", 0.71),
        ("2026-01-31", "run-1", "a", 0.61),
        ("2026-01-30", "run-0", "a", 0.51),
    ]
