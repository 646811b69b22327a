"""The command line: promptness, exit codes, and what survives a kill."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import job, start_job, stop_when, tiny
from safetensors.torch import load_file

from jobs.runs import RunFolder


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['jobs', '--help']\n"
        "from jobs.cli import app\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    for command in ("run", "train", "report", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["run", "--config", "nope"], 2, "no such file"),
        (["run", "--set", "optim.epoch=1"], 2, "optim.epoch: Extra inputs"),
        (["run", "--set", "runtime.device=cuda"], 2, "PyTorch sees no GPU"),
        (["run", "--run-id", "../elsewhere"], 2, "a plain name is needed"),
        (["train", "fourth"], 2, "scratch, finetune, frozen, not fourth"),
        (["report", "."], 3, "not a run folder"),
        (["fly"], 2, "No such command"),
        (
            ["train", "frozen", "--config", "quickstart", "--out", "/proc/nowhere"],
            3,
            "/proc/nowhere",
        ),
        (
            ["run", "--set", "data.source=folder", "--set", "data.root=/nowhere"],
            3,
            "/nowhere/train: no such folder",
        ),
        (
            [
                "train",
                "frozen",
                "--config",
                "quickstart",
                "--set",
                "weights.source=/no.safetensors",
            ],
            3,
            "weights /no.safetensors: no such file",
        ),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_a_documented_code(
    arguments: list[str], code: int, complaint: str, tmp_path: Path
) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if arguments[0] in ("run", "train"):
        arguments = [arguments[0], "--out", str(tmp_path), *arguments[1:]]
    done = job(*arguments)
    assert done.returncode == code, done.stderr
    assert complaint in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_doctor_says_whether_a_configuration_can_run_here(tiny_yaml: Path) -> None:
    fine = job("doctor", "--config", tiny_yaml)
    assert fine.returncode == 0, fine.stderr
    for subject in ("versions", "device", "memory", "cache", "data", "weights"):
        assert f"ok  {subject}" in fine.stdout
    bad = job("doctor", "--config", tiny_yaml, "--set", "weights.source=/nowhere.safetensors")
    assert bad.returncode == 3
    assert "NO  weights" in bad.stdout and "cannot run here yet: weights" in bad.stderr


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best.safetensors")


def test_killed_and_stopped_anywhere_the_same_command_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    """SIGKILL in an epoch, SIGTERM in the next start, then to the end; against a run in one go."""
    config = tmp_path / "job.yaml"
    raw = tiny(runtime={"checkpoint_every": 2}, weights={"source": "stand-in"})
    raw["weights"]["stand_in"] = {"images": 20, "epochs": 1}
    config.write_text(yaml.safe_dump(raw))

    whole = job("run", "--config", config, "--out", tmp_path / "whole", "--run-id", "r")
    assert whole.returncode == 0, whole.stderr
    expected = tmp_path / "whole" / "r"

    arguments = ("run", "--config", config, "--out", tmp_path / "cut", "--run-id", "r")
    cut = tmp_path / "cut" / "r"
    checkpoint = cut / "variants" / "scratch" / "last.ckpt"
    assert stop_when(checkpoint, start_job(*arguments), signal.SIGKILL) == -signal.SIGKILL
    assert checkpoint.is_file() and not (checkpoint.parent / "result.json").exists()
    checkpoint = cut / "variants" / "finetune" / "last.ckpt"
    assert stop_when(checkpoint, start_job(*arguments), signal.SIGTERM) == 75
    assert checkpoint.is_file() and not (cut / "manifest.json").exists()
    last = job(*arguments)
    assert last.returncode == 0, last.stderr
    assert "goes on in epoch" in last.stderr

    for name in ("scratch", "finetune", "frozen"):
        ours, theirs = weights_of(cut / "variants" / name), weights_of(expected / "variants" / name)
        differing = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        assert not differing, f"{name} differs in {differing[:3]}"
    rows = [RunFolder(path).metrics() for path in (cut, expected)]
    assert [(r["variant"], r["epoch"], r["split"], r["loss"]) for r in rows[0]] == [
        (r["variant"], r["epoch"], r["split"], r["loss"]) for r in rows[1]
    ]
    assert not list(cut.rglob("*.part")) and not list(cut.rglob("last.ckpt"))

    before = {p: p.stat().st_mtime_ns for p in cut.rglob("*") if p.name != ".lock"}
    again = job(*arguments)
    assert again.returncode == 0 and "is finished; --run-id" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in cut.rglob("*") if p.name != ".lock"} == before


def test_train_does_one_variant_and_run_does_the_rest(tiny_yaml: Path, tmp_path: Path) -> None:
    arguments = ("--config", tiny_yaml, "--set", "optim.epochs=1", "--out", tmp_path)
    first = job("train", "frozen", *arguments)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert [p.name for p in (folder / "variants").iterdir()] == ["frozen"]
    assert not (folder / "manifest.json").exists()
    weights = (folder / "variants" / "frozen" / "best.safetensors").stat().st_mtime_ns
    rest = job("run", *arguments)
    assert rest.returncode == 0, rest.stderr
    assert (folder / "manifest.json").exists()
    assert (folder / "variants" / "frozen" / "best.safetensors").stat().st_mtime_ns == weights
    assert str(folder / "report" / "index.html") in rest.stdout


def test_one_variant_that_diverges_leaves_the_others_running(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    settings = ("--set", "optim.epochs=1", "--set", "variants.scratch.optim.learning_rate=1e30")
    done = job("run", "--config", tiny_yaml, *settings, "--out", tmp_path, "--run-id", "r")
    assert done.returncode == 0, done.stderr
    assert "scratch: stopped: the loss was no longer finite in epoch 1" in done.stderr
    result = json.loads((tmp_path / "r" / "comparison.json").read_text())
    assert result["variants"]["scratch"]["status"] == "diverged"
    assert result["variants"]["finetune"]["status"] == "done"
    assert result["winner"] in ("finetune", "frozen")
    assert "no longer finite" in (tmp_path / "r" / "report" / "index.html").read_text()
