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
    prefix: tuple[str, ...] = (),
) -> subprocess.Popen[bytes]:
    """Starts `serving/asgi.py` with the model's archive.

    Args:
        state: where it may write.
        ports: one for `inference`, where its metrics are, too.
        shadow: what it is to be compared with.
        prefix: a program that starts it.
    """
    environment = {"TMPDIR": str(state), **processes.compiling(settings.compile_cache, state)}
    given = settings.model_dump_json(exclude={"api_keys"})
    command = [*prefix, sys.executable, "-m", "serving.asgi"]
    command += [str(model.path), str(ports["inference"]), given]
    command += [shadow.model_dump_json()] if shadow else []
    return processes.spawn(command, state, environment)


PORTS: Mapping[str, tuple[str, ...]] = {"torchserve": torchserve.PORTS, "asgi": ("inference",)}
START: Mapping[str, Start] = {"torchserve": torchserve.start, "asgi": start_asgi}
