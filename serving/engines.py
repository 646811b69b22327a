"""The programs that run the network behind the gateway; each answers the same requests."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from serving import processes, torchserve
from serving.archive import Model
from serving.settings import Settings

Start = Callable[[Model, Settings, Path, Mapping[str, int]], subprocess.Popen[bytes]]


def start_asgi(
    model: Model, settings: Settings, state: Path, ports: Mapping[str, int]
) -> subprocess.Popen[bytes]:
    """Starts `serving/asgi.py` with the model's archive.

    Args:
        state: where it may write.
        ports: one for `inference`, where its metrics are, too.
    """
    environment = {"TMPDIR": str(state), **processes.compiling(settings.compile_cache, state)}
    command = [sys.executable, "-m", "serving.asgi", str(model.path), str(ports["inference"])]
    command += [settings.model_dump_json(exclude={"api_keys"})]
    return processes.spawn(command, state, environment)


PORTS: Mapping[str, tuple[str, ...]] = {"torchserve": torchserve.PORTS, "asgi": ("inference",)}
START: Mapping[str, Start] = {"torchserve": torchserve.start, "asgi": start_asgi}
