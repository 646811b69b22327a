"""A run that is killed or stopped anywhere goes on, and ends as if nothing had happened."""

import signal
from pathlib import Path

import pytest
import torch
import yaml
from command import called, start_job, stop_when
from conftest import changed_at, tiny
from safetensors.torch import load_file

from jobs.runs import RunFolder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best.safetensors")


@pytest.mark.usefixtures("thin", "undrawn")
def test_killed_and_stopped_anywhere_the_same_command_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    """SIGKILL in an epoch, SIGTERM in the next start, then to the end; against variants that are
    trained in one go, without a checkpoint."""
    stand_in = {"images": 40, "optim": {"epochs": 1, "batch_size": 20}}

    def arguments(name: str, checkpoint_every: int) -> tuple[str | Path, ...]:
        raw = tiny(
            data={"train_images": 40, "test_images": 20, "cache": str(tmp_path / name / "cache")},
            optim={"epochs": 4},
            runtime={"checkpoint_every": checkpoint_every},
            weights={"source": "stand-in", "stand_in": stand_in},
        )
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(raw))
        return ("--config", config, "--out", tmp_path / name, "--run-id", "r")

    for name in ("scratch", "finetune", "frozen"):
        whole = called("train", name, *arguments("whole", 0))
        assert whole.returncode == 0, whole.stderr
    expected = tmp_path / "whole" / "r"
    run = ("run", *arguments("cut", 2))  # of the three steps of an epoch

    cut = tmp_path / "cut" / "r"
    checkpoint = cut / "variants" / "scratch" / "last.ckpt"
    assert stop_when(checkpoint, start_job(*run), signal.SIGKILL) == -signal.SIGKILL
    assert checkpoint.is_file() and not (checkpoint.parent / "result.json").exists()
    half = checkpoint.with_name(".last.ckpt.1.part")  # of a process that is gone
    half.write_bytes(b"PK")
    checkpoint = cut / "variants" / "finetune" / "last.ckpt"
    assert stop_when(checkpoint, start_job(*run), signal.SIGTERM) == 75
    assert checkpoint.is_file() and not (cut / "manifest.json").exists()
    assert not half.exists()
    last = called(*run)
    assert last.returncode == 0, last.stderr
    assert "resumes in epoch" in last.stderr

    for name in ("scratch", "finetune", "frozen"):
        ours, theirs = weights_of(cut / "variants" / name), weights_of(expected / "variants" / name)
        differing = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        assert not differing, f"{name} differs in {differing[:3]}"
    rows = [RunFolder(path).metrics() for path in (cut, expected)]
    assert [(r["variant"], r["epoch"], r["split"], r["loss"]) for r in rows[0]] == [
        (r["variant"], r["epoch"], r["split"], r["loss"]) for r in rows[1]
    ]
    assert not list(cut.rglob("*.part")) and not list(cut.rglob("last.ckpt"))

    before = changed_at(cut)
    again = called(*run)
    assert again.returncode == 0 and "is finished; --run-id" in again.stderr
    assert changed_at(cut) == before
