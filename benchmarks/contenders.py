"""The servers that are compared: how each is made from one archive, started and asked."""

import base64
import http.client
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from serving.archive import FILES, open_model, unpacked
from serving.processes import free_ports, java_home

ROOT = Path(__file__).parents[1]
RIVALS = Path(__file__).parent / "rivals"
START_SECONDS = 1200.0


@dataclass(frozen=True)
class Contender:
    name: str
    url: str
    command: list[str]
    environment: dict[str, str]
    label: Callable[[Any], str]
    """The label in its JSON answer."""
    body: Callable[[bytes], bytes] = bytes
    kind: str = "image/jpeg"
    ready: str | None = None
    """Where it says that it is ready; when absent, it is when it answers."""


def service(archive: Path, folder: Path) -> Contender:
    """This project's, at its default settings."""
    port, metrics = free_ports(2)
    environment = {
        "MODEL_URI": str(archive),
        "SERVING_PORT": str(port),
        "SERVING_METRICS_PORT": str(metrics),
        "SERVING_STATE_DIR": str(folder),
    }
    return Contender(
        name="service",
        url=f"http://127.0.0.1:{port}/predictions/{open_model(archive).name}",
        command=[sys.executable, "-m", "serving"],
        environment=environment,
        label=lambda answer: str(answer["label"]),
        ready=f"http://127.0.0.1:{port}/readyz",
    )


def asgi(archive: Path, folder: Path) -> Contender:
    """The same with its other engine."""
    made = service(archive, folder)
    environment = {**made.environment, "SERVING_ENGINE": "asgi"}
    return replace(made, name="asgi", environment=environment)


def stock(archive: Path, folder: Path) -> Contender:
    """TorchServe's own image classifier in eager mode, packed as its examples do; one worker a
    core is its default, batches of 8 after at most 50 ms are its documentation's, and so is one
    thread a worker: with as many as PyTorch would start, they spin against each other."""
    write_eager(archive, folder)
    config = folder / "model-config.yaml"
    config.write_text(f"batchSize: 8\nmaxBatchDelay: 50\nside: {side(archive)}\n")
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += ["--model-name", "stock", "--version", "1", "--export-path", str(folder)]
    command += ["--model-file", str(folder / "model.py")]
    command += ["--serialized-file", str(folder / "weights.pth")]
    command += ["--extra-files", str(folder / "index_to_name.json")]
    command += ["--handler", str(RIVALS / "torchserve_handler.py"), "--config-file", str(config)]
    # It works in a folder of the model's name in there, which another's would share.
    environment = {**os.environ, **scratch(folder)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    inference, management, metrics, grpc, grpc_management = free_ports(5)
    properties = folder / "config.properties"
    properties.write_text(
        f"inference_address=http://127.0.0.1:{inference}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        f"model_store={folder}\nload_models=stock.mar\ndisable_token_authorization=true\n"
    )
    script = str(Path(sysconfig.get_path("scripts")) / "torchserve")
    return Contender(
        name="stock",
        url=f"http://127.0.0.1:{inference}/predictions/stock",
        command=[script, "--start", "--foreground", "--ncs", "--ts-config", str(properties)],
        environment={**scratch(folder), "OMP_NUM_THREADS": "1"},
        label=first,
    )


def litserve(archive: Path, folder: Path) -> Contender:
    """LitServe with the same eager network; batches as stock's."""
    write_eager(archive, folder)
    [port] = free_ports(1)
    program = str(RIVALS / "litserve_app.py")
    return Contender(
        name="litserve",
        url=f"http://127.0.0.1:{port}/predict",
        command=[sys.executable, program, str(folder), str(side(archive)), str(port)],
        environment=scratch(folder),
        label=first,
        body=lambda data: json.dumps({"image_data": base64.b64encode(data).decode()}).encode(),
        kind="application/json",
    )


def write_eager(archive: Path, folder: Path) -> None:
    """The archive's weights as a state_dict, with what eager mode wants beside it."""
    import torch

    with unpacked(archive) as files:
        program = torch.export.load(files / FILES["program"][0])
    state = {k.removeprefix("trunk."): v.detach() for k, v in program.state_dict.items()}
    torch.save(state, folder / "weights.pth")
    names = dict(enumerate(open_model(archive).classes))
    (folder / "index_to_name.json").write_text(json.dumps(names))
    shutil.copy(RIVALS / "model.py", folder)


def side(archive: Path) -> int:
    """Of the network's input: 299, unless an archive for tests has a smaller one."""
    size = max(open_model(archive).description.data.image_size)
    return size if size >= 75 else 299


def first(answer: dict[str, float]) -> str:
    return max(answer, key=lambda label: answer[label])


def scratch(folder: Path) -> dict[str, str]:
    return dict.fromkeys(("TEMP", "TMPDIR", "LOG_LOCATION", "METRICS_LOCATION"), str(folder))


class Server:
    """A contender that runs, from the first right status on; to be killed."""

    def __init__(self, contender: Contender, log: Path, picture: bytes) -> None:
        self.contender = contender
        path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
        common = {"PATH": path, "JAVA_HOME": str(java_home())}
        environment = {**os.environ, **common, **contender.environment}
        start = time.monotonic()
        with log.open("wb") as file:
            self.process = psutil.Popen(
                contender.command, cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        while not self.is_ready(picture):
            if self.process.poll() is not None or time.monotonic() - start > START_SECONDS:
                self.kill()
                raise RuntimeError(f"{contender.name} does not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.ready_seconds = time.monotonic() - start

    def is_ready(self, picture: bytes) -> bool:
        try:
            if self.contender.ready is not None:
                urllib.request.urlopen(self.contender.ready, timeout=60).close()
            self.label(picture)
        except (OSError, http.client.HTTPException):  # not listening yet, or a status that is bad
            return False
        return True

    def label(self, picture: bytes) -> str:
        request = urllib.request.Request(self.contender.url, self.contender.body(picture))
        request.add_header("Content-Type", self.contender.kind)
        with urllib.request.urlopen(request, timeout=60) as response:
            return self.contender.label(json.load(response))

    def cpu_seconds(self) -> float:
        """User and system time of the whole tree, with children that have ended."""
        return sum(sum(process.cpu_times()[:4]) for process in self.tree())

    def memory(self) -> dict[str, int]:
        """Bytes of the tree; pages that are shared count once in PSS, each time in RSS."""
        used = [process.memory_full_info() for process in self.tree()]
        return {"pss": sum(u.pss for u in used), "rss": sum(u.rss for u in used)}

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            tree = self.tree()
            for process in tree:
                process.kill()
            psutil.wait_procs(tree)
