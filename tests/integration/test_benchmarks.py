"""The benchmarks run, on little, and write down what they were made on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiny
from drawings import make_photos, photo


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
def test_a_bucket_is_measured_against_plain_loops_and_the_disk(tmp_path: Path) -> None:
    for i in range(6):
        photo(tmp_path / "photos" / f"{i}.jpg", seed=i)
    little = ("--count", "6", "--rounds", "1", "--objects", "2000")
    figures = measured("bucket", tmp_path, "--pictures", str(tmp_path / "photos"), *little)
    ways = {"loop", "threads", "mirror", "decode", "disk", "night"}
    assert set(figures["pictures_per_second"]) == ways and figures["pictures"] == 6
    rates = figures["pictures_per_second"]
    assert figures["ratios"]["mirror/loop"] == pytest.approx(rates["mirror"] / rates["loop"])
    assert [row["objects"] for row in figures["listing"]] == [200, 2000]
    assert all(row["peak"] >= row["before"] > 0 for row in figures["listing"])


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_is_kept_stage_by_stage(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    raw = tiny(optim={"epochs": 1, "batch_size": 4}, evaluation={"batch_norm_images": 0})
    raw["data"] |= {"train_images": None, "test_images": None}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(raw))
    options = ["--data", str(tmp_path / "photos"), "--config", str(config), "--weights", "random"]
    options += ["--part=--size 75 --batch 4 --steps 1 --side 64 --pictures 4"]
    options += ["--work", str(tmp_path / "work")]
    options += ["--stages", "ceilings,scoring,checkpoint,decoding,heuristics-256,eager-job"]
    stages = measured("gpu", tmp_path, *options)["stages"]
    assert stages["ceilings"]["copy_bytes_per_second"] > 0
    assert stages["scoring"]["images_per_second"] > 0
    assert stages["heuristics-256"]["images_per_second"] > 0
    assert 0 < stages["checkpoint"]["waited_seconds"] < stages["checkpoint"]["written_seconds"]
    assert stages["decoding"]["images"] and any((tmp_path / "work" / "cache").iterdir())
    variants = stages["eager-job"]["variants"]
    assert set(variants) == {"scratch", "finetune", "frozen"}
    assert variants["scratch"]["training_images_per_second"][0] > 0


@pytest.mark.slow
def test_scoring_is_measured_against_other_ways(archive: Path, tmp_path: Path) -> None:
    small = ("--archive", str(archive), "--images", "16", "--rounds", "1")
    figures = measured("scoring", tmp_path, *small)
    rates, ratios = figures["images_per_second"], figures["score_over"]
    assert set(ratios) == {"network", "loop", "service"} and rates["service"] > 0
    assert ratios["network"] == pytest.approx(rates["score"] / rates["network"])


@pytest.mark.slow
def test_what_class_maps_cost_is_measured_in_turns(tmp_path: Path) -> None:
    small = ("--size", "75", "--calibration", "20", "--rounds", "3")
    figures = measured("maps", tmp_path, *small)
    for found in (figures["float"], figures["int8"]):
        assert found["with"] > 0 and found["without"] > 0 and found["quarter"] > 0


def test_a_stage_that_fails_or_has_no_time_left_is_noted_and_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu

    written: list[dict[str, Any]] = []

    def run(command: list[str], seconds: float, cache: Path | None) -> str:
        if "ceilings" in command:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nError: no kernel\n")
        if "scoring" in command:
            raise subprocess.TimeoutExpired(command, seconds)
        monkeypatch.setattr("time.monotonic", lambda: float("inf"))
        return 'noise\n{"seconds_a_step": 2.0}\n'

    def save(name: str, out: Path, n: int, figures: dict[str, Any]) -> None:
        written.append({**figures["stages"]})

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr("benchmarks.record.save", save)
    stages = "ceilings,scoring,eager-256,eager-512"
    options = ["--stages", stages, "--seconds", "500", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    gpu.main()
    assert [len(stages) for stages in written] == [1, 2, 3, 4]
    assert [stage.get("failed") for stage in written[-1].values()] == [
        *("Error: no kernel", "not done in 500 s", None, "no time was left")
    ]
    assert written[-1]["eager-256"] == {"seconds_a_step": 2.0}


@pytest.mark.usefixtures("thin")
def test_a_step_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import profile

    small = ("--steps", "1", "--batch", "2", "--size", "75", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["profile", *small])
    profile.main()
    figures = json.loads((tmp_path / "profile.json").read_text())
    seconds = figures["seconds_a_step"]
    kinds = {"convolution", "convolution backward", "batch norm", "optimizer and average"}
    assert kinds <= set(seconds) and figures["seconds"] > 0
    assert profile.kind_of("aten::convolution_backward") == "convolution backward"
    assert profile.kind_of("aten::mkldnn_convolution") == "convolution"
    assert profile.kind_of("aten::to") == "other"
