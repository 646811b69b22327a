"""What TorchServe is told."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serving import processes, torchserve
from serving.archive import Model
from serving.settings import Settings


def started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1", **settings: Any
) -> tuple[dict[str, str], dict[str, Any]]:
    """Its environment, and what it is told of the model."""
    given: list[dict[str, str]] = []

    def spawn(command: Any, state: Path, environment: dict[str, str], output: Any) -> object:
        given.append(environment)
        return subprocess.Popen

    monkeypatch.setattr(processes, "spawn", spawn)
    model = cast(Model, SimpleNamespace(name="m", version=version, path=folder / "m.mar"))
    state = folder / "state"
    state.mkdir()
    ports = dict.fromkeys(torchserve.PORTS, 1)
    torchserve.start(model, Settings(model_uri="m.mar", **settings), state, ports)
    lines = (state / "config.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    as_java_reads = re.sub(r"\\(.)", r"\1", properties["models"])
    return given[0], json.loads(as_java_reads)["m"][version]


@pytest.mark.parametrize("version", ['it\'s "one"', r"back\slash", "ä b#c"])
def test_a_version_may_have_any_name(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = started(tmp_path, monkeypatch, version)
    assert model["marName"] == "m.mar"


def test_a_worker_has_the_time_that_the_settings_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = started(tmp_path, monkeypatch, startup_seconds=17)
    assert model["startupTimeout"] == 17


@pytest.mark.parametrize("kept", [None, Path("elsewhere")])
def test_compiled_kernels_lie_where_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path | None
) -> None:
    environment, _ = started(tmp_path, monkeypatch, compile_cache=kept)
    folder = kept.absolute() if kept else tmp_path / "state" / "inductor"  # the engine's is another
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(folder)


@pytest.mark.parametrize(("cores", "compilers"), [(1, "1"), (64, "4")])
def test_few_compilers_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, compilers: str
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: cores)
    environment, _ = started(tmp_path, monkeypatch)
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == compilers
