"""A run reaches a real S3 server whole, once, and only with a manifest at its end."""

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from conftest import free_port, job, tiny, tiny_config

from jobs import config
from jobs.errors import ConfigurationError, UnavailableError
from jobs.runs import RunFolder, sha256, write
from jobs.storage import Storage

KEY, SECRET, BUCKET = "test-key", "test-secret", "runs-of-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A SeaweedFS on loopback with one bucket; the address of its S3."""
    folder = tmp_path_factory.mktemp("s3")
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "ids.json").write_text(json.dumps({"identities": [identity]}))
    port = free_port()
    ports = [
        f"-{name}={free_port()}"
        for service in ("master", "volume", "filer", "admin")
        for name in (f"{service}.port", f"{service}.port.grpc")
    ]
    command = [
        Path(sysconfig.get_path("scripts")) / "weed",
        *("mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"),
        *(f"-s3.port.grpc={free_port()}", f"-s3.config={folder}/ids.json", *ports),
        *("-admin.ui=false", "-webdav=false", "-s3.iam=false", "-s3.autoCreateBucket=false"),
    ]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        client = client_of(address)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except (BotoCoreError, ClientError):
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()
        log.close()


def client_of(address: str) -> Any:
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)


@pytest.fixture
def settings(server: str, monkeypatch: pytest.MonkeyPatch) -> config.Storage:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return config.Storage(
        uri=f"s3://{BUCKET}/team",
        endpoint_url=server,
        region="us-east-1",
        path_style=True,
        attempts=2,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run folder with little in it."""
    folder = RunFolder(tmp_path / "some-run")
    with folder.open(tiny_config()):
        folder.add_environment({"device": "a test"})
        write(folder.path / "variants" / "a" / "best.safetensors", os.urandom(9_000_000))
        write(folder.path / "metrics.jsonl", '{"loss": 1.0}\n')
        folder.write_manifest()
    return folder


def keys_of(address: str, prefix: str) -> list[str]:
    found = client_of(address).list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for entry in found.get("Contents", [])]


def test_a_run_is_published_whole_and_a_second_time_nothing_is_sent(
    server: str, settings: config.Storage, run: RunFolder
) -> None:
    storage = Storage(settings)
    assert storage.publish(run) == 5
    root = f"team/runs/dt={run.started[:10]}/run_id=some-run"
    names = [*run.manifest()["files"], "manifest.json"]
    assert sorted(keys_of(server, root)) == sorted(f"{root}/{name}" for name in names)
    for name in names:
        body = client_of(server).get_object(Bucket=BUCKET, Key=f"{root}/{name}")["Body"].read()
        assert body == (run.path / name).read_bytes()
    assert storage.publish(run) == 0


def test_an_interrupted_publish_goes_on_and_the_manifest_is_last(
    server: str, settings: config.Storage, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.path.rename(run.path.with_name("cut-run"))
    run = RunFolder(run.path.with_name("cut-run"))
    storage = Storage(settings)
    upload, sent = storage.client.upload_file, []

    def fail_at_the_third(path: str, *arguments: Any, **options: Any) -> None:
        if len(sent) == 2:
            raise OSError("the cable was pulled")
        sent.append(path)
        upload(path, *arguments, **options)

    monkeypatch.setattr(storage.client, "upload_file", fail_at_the_third)
    with pytest.raises(UnavailableError, match="the cable was pulled"):
        storage.publish(run)
    root = f"team/runs/dt={run.started[:10]}/run_id=cut-run"
    assert len(keys_of(server, root)) == 2
    assert f"{root}/manifest.json" not in keys_of(server, root)
    assert Storage(settings).publish(run) == 3


def test_another_run_under_the_same_id_is_refused(settings: config.Storage, run: RunFolder) -> None:
    run.path.rename(run.path.with_name("same-id"))
    run = RunFolder(run.path.with_name("same-id"))
    Storage(settings).publish(run)
    (run.path / "environment.json").write_text('[{"time": "2020-01-01T00:00:00+00:00"}]')
    run.write_manifest()
    client = client_of(settings.endpoint_url or "")
    day = f"team/runs/dt=2020-01-01/run_id={run.run_id}/manifest.json"
    other = json.dumps({"started": "2020-01-01T09:00:00+00:00"}).encode()
    client.put_object(Bucket=BUCKET, Key=day, Body=other, Metadata={"sha256": "0" * 64})
    with pytest.raises(ConfigurationError, match="another run is there as same-id"):
        Storage(settings).publish(run)


def test_what_an_export_adds_later_is_published_too(
    server: str, settings: config.Storage, run: RunFolder
) -> None:
    run.path.rename(run.path.with_name("later"))
    run = RunFolder(run.path.with_name("later"))
    Storage(settings).publish(run)
    write(run.path / "model" / "some.mar", b"an archive")
    run.write_manifest()
    assert Storage(settings).publish(run) == 2
    root = f"team/runs/dt={run.started[:10]}/run_id=later"
    assert f"{root}/model/some.mar" in keys_of(server, root)


@pytest.mark.parametrize(
    ("changes", "environment", "complaint"),
    [
        ({"uri": "s3://no-such-bucket/x"}, {}, "no such bucket|access denied"),
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "access denied|secret key"),
        ({"endpoint_url": "http://127.0.0.1:9"}, {}, "Could not connect"),
    ],
)
def test_storage_that_fails_says_what_to_do_in_one_line(
    settings: config.Storage,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    environment: dict[str, str],
    complaint: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError, match=complaint) as caught:
        Storage(settings.model_copy(update=changes)).check()
    assert "\n" not in str(caught.value)


def test_without_credentials_the_names_of_the_variables_are_told(
    settings: config.Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UnavailableError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        Storage(settings).check()


def test_an_unfinished_run_is_not_published(settings: config.Storage, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "half")
    with folder.open(tiny_config()):
        pass
    with pytest.raises(UnavailableError, match="not a finished run"):
        Storage(settings).publish(folder)


def test_a_job_publishes_itself_and_finishes_without_storage_all_the_same(
    settings: config.Storage, tmp_path: Path
) -> None:
    raw = tiny(optim={"epochs": 1}, storage=settings.model_dump())
    raw["variants"] = raw["variants"][2:]
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(raw))
    arguments = ("run", "--config", file, "--out", tmp_path, "--run-id", "r")
    away = ("--set", "storage.endpoint_url=http://127.0.0.1:9", "--set", "storage.attempts=1")

    done = job(*arguments, *away)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: not published") == 1
    folder = RunFolder(tmp_path / "r")
    before = sha256(folder.path / "manifest.json")

    failed = job("publish", folder.path, *away)
    assert failed.returncode == 3 and "Could not connect" in failed.stderr
    sent = job("publish", folder.path, "--set", f"storage.endpoint_url={settings.endpoint_url}")
    assert sent.returncode == 0, sent.stderr
    assert f"{len(folder.manifest()['files']) + 1} files sent" in sent.stdout
    assert sha256(folder.path / "manifest.json") == before
    for file in folder.path.rglob("*.*"):
        assert SECRET.encode() not in file.read_bytes()
