"""The images as people run them: read-only, as user 1000, without capabilities. `make test-images`.

The job trains its quickstart into a mounted folder, is stopped on the way and goes on; the service
then serves what came of it.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import engine
import numpy as np
import pytest
import urllib3
from conftest import classes_of, pictures
from engine import CONFINED, podman, wait
from service import get

from jobs.runs import RunFolder
from serving.processes import free_ports

MODEL = "inception_v3_digits"
# A checkpoint early enough to be stopped at; its steps are too quick for one by the clock.
QUICKSTART = ("run", "--config=quickstart", "--set=runtime.checkpoint_every=5")

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(engine.BUILDS),
    pytest.mark.skipif(not engine.available(), reason="needs root, podman, buildah, mmdebstrap"),
]


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    engine.prepare()


@pytest.fixture(scope="session")
def train_image() -> str:
    return engine.build("train")


@pytest.fixture(scope="session")
def serve_image() -> str:
    return engine.build("serve")


@pytest.fixture(scope="session")
def serve_gpu_image() -> str:
    return engine.build("serve-gpu")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mounted") / "runs"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in folder.parents[:3]:  # pytest keeps its folders to their owner
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def finished(train_image: str, runs: Path) -> RunFolder:
    """The quickstart, stopped by SIGTERM at its first checkpoint, and then run to its end."""
    # On a busy machine's two cores, two threads wait for each other, and one is faster.
    job = [*CONFINED, "--network=none", f"--volume={runs}:/runs", "--env=OMP_NUM_THREADS=1"]
    podman("run", "--detach", "--replace", "--name=job", *job, train_image, *QUICKSTART)
    try:
        wait("a checkpoint", lambda: any(runs.glob("*/variants/*/last.ckpt")))
        podman("stop", "--time=120", "job")
        code = podman("wait", "job").stdout.strip()
        assert code == "75", podman("logs", "job").stderr
    finally:
        podman("rm", "--force", "job")
    again = podman("run", "--rm", *job, train_image, *QUICKSTART)
    assert "resumes in epoch" in again.stderr
    [path] = runs.glob("quickstart-*")
    assert (path / "report" / "index.html").is_file()
    return RunFolder(path)


@dataclass
class Container:
    name: str
    address: str
    metrics: str


@contextmanager
def serving(image: str, finished: RunFolder, *options: str) -> Iterator[Container]:
    port, metrics = free_ports(2)
    archive = finished.path / "model" / f"{MODEL}.mar"
    there = [*CONFINED, f"--volume={archive}:/models/model.mar:ro"]
    there += [f"--publish=127.0.0.1:{port}:8080", f"--publish=127.0.0.1:{metrics}:8082"]
    podman("run", "--detach", "--replace", "--name=service", *there, *options, image)
    container = Container("service", f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}")
    try:
        wait("the service", lambda: get(f"{container.address}/readyz")[0] == 200)
        yield container
    finally:
        podman("rm", "--force", "service")


@pytest.fixture
def served(serve_image: str, finished: RunFolder) -> Iterator[Container]:
    with serving(serve_image, finished) as container:
        yield container


def inside(image: str, command: str) -> str:
    done = podman("run", "--rm", "--network=none", "--entrypoint=/bin/bash", image, "-c", command)
    return done.stdout.strip()


def test_the_job_is_stopped_goes_on_and_its_archive_is_served(
    served: Container, finished: RunFolder
) -> None:
    winner = json.loads((finished.path / "comparison.json").read_text())["winner"]
    with np.load(finished.path / "variants" / winner / "test_predictions.npz") as arrays:
        expected = [classes_of(finished)[i] for i in arrays["logits"][:20].argmax(1)]
    url = f"{served.address}/predictions/{MODEL}"
    answers = [get(url, picture)[1]["label"] for picture in pictures(finished, 20)]
    agree = sum(a == b for a, b in zip(answers, expected, strict=True))
    assert agree >= 19, (answers, expected)  # int8 may tip one that is on the edge
    assert podman("healthcheck", "run", served.name).returncode == 0


def test_the_gpu_service_answers_alike_where_there_is_no_gpu(
    serve_gpu_image: str, serve_image: str, finished: RunFolder
) -> None:
    """On the CPU it is the same network; the CUDA that it has besides needs a GPU to show."""
    answers = []
    for image in (serve_image, serve_gpu_image):
        with serving(image, finished) as container:
            url = f"{container.address}/predictions/{MODEL}"
            answers.append([get(url, picture) for picture in pictures(finished, 3)])
    assert {status for status, _ in answers[0]} == {200} and answers[0] == answers[1]
    cuda = inside(
        serve_gpu_image, "command -v gcc; python -c 'import torch; print(torch.version.cuda)'"
    )
    assert re.fullmatch(r"/usr/bin/gcc\n\d+\.\d+", cuda)


@pytest.fixture
def patient(serve_image: str, finished: RunFolder) -> Iterator[Container]:
    """One that still answers when a busy machine has long noticed that it leaves."""
    with serving(serve_image, finished, "--env=SERVING_ENDPOINT_SECONDS=30") as container:
        yield container


def test_sigterm_under_load_loses_nothing(patient: Container, finished: RunFolder) -> None:
    """Clients send until the container says that it is not ready, and all get their answer."""
    url, picture = f"{patient.address}/predictions/{MODEL}", pictures(finished, 1)[0]
    statuses: Counter[int] = Counter()
    leaving = threading.Event()

    def client() -> None:
        while not leaving.is_set():
            statuses[get(url, picture)[0]] += 1

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait("the load", lambda: statuses.total() > 100)
    stopping = threading.Thread(target=podman, args=("stop", "--time=120", patient.name))
    stopping.start()
    wait("its end", lambda: get(f"{patient.address}/readyz")[0] == 503)
    before = statuses.total()
    time.sleep(2)  # within SERVING_ENDPOINT_SECONDS
    leaving.set()
    for thread in [*threads, stopping]:
        thread.join()
    assert podman("wait", patient.name).stdout.strip() == "0"
    assert statuses.total() > before and set(statuses) == {200}, statuses


def test_only_predictions_and_metrics_listen_to_a_network(served: Container) -> None:
    """As the container's own network namespace has it: what else listens does so on loopback, and
    TorchServe's management cannot be asked through the gateway."""
    tables = podman("exec", served.name, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout
    rows = [line.split() for line in tables.splitlines() if ":" in line.split()[0]]
    listening = [row[1].rsplit(":", 1) for row in rows if row[3] == "0A"]
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    outside = {int(port, 16) for address, port in listening if address not in loopback}
    assert outside == {8080, 8082} and len(listening) > len(outside)
    udp = podman("exec", served.name, "cat", "/proc/net/udp", "/proc/net/udp6").stdout
    assert not [line for line in udp.splitlines() if ":" in line.split()[0]]
    for path in (
        "/models",
        f"/models/{MODEL}",
        "/workflows",
        "/ping",
        "/metrics",
        "/api-description",
    ):
        assert get(served.address + path)[0] == 404
    assert urllib3.request("GET", f"{served.metrics}/models").status == 404


def test_a_service_without_a_model_says_so_in_one_line(serve_image: str) -> None:
    done = podman("run", "--rm", *CONFINED, serve_image, check=False)
    assert done.returncode == 3
    # The other lines are podman's, which misses systemd for its health checks.
    said = [line for line in done.stderr.splitlines() if "level=error" not in line]
    assert len(said) == 1 and "/models/model.mar" in said[0]


def test_a_stopped_start_ends_at_once(train_image: str) -> None:
    """Process 1 passes SIGTERM on even while Python still imports."""
    podman("run", "--detach", "--replace", "--name=early", *CONFINED, train_image, "doctor")
    try:
        podman("stop", "--time=60", "early")
        code = podman("wait", "early").stdout.strip()
    finally:
        podman("rm", "--force", "early")
    assert code == "143", "SIGTERM, and not SIGKILL after a minute"


def test_the_cpu_service_has_no_cuda_no_compiler_no_pip_and_no_training(serve_image: str) -> None:
    names = r"\( -name 'libcud*' -o -name nvidia -o -path '*-packages/torchvision' -o -name jobs \)"
    folders = "/opt /srv /usr /home"  # user 1000 may not look everywhere
    assert inside(serve_image, f"find {folders} -xdev {names}") == ""
    assert inside(serve_image, "command -v cc gcc g++ clang pip pip3 curl wget || true") == ""
    assert inside(serve_image, "id -u; id -g").split() == ["1000", "1000"]


def test_labels_name_version_and_commit_and_sizes_are_known(
    train_image: str,
    serve_image: str,
    serve_gpu_image: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = {"train": train_image, "serve": serve_image, "serve-gpu": serve_gpu_image}
    commits = {}
    for name, image in images.items():
        labels = json.loads(podman("image", "inspect", image).stdout)[0]["Labels"]
        assert labels["org.opencontainers.image.version"] == "0.1.0"
        commits[name] = labels["org.opencontainers.image.revision"]
        assert re.fullmatch("[0-9a-f]{40}", commits[name])
    # Not compared with today's: buildah keeps layers of which only an argument has changed.
    assert inside(train_image, "echo $SOURCE_COMMIT") == commits["train"]
    with capsys.disabled():
        print(
            "", *(f"{name} {engine.size(image):.2f} GB" for name, image in images.items()), sep="\n"
        )
    assert engine.size(serve_image) < 2
