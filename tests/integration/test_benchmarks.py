"""The benchmarks run, on little, and write down what they were made on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiny
from drawings import make_photos


def measured(name: str, out: Path, *options: str, file: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    figures: dict[str, Any] = json.loads((out / f"{file or name}.json").read_text())
    assert {"device", "packages", "commit", "threads"} <= set(figures["made_on"])
    return figures


@pytest.mark.slow
def test_the_lectures_loop_and_the_job_are_measured_in_turns(tmp_path: Path) -> None:
    small = ("--size", "75", "--train", "8", "--test", "1", "--epochs", "1", "--rounds", "1")
    figures = measured("training", tmp_path, *small)
    seconds = {side: figures[side]["seconds_per_image"][0] for side in ("lecture", "job")}
    assert figures["ratio"] == pytest.approx(seconds["lecture"] / seconds["job"])
    assert figures["job"]["peak_memory_bytes"] > 100e6


@pytest.mark.slow
def test_a_technique_is_switched_off_alone(tmp_path: Path) -> None:
    small = ("--size", "75", "--epochs", "1", "--rounds", "1")
    options = ("--techniques", "trunk once", *small)
    figures = measured("training", tmp_path, *options, file="techniques")
    [(name, [ratio])] = figures["times_as_long_without"].items()
    assert name == "trunk once" and ratio > 0
    assert figures["made_on"]["command"][0] == "python -m benchmarks.training"


@pytest.mark.slow
def test_scaling_is_measured_over_images_batches_and_processes(tmp_path: Path) -> None:
    small = ["--size", "75", "--images", "4", "8", "--batches", "2", "4", "--processes", "1", "2"]
    figures = measured("scaling", tmp_path, *small)
    found = {key: list(found) for key, found in figures.items() if "_by_" in key}
    assert found == {
        "seconds_by_images": ["4", "8"],
        "images_per_second_by_batch": ["2", "4"],
        "images_per_second_by_processes": ["1", "2"],
    }
    assert all(figure > 0 for key in found for figure in figures[key].values())


@pytest.mark.slow
def test_the_start_is_measured(tmp_path: Path) -> None:
    seconds = measured("start", tmp_path, "--rounds", "1")["seconds"]
    assert all(taken > 0 for [taken] in seconds.values())
    assert set(seconds) == {"import jobs.cli", "--help", "first step", "finished run"}


@pytest.mark.slow
def test_memory_is_measured(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    data = ("--data", str(tmp_path / "photos"), "--size", "75")
    figures = measured("memory", tmp_path, *data)
    assert figures["images"] == 26 and figures["model_bytes"] > 4 * 25e6, "its weights"


@pytest.mark.slow
def test_the_measurement_for_a_gpu_reads_all_from_the_run(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    raw = tiny(optim={"epochs": 1, "batch_size": 4}, evaluation={"batch_norm_images": 0})
    raw["data"] |= {"train_images": None, "test_images": None}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(raw))
    options = ("--data", str(tmp_path / "photos"), "--weights", "random", "--runs", "eager")
    figures = measured("gpu", tmp_path, "--config", str(config), *options)
    variants = figures["runs"]["eager"]["variants"]
    assert set(variants) == {"scratch", "finetune", "frozen"}
    assert variants["scratch"]["training_images_per_second"][0] > 0


@pytest.mark.slow
def test_scoring_is_measured_against_the_network_alone(archive: Path, tmp_path: Path) -> None:
    small = ("--archive", str(archive), "--images", "16", "--rounds", "1")
    figures = measured("scoring", tmp_path, *small)
    rates, ratios = figures["images_per_second"], figures["score_over"]
    assert ratios["network"] == pytest.approx(rates["score"] / rates["network"])


def test_a_step_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import profile

    small = ("--steps", "1", "--batch", "2", "--size", "75", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["profile", *small])
    profile.main()
    figures = json.loads((tmp_path / "profile.json").read_text())
    seconds = figures["seconds_a_step"]
    kinds = {"convolution", "convolution backward", "batch norm", "optimizer and average"}
    assert kinds <= set(seconds) and figures["seconds"] > 0
    assert seconds["other"] < sum(seconds.values()) / 2, "most operators have been recognised"
