"""Process 1 of the service: starts the engine and the gateway, checks readiness, drains.

Ready means that the archive's golden picture, sent through the gateway, got its expected answer.
On SIGTERM the service first reports that it is not ready, continues to answer while load balancers
notice, lets the gateway finish what is in flight, and only then ends the engine. A child that
dies ends the service with exit code 1, and so do too much memory, after a drain, and ten minutes
of not being ready any more.
"""

import errno
import math
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from serving import api, engines, processes, torchserve
from serving.archive import Model, ModelError
from serving.fetch import located
from serving.files import naming, temporary
from serving.log import log
from serving.readiness import INTERVAL_SECONDS, Readiness
from serving.settings import Settings, SettingsError

READ_ON = 10  # times the largest body: so much is read of a larger one before it is refused
WATCH_SECONDS = 0.25  # between looks at the children, and at a service that is not ready
# TorchServe itself gives up a worker after five minutes, and never starts it again.
GIVE_UP_SECONDS = 600.0  # for a service that was ready
POLITELY = ("nice", "-n", "10")  # a shadow yields the processor to the others
GATEWAY = Path(__file__).parent / "gateway"


class Supervisor:
    """Runs one service until it is told to stop or a child dies."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = api.Keys(settings)
        self.problem: str | None = "starting"
        """What keeps the service from being ready; None when nothing does."""
        self.worker_error: str | None = None
        self.stopping = threading.Event()
        self.fetching = False
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.shadow: subprocess.Popen[bytes] | None = None
        """The shadow's engine, which is no child: if it dies, the service goes on."""

    def run(self) -> int:
        """Serves; returns 0 after SIGTERM, and 1 where a child died, they held too much memory or
        it was not ready any more.

        Raises:
            ModelError: there is no model to serve.
            SettingsError: it cannot do what it is set to.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)
        with ExitStack() as held:
            try:
                state = held.enter_context(temporary(self.settings.state_dir))
            except OSError as error:
                raise SettingsError(f"SERVING_STATE_DIR: {error.strerror or error}") from None
            try:
                try:
                    with naming(state):
                        self._start(state)
                except OSError as error:  # a full disk, for the most part
                    raise ModelError(str(error)) from None
                return self._watch()
            finally:
                for child in reversed(self._running()):
                    processes.kill(child)

    def _stop(self, *_: object) -> None:
        self.stopping.set()
        if self.fetching:  # which may take minutes, and nothing is there yet to be drained
            raise SystemExit(0)

    def _located(self, uri: str, sha256: str | None, target: Path) -> Model:
        self.fetching = True
        try:
            return located(uri, sha256, target, self.settings.public_key)
        finally:
            self.fetching = False

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [*self.children.values(), *([self.shadow] if self.shadow else [])]

    def _start(self, state: Path) -> None:
        settings = self.settings
        if settings.shadow_uri is not None and settings.engine != "asgi":
            raise SettingsError("SERVING_SHADOW_URI: a shadow needs SERVING_ENGINE=asgi")
        for port in (settings.port, settings.metrics_port):
            _refuse_taken(port)
        self.model = self._located(settings.model_uri, settings.model_sha256, state / "model.mar")
        if settings.abstain and not self.model.description.held_out:
            raise SettingsError("SERVING_ABSTAIN: this archive knows nothing of familiarity")
        names = engines.PORTS[settings.engine]
        own, *others = processes.free_ports(1 + len(names))
        ports = dict(zip(names, others, strict=True))
        ports.setdefault("metrics", ports["inference"])
        self.readiness = Readiness(
            self.model,
            f"http://127.0.0.1:{settings.port}/predictions/{self.model.name}",
            f"http://127.0.0.1:{ports['metrics']}/metrics",
            self.keys.own if self.keys.required else None,
        )
        about = (settings.engine, self._problem_now, lambda: self.readiness.form)
        api.serve(own, api.routes(self.model, *about), self.keys)
        start = engines.START[settings.engine]
        if settings.shadow_uri is not None:
            start = partial(
                engines.start_asgi, shadow=self._start_shadow(settings.shadow_uri, state)
            )
        server = start(self.model, settings, state, ports)
        self.children[settings.engine] = server
        if server.stdout is not None:
            torchserve.follow(server.stdout, self._note_worker_error)
        self.children["gateway"] = self._gateway(state, ports, own)
        log("starting", model=self.model.name, version=self.model.version, port=settings.port)

    def _problem_now(self) -> str | None:
        """What keeps the service from being ready. SIGTERM counts at once, while `problem` changes
        only between two probes."""
        return "draining" if self.stopping.is_set() else self.problem

    def _start_shadow(self, uri: str, state: Path) -> engines.Shadow:
        model = self._located(uri, self.settings.shadow_sha256, state / "shadow.mar")
        if model.classes != self.model.classes:
            raise SettingsError(f"SERVING_SHADOW_URI: {uri} knows other classes")
        [port] = processes.free_ports(1)
        alone = self.settings.model_copy(update={"workers": 1})
        self.shadow = engines.start_asgi(model, alone, state, {"inference": port}, prefix=POLITELY)
        both = {"live": self.model, "shadow": model}
        tests = {role: one.description.test for role, one in both.items()}
        return engines.Shadow(
            port=port,
            versions={role: one.version for role, one in both.items()},
            accuracies={role: test.accuracy_low for role, test in tests.items() if test},
        )

    def _gateway(self, state: Path, ports: dict[str, int], own: int) -> subprocess.Popen[bytes]:
        explains = self.model.description.map_size is not None
        environment = {
            "PORT": self.settings.port,
            "METRICS_PORT": self.settings.metrics_port,
            "MAX_BODY_BYTES": self.settings.max_body_bytes,
            "READ_ON_BYTES": READ_ON * self.settings.max_body_bytes,
            "RESPONSE_SECONDS": self.settings.response_seconds + 5,
            "DRAIN_SECONDS": self.settings.drain_seconds,
            "AUTHENTICATION": "keys" if self.keys.required else "open",
            "MODEL_NAME": self.model.name,
            "MODEL_VERSION": self.model.version,
            "ABSTAIN": self.settings.abstain or "",
            "EXPLANATIONS": f"/explanations/{self.model.name}" if explains else "",
            "INFERENCE_PORT": ports["inference"],
            "ENGINE_METRICS_PORT": ports["metrics"],
            "API_PORT": own,
            "PAGES": GATEWAY,
            **dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), state),
        }
        command = [processes.caddy(), "run", "--adapter", "caddyfile"]
        command += ["--config", str(GATEWAY / "Caddyfile")]
        return processes.spawn(command, state, {k: str(v) for k, v in environment.items()})

    def _watch(self) -> int:
        """Monitors the children until one dies or the service is told to stop."""
        next_probe, ready_at = 0.0, math.inf
        while not self.stopping.wait(WATCH_SECONDS):
            if (dead := self._dead()) is not None:
                self.problem = f"{dead} died"
                log("child died", child=dead, code=self.children[dead].returncode)
                return 1
            if self.shadow is not None and self.shadow.poll() is not None:
                log("shadow died", code=self.shadow.returncode)
                self.shadow = None
            if time.monotonic() >= next_probe:
                if self.problem is None and self._is_too_large():
                    self._drain()
                    return 1
                self._note(self.readiness.problem(ready=self.problem is None))
                ready_at = ready_at if self.problem else time.monotonic()
                if time.monotonic() > ready_at + GIVE_UP_SECONDS:
                    log("not ready for too long", seconds=GIVE_UP_SECONDS)
                    return 1
                wait = WATCH_SECONDS if self.problem else INTERVAL_SECONDS
                next_probe = time.monotonic() + wait
        return self._drain()

    def _dead(self) -> str | None:
        return next((n for n, c in self.children.items() if c.poll() is not None), None)

    def _is_too_large(self) -> bool:
        if (limit := self.settings.memory_mb) is None:
            return False
        used = processes.held_memory(self._running()) / 1e6
        if used > limit:
            log("too much memory", used_mb=math.ceil(used), limit_mb=limit)
            if self.shadow is not None:  # it goes first
                processes.kill(self.shadow)
        return used > limit and self.shadow is None

    def _note_worker_error(self, error: str) -> None:
        self.worker_error = error

    def _note(self, problem: str | None) -> None:
        if problem is None:
            self.worker_error = None
        elif self.worker_error is not None:
            problem = f"{problem}; a worker said {self.worker_error}"
        if self.problem != problem:
            log("not ready" if problem else "ready", **({"reason": problem} if problem else {}))
        self.problem = problem

    def _drain(self) -> int:
        self.problem = "draining"
        log("draining", seconds=self.settings.endpoint_seconds)
        time.sleep(self.settings.endpoint_seconds)
        gateway = self.children["gateway"]
        gateway.terminate()
        try:
            gateway.wait(self.settings.drain_seconds + 5)
            log("drained")
        except subprocess.TimeoutExpired:  # it had its time; what is still in flight is lost
            log("drained", cut_short="the gateway did not stop in time")
        return 0


def _refuse_taken(port: int) -> None:
    """Two gateways on one port would share its clients without a word.

    Raises:
        SettingsError: somebody listens there.
    """
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise SettingsError(f"port {port}: {os.strerror(errno.EADDRINUSE)}")
