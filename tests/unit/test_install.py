"""What the first command says where it cannot install; it resumes a partial installation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "requirements" / "install.sh"


def install(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT), "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "VENV": str(venv), **environment},
    )


def program(folder: Path, name: str, script: str) -> str:
    """A folder for PATH, in which `name` is this shell script."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_without_python_it_says_which_is_needed(tmp_path: Path) -> None:
    done = install(tmp_path / "venv", PYTHON="python-that-is-not-there")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "python-that-is-not-there is not installed; Python 3.11 to 3.13 is needed" in done.stderr


def test_another_python_is_refused_by_its_version(tmp_path: Path) -> None:
    old = program(tmp_path / "bin", "python3", '[ "$1" = -V ] && echo Python 3.9.2 || exit 1')
    done = install(tmp_path / "venv", PYTHON="python3", PATH=old)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Python 3.9.2 is not supported: Python 3.11 to 3.13 is needed" in done.stderr


def test_a_full_disk_is_found_before_anything_is_fetched(tmp_path: Path) -> None:
    columns = "echo Filesystem 1024-blocks Used Available Capacity Mounted"
    full = program(tmp_path / "bin", "df", f"{columns}; echo /dev/x 9000000 8000000 1000000 90% /")
    done = install(tmp_path / "venv", PATH=full)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the disk is too full" in done.stderr and not (tmp_path / "venv").exists()


def test_a_registry_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    nowhere |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": ""}
    done = install(tmp_path / "venv", **nowhere)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "error: no uv from the package registry: " in done.stderr


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """An environment whose uv writes down how it was called, and fails at first."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    calls = tmp_path / "calls"
    program(venv / "bin", "uv", f'echo "$@" >> {calls}; [ "$(wc -l < {calls})" -gt 1 ]')
    return calls


def test_an_installation_that_failed_is_mended_by_the_same_command(recorded: Path) -> None:
    venv = recorded.parent / "venv"
    failed, mended, done = (install(venv) for _ in range(3))
    assert failed.returncode == 1 and "the same command resumes it" in failed.stderr
    assert mended.returncode == 0 and "was not completed" in mended.stdout
    assert done.returncode == 0 and not done.stdout
    calls = recorded.read_text().splitlines()
    assert [("--reinstall" in call) for call in calls] == [False, True, False]
    assert all(call.endswith("--editable .[export]") for call in calls)


def test_the_versions_are_those_of_the_images(recorded: Path) -> None:
    venv = recorded.parent / "venv"
    install(venv)
    locked = (venv / "train.txt").read_text()
    assert "--constraint" in recorded.read_text()
    for package in ("torch", "torchvision", "numpy", "openvino"):
        assert sum(line.startswith(f"{package}==") for line in locked.splitlines()) == 1
    assert "sha256" not in locked, "PyTorch's own index has the same versions in other files"


def test_pytorch_without_cuda_is_one_variable(recorded: Path) -> None:
    install(recorded.parent / "venv", TORCH_BACKEND="cpu")
    assert "--torch-backend cpu" in recorded.read_text()


def test_a_mirror_that_pip_knows_is_uvs_too(recorded: Path) -> None:
    venv = recorded.parent / "venv"
    program(venv / "bin", "uv", f'echo "$UV_DEFAULT_INDEX" >> {recorded}')
    install(venv, PIP_INDEX_URL="https://mirror.example/simple")
    assert recorded.read_text() == "https://mirror.example/simple\n"
