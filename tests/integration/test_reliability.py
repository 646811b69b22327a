"""What is lost is noticed, and so is a leak in a service: benchmarks that show it, on little."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from service import leaking

from benchmarks import chaos, soak
from jobs.demo import ObjectStore
from jobs.runs import RunFolder


def benchmark(
    name: str, out: Path, *options: str, **environment: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, figures and output of one; there are figures whatever it found."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    files = list(out.glob("*.json"))
    assert files, done.stderr
    return done.returncode, json.loads(files[0].read_text()), done.stdout


def test_a_run_is_read_whole_and_every_difference_from_another_is_a_loss(
    exported: RunFolder, tmp_path: Path
) -> None:
    """What `make chaos` asks after every kill; test_interrupted.py kills a job."""
    shutil.copytree(exported.path, tmp_path / "r")
    trial = chaos.Trial(tmp_path, ObjectStore(tmp_path / "s3", chaos.KEYS, "none"), tmp_path)
    assert trial.look() > 20 and trial.lost == []
    before = chaos.outcome(exported)
    assert chaos.outcome(trial.run) == before
    assert trial.phase() == "publish, promote"

    weights = trial.run.path / "variants" / "frozen" / "best.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = chaos.outcome(trial.run)["digests"]
    different = {name for name, digest in changed.items() if digest != before["digests"][name]}
    assert different == {"variants/frozen/best.safetensors"}


def test_what_a_kill_has_broken_is_found(tmp_path: Path) -> None:
    for name in ("half.json", "half.npz", "half.safetensors", "half.ckpt", "half.mar"):
        (tmp_path / name).write_bytes(b"{")
        with pytest.raises(Exception, match=r".") as error:
            chaos.opened(tmp_path / name)
        assert not isinstance(error.value, AssertionError)
    (tmp_path / "whole.json").write_text("{}")
    chaos.opened(tmp_path / "whole.json")


def test_memory_that_grows_is_told_from_a_service_that_warms_up() -> None:
    warming = [100.0 + min(i, 20) for i in range(100)]
    leaking = [100.0 + i for i in range(100)]
    assert soak.growth(warming) == 0 and soak.slope(warming) == pytest.approx(0)
    assert soak.growth(leaking) == pytest.approx(65) and soak.slope(leaking) == pytest.approx(3600)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "growth"), [("torchserve", "400"), ("asgi", "100")])
def test_good_bad_slow_and_silent_clients_get_what_is_theirs(
    archive: Path, tmp_path: Path, engine: str, growth: str
) -> None:
    """In the first minute, in which Java's heap grows by 80 MB: half an hour would tell a leak."""
    options = ["--archive", str(archive), "--engine", engine, "--seconds", "60"]
    options += ["--growth", growth]
    code, figures, said = benchmark("soak", tmp_path, *options)
    assert (code, figures["unexpected"]) == (0, []), said
    kinds = {"good 200", "bad 400", "slow 200", "silent, opened"}
    assert kinds <= {kind for kind, count in figures["answers"].items() if count}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchserve", "asgi"])
def test_no_request_is_too_broken_or_too_large(archive: Path, tmp_path: Path, engine: str) -> None:
    options = ("--archive", str(archive), "--engine", engine, "--n", "150", "--idle", "0")
    code, figures, said = benchmark(
        "fuzz", tmp_path, *options, "--milliseconds", "60000", "--longest", "300"
    )
    assert (code, figures["wrong"]) == (0, []), said
    assert {"head: 400", "jpeg: 200", "webp: 400", "json: 400"} <= figures["answers"].keys()


@pytest.mark.slow
def test_whichever_part_is_killed_answers_come_again(archive: Path, tmp_path: Path) -> None:
    options = ("--archive", str(archive), "--engine", "asgi", "--times", "1", "--stops", "1")
    code, figures, said = benchmark("recovery", tmp_path, *options)
    assert code == 0, said
    assert [len(figures[part]["seconds"]) for part in ("engine", "gateway")] == [1, 1]
    assert figures["SIGTERM"]["in_flight"].keys() == {"200"}


@pytest.mark.slow
def test_a_leak_is_found(archive: Path, tmp_path: Path) -> None:
    options = ("--archive", str(archive), "--engine", "asgi", "--seconds", "20", "--growth", "40")
    environment = leaking(tmp_path / "leak", megabytes=10)
    (tmp_path / "leak" / "go").touch()
    code, figures, _ = benchmark("soak", tmp_path, *options, **environment)
    assert code == 1 and figures["growth_mb"] > 40 and figures["unexpected"] == []
