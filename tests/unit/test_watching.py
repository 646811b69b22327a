"""`watch` shows how far a run is while it goes on, without loading torch."""

import io
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, tiny_config
from rich.console import Console
from terminal import COLOUR, on_a_terminal

from jobs import table, watching
from jobs.__main__ import main
from jobs.results import Diverged
from jobs.runs import MANIFEST, RunFolder
from serving.files import write

LONG = "probe-the-head-then-tune-all-of-the-trunk"


def train(folder: RunFolder, variant: str, epoch: int, accuracy: float = 0.5) -> None:
    """Leaves what an epoch of ten seconds does, after thirty for what came before the first."""
    row = {"variant": variant, "seed": 0, "epoch": epoch, "loss": 1.25, "accuracy": accuracy}
    row |= {"images_per_second": 40.0, "seconds": 30.0 + 10.0 * (epoch + 1)}
    folder.append_metrics([row | {"split": split} for split in ("train", "validation")])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """One that is in its second variant's third epoch of five; the first one has diverged."""
    config = tiny_config(optim={"epochs": 5})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config)
    train(folder, "scratch", 0)
    diverged = Diverged(variant="scratch", seed=0, reason="the loss was no longer finite")
    folder.variant("scratch", 0).save_result(diverged)
    for epoch in range(2):
        train(folder, "finetune", epoch, accuracy=0.25 + epoch / 2)
    return folder


def state(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> Any:
    call("watch", str(run.path), "--json")
    return json.loads(capsys.readouterr().out)


def call(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["jobs", *arguments])
        main()
    assert ended.value.code == 0


def test_programs_get_the_state_of_every_variant(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = state(run, capsys)
    assert said["run"] == str(run.path) and said["finished"] is False
    scratch, finetune, frozen = said["parts"]
    assert scratch["diverged"] and scratch["epoch"] == 1
    assert (finetune["epoch"], finetune["epochs"], finetune["accuracy"]) == (2, 5, 0.75)
    assert (finetune["loss"], finetune["images_per_second"], finetune["test"]) == (1.25, 40, None)
    assert (frozen["epoch"], frozen["ends"]) == (0, None)
    (run.path / MANIFEST).touch()
    assert state(run, capsys)["finished"] is True


def test_the_time_left_is_that_of_later_epochs_for_those_that_remain(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    _, finetune, _ = state(run, capsys)["parts"]
    last = datetime.fromisoformat(run.metrics()[-1]["time"])
    assert (datetime.fromisoformat(finetune["ends"]) - last).total_seconds() == 3 * 10


def test_the_table_fits_a_narrow_terminal_whatever_the_names_are() -> None:
    part = {"variant": LONG, "seed": 12345, "epoch": 999, "epochs": 1000, "diverged": True}
    part |= {"loss": 1.2345, "accuracy": 0.98765, "test": 0.98765, "images_per_second": 98765.4}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.progress([part]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 2
    for figure in ("999/1000", "1.234", "98.77", "98,765", "diverged", LONG[:12]):
        assert figure in lines[1]


def test_without_a_terminal_each_row_is_a_line_once_and_the_end_of_the_run_is_the_end(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[str] = []

    def goes_on(_: float) -> None:
        before.extend(capsys.readouterr().out.splitlines())
        train(run, "finetune", 2, accuracy=0.875)
        write(run.path / MANIFEST, "{}")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=goes_on))
    train(run, "stand-in", 0)  # where a run makes its own pretrained weights
    call("watch", str(run.path))
    assert len(before) == 8 and before[-1].startswith("stand-in with seed 0, epoch 1 of ")
    assert capsys.readouterr().out.splitlines() == [
        f"finetune with seed 0, epoch 3 of 5, {split}: accuracy 87.50 % · loss 1.250 · 40 images/s"
        for split in ("train", "validation")
    ]


def test_an_epoch_that_comes_out_differently_when_done_again_is_a_line_again(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def done_again(_: float) -> None:
        capsys.readouterr()
        train(run, "finetune", 0, accuracy=0.875)
        write(run.path / MANIFEST, "{}")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=done_again))
    call("watch", str(run.path))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("finetune with seed 0, epoch 1 of 5" in line for line in said)
    assert all("accuracy 87.50 %" in line for line in said)


def test_on_a_terminal_the_table_is_all_there_is(run: RunFolder) -> None:
    (run.path / MANIFEST).touch()
    command = [sys.executable, "-m", "jobs", "watch", str(run.path)]
    shown = on_a_terminal(command, NO_COLOR="1")
    assert "finetune" in shown and "75.00" in shown and "diverged" in shown
    assert not COLOUR.search(shown) and "images/s" not in shown
    plain = on_a_terminal(command, CI="true")
    assert "\x1b" not in plain and "images/s" in plain


def test_what_is_no_run_is_one_line_and_code_3(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "watch", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "not a run folder" in done.stderr
    assert "Traceback" not in done.stderr
