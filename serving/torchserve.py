"""Starts TorchServe on loopback: no snapshots, no token authorisation, no system metrics."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from serving import processes
from serving.archive import Model
from serving.settings import Settings

METRICS = Path(__file__).parent / "metrics.yaml"
LOGGING = Path(__file__).parent / "gateway" / "log4j2.xml"
WITHOUT_TORCH = Path(__file__).parent / "without_torch"
PORTS = ("inference", "management", "metrics", "grpc_inference", "grpc_management")


def start(
    model: Model, settings: Settings, state: Path, ports: Mapping[str, int]
) -> subprocess.Popen[bytes]:
    """Starts it with the model's archive; its output comes through a pipe.

    Args:
        state: where it may write.
        ports: one for each of PORTS.
    """
    store = state / "store"
    store.mkdir()
    (store / f"{model.name}.mar").symlink_to(model.path)
    config = state / "config.properties"
    properties = _properties(model, settings, store, ports)
    # Java takes a backslash for the beginning of an escape.
    lines = [f"{key}={value}\n".replace("\\", "\\\\") for key, value in properties.items()]
    config.write_text("".join(lines))
    environment = {
        **dict.fromkeys(("TEMP", "TMPDIR", "LOG_LOCATION", "METRICS_LOCATION"), str(state)),
        **processes.compiling(settings.compile_cache, state),
        "JAVA_HOME": str(processes.java_home()),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not processes.gpus():
        found = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{WITHOUT_TORCH}:{found}" if found else str(WITHOUT_TORCH)
    command = [processes.script("torchserve"), "--start", "--foreground", "--ncs"]
    command += ["--ts-config", str(config), "--log-config", str(LOGGING)]
    return processes.spawn(command, state, environment, subprocess.PIPE)


def _properties(
    model: Model, settings: Settings, store: Path, ports: Mapping[str, int]
) -> dict[str, object]:
    addresses = {f"{n}_address": f"http://127.0.0.1:{ports[n]}" for n in PORTS[:3]}
    # It has no switch for gRPC, and two instances would both want the default ports.
    grpc = {f"{n}_port": ports[n] for n in PORTS[3:]} | {
        f"{n}_address": "127.0.0.1" for n in PORTS[3:]
    }
    return {
        **addresses,
        **grpc,
        "metrics_mode": "prometheus",
        "metrics_config": METRICS,
        "model_store": store,
        "load_models": f"{model.name}.mar",
        "models": json.dumps({model.name: {model.version: _model(model, settings)}}),
        "job_queue_size": settings.queue_size,
        "decode_input_request": "false",  # the handler reads JSON itself and says what is wrong
        "max_request_size": 2 * settings.max_body_bytes,  # the gateway refuses first, and clearly
        "disable_token_authorization": "true",
        "enable_envvars_config": "false",
        "disable_system_metrics": "true",
        "install_py_dep_per_model": "false",
        "allowed_urls": f"file://{store}/.*",
    }


def _model(model: Model, settings: Settings) -> dict[str, object]:
    """What the archive says of batches would win, so it says nothing."""
    return {
        "defaultVersion": True,
        "marName": f"{model.name}.mar",
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch_size,
        "maxBatchDelay": settings.batch_delay_ms,
        "responseTimeout": settings.response_seconds,
        "startupTimeout": settings.startup_seconds,
    }


def follow(output: IO[bytes], on_error: Callable[[str], None]) -> None:
    """Passes its output on to ours, on a thread of its own, and reports the last lines of
    tracebacks: TorchServe itself never says why a worker does not start."""

    def work() -> None:
        for line in output:
            with suppress(OSError):  # nobody may read ours, and its pipe must not fill up
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            if (error := _error_in(line)) is not None:
                on_error(error)

    threading.Thread(target=work, daemon=True).start()


def _error_in(line: bytes) -> str | None:
    try:
        event = str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):
        return None
    name, colon, _ = event.partition(": ")
    is_error = colon and name.endswith(("Error", "Exception")) and " " not in name
    return event if is_error else None
