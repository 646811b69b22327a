"""`make demo` as one command, on a job that has been made small."""

import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from command import Job, ended, start_job

from jobs import demo
from jobs.runs import RunFolder
from serving import s3

SMALL = (
    *("data.source=generated", "data.train_images=40", "data.test_images=20", "data.input_size=75"),
    *("data.validation=0.25", "weights.source=random", "optim.epochs=1", "optim.batch_size=10"),
    *("optim.aux_weight=0.0", "variants.frozen.optim.epochs=1"),
    *("export.calibration_images=20", "evaluation.batch_norm_images=20"),
)


def start(folder: Path, *more: str) -> Job:
    arguments = [part for setting in (*SMALL, *more) for part in ("--set", setting)]
    return start_job("demo", "--out", folder, *arguments)


def until_it_serves(process: Job) -> str:
    """What the demo has said by the time that it says where the service is."""
    while "Ctrl-C stops everything" not in process.said()[0]:
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    return process.said()[0]


def left_behind(children: list[psutil.Process]) -> list[psutil.Process]:
    """Which of them still run; one that has just ended may wait a moment to be reaped."""
    alive: list[psutil.Process] = psutil.wait_procs(children, timeout=60)[1]
    return alive


def test_the_demo_asks_for_pictures_that_its_run_was_trained_on(
    compared: RunFolder, tmp_path: Path
) -> None:
    """… though an earlier demo, of other data, has left its own."""
    given = compared.config()
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    (other.path / "data.json").write_bytes((compared.path / "data.json").read_bytes())
    changed = given.model_copy(update={"data": given.data.model_copy(update={"seed": 7})})
    first = demo._pictures(given, compared, tmp_path / "pictures")
    second = demo._pictures(changed, other, tmp_path / "pictures")
    assert len(first) == len(second) == 3 and not {*first} & {*second}
    assert demo._pictures(given, compared, tmp_path / "pictures") == first
    second[0].unlink()  # the one before was killed
    assert demo._pictures(changed, other, tmp_path / "pictures") == second


def test_boto3_finds_the_demos_server_whatever_else_it_is_set_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = {
        "AWS_ENDPOINT_URL": "https://one.example",
        "AWS_ENDPOINT_URL_S3": "https://two.example",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    }
    monkeypatch.setattr(os, "environ", {**os.environ, **others})
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    store = demo.ObjectStore(tmp_path, keys, "demo")
    demo._use(store)
    assert s3.default_client().meta.endpoint_url == store.address


@pytest.mark.slow
def test_the_demo_trains_promotes_serves_and_answers_and_a_second_call_is_quick(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        with ended([start(tmp_path / "runs")]) as [process]:
            said = until_it_serves(process)
            children = psutil.Process(process.pid).children(recursive=True)
            names = {child.name() for child in children}
            assert {"weed", "caddy", "java"} <= names
            assert len(re.findall(r"\d-\S+\.png\t\S.*\t[01]\.\d+", said)) == 3, said
            url = re.search(r"http://\S+", said)
            assert url and b"<html" in urllib.request.urlopen(url[0]).read().lower()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert not left_behind(children)
    assert "scratch:" not in errors, "nothing is trained a second time"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stops_cleanly_while_it_trains(tmp_path: Path, number: signal.Signals) -> None:
    with ended([start(tmp_path, "optim.epochs=500")]) as [process]:
        while not list(tmp_path.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.said()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert children and not left_behind(children)
