"""The programs that run the network behind the gateway; each answers the same requests."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from serving import processes, torchserve
from serving.archive import Model
from serving.settings import Settings

Start = Callable[[Model, Settings, Path, Mapping[str, int]], subprocess.Popen[bytes]]


class Shadow(BaseModel):
    """The engine of a second archive, whose answers are only compared."""

    port: int
    """On loopback."""
    versions: dict[str, str]
    """Of the archives, by their roles: `live` and `shadow`."""
    accuracies: dict[str, float]
    """The lower ends of their intervals on the test set, where that is known."""


def start_asgi(
    model: Model,
    settings: Settings,
    state: Path,
    ports: Mapping[str, int],
    shadow: Shadow | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `serving/asgi.py` with the model's archive.

    Args:
        state: where it may write.
        ports: one for `inference`, where its metrics are, too.
        shadow: what it is to be compared with.
    """
    command, environment = _asgi(model, settings, state, ports["inference"])
    command += [shadow.model_dump_json()] if shadow else []
    return processes.spawn(command, state, environment)


def start_shadow(
    model: Model, settings: Settings, state: Path, port: int
) -> subprocess.Popen[bytes]:
    """Starts the same for an archive that is only compared: with one worker, which waits while
    others want the processor."""
    alone = settings.model_copy(update={"workers": 1})
    command, environment = _asgi(model, alone, state, port)
    return processes.spawn(["nice", "-n", "10", *command], state, environment)


def _asgi(
    model: Model, settings: Settings, state: Path, port: int
) -> tuple[list[str], dict[str, str]]:
    environment = {"TMPDIR": str(state), **processes.compiling(settings.compile_cache, state)}
    given = settings.model_dump_json(exclude={"api_keys"})
    command = [sys.executable, "-m", "serving.asgi", str(model.path), str(port), given]
    return command, environment


PORTS: Mapping[str, tuple[str, ...]] = {"torchserve": torchserve.PORTS, "asgi": ("inference",)}
START: Mapping[str, Start] = {"torchserve": torchserve.start, "asgi": start_asgi}
