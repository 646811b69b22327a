"""`make demo` as one command, on a job that has been made small."""

import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import start_job

SMALL = (
    *("data.train_images=80", "data.test_images=40", "data.input_size=75", "optim.aux_weight=0.0"),
    *("variants.frozen.optim.aux_weight=0.0", "weights.source=random", "optim.epochs=1"),
    *("data.validation=0.25", "export.calibration_images=20", "evaluation.batch_norm_images=20"),
)


def start(folder: Path) -> tuple[subprocess.Popen[str], str, float]:
    """Runs the demo until it says where the service is: the process, what it said, seconds."""
    arguments = [part for setting in SMALL for part in ("--set", setting)]
    begin = time.monotonic()
    process = start_job("demo", "--folder", folder, *arguments)
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if "Ctrl-C stops everything" in line:
            return process, said, time.monotonic() - begin
    raise AssertionError(process.communicate()[1])


def left_behind(children: list[psutil.Process]) -> list[psutil.Process]:
    """Which of them still run; one that has just ended may wait a moment to be reaped."""
    return psutil.wait_procs(children, timeout=10)[1]


def test_the_demo_trains_promotes_serves_and_answers_and_a_second_call_is_quick(
    tmp_path: Path,
) -> None:
    seconds = []
    for _ in range(2):
        process, said, took = start(tmp_path / "demo")
        seconds.append(took)
        children = psutil.Process(process.pid).children(recursive=True)
        names = {child.name() for child in children}
        assert {"weed", "caddy", "java"} <= names
        assert len(re.findall(r"\d-\S+\.png\t\S.*\t[01]\.\d+", said)) == 3, said
        url = re.search(r"http://\S+", said)
        assert url and b"<html" in urllib.request.urlopen(url[0]).read().lower()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert not left_behind(children)
    assert "scratch:" not in errors, "nothing is trained a second time"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stops_cleanly_while_it_trains(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [part for setting in SMALL for part in ("--set", setting)]
    process = start_job("demo", "--folder", tmp_path, *arguments, "--set", "optim.epochs=500")
    while not list(tmp_path.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert not left_behind(children)
