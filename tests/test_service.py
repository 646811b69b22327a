"""The service as it runs: supervisor, TorchServe and Caddy, over HTTP."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL, ROOT, classes_of, free_port, pictures, predictions
from PIL import Image

from jobs.runs import RunFolder, sha256
from serving.settings import SettingsError, from_environment
from serving.supervisor import ModelError, open_model

FAST = {"SERVING_ENDPOINT_SECONDS": "1", "SERVING_WORKERS": "2"}


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    address: str
    metrics: str
    log: Path

    def events(self) -> list[dict[str, Any]]:
        """What the supervisor has said so far."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if '"logger": "supervisor"' in line]

    def wait_until_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while get(f"{self.address}/readyz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def predict(self, body: bytes, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
        return get(f"{self.address}/predictions/{MODEL}", body, kind)


def get(url: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
    """Status and JSON; status 0 where there was no answer at all."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


def start(archive: Path, folder: Path, **environment: str) -> Service:
    folder.mkdir(parents=True)
    port, metrics = free_port(), free_port()
    variables = {**os.environ, **FAST, "MODEL_URI": str(archive), **environment}
    variables |= {"SERVING_PORT": str(port), "SERVING_METRICS_PORT": str(metrics)}
    variables |= {"SERVING_STATE_DIR": str(folder)}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving"], cwd=ROOT, env=variables, stdout=file, stderr=file
        )
    return Service(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}", log)


def stop(service: Service) -> int:
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(60)


@pytest.fixture(scope="module")
def archive(exported: RunFolder) -> Path:
    return exported.path / "model" / f"{MODEL}.mar"


@pytest.fixture(scope="module")
def service(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = start(archive, tmp_path_factory.mktemp("service") / "state")
    service.wait_until_ready()
    yield service
    if service.process.poll() is None:
        assert stop(service) == 0


def test_it_answers_with_the_jobs_predictions(service: Service, exported: RunFolder) -> None:
    answers = [service.predict(picture) for picture in pictures(exported, 10)]
    assert [status for status, _ in answers] == [200] * 10
    assert [answer["label"] for _, answer in answers] == predictions(exported, 10)
    assert answers[0][1]["model"] == {"name": MODEL, "version": exported.run_id}


def test_it_reads_what_people_send(service: Service, exported: RunFolder) -> None:
    picture, expected = pictures(exported, 1)[0], predictions(exported, 1)[0]
    form = service.predict(picture, "application/x-www-form-urlencoded")
    assert form[0] == 200 and form[1]["label"] == expected, "curl --data-binary"
    encoded = {"b64": b64encode(picture).decode()}
    one = service.predict(json.dumps(encoded).encode(), "application/json")
    assert one[0] == 200 and one[1]["label"] == expected
    many = service.predict(json.dumps({"instances": [encoded] * 3}).encode(), "application/json")
    assert [p["label"] for p in many[1]["predictions"]] == [expected] * 3
    part = b'--x\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    multipart = part + picture + b"\r\n--x--\r\n"
    upload = service.predict(multipart, "multipart/form-data; boundary=x")
    assert upload[0] == 200 and upload[1]["label"] == expected
    photo = io.BytesIO()
    Image.effect_noise((900, 700), 80).convert("RGB").save(photo, "JPEG")
    status, answer = service.predict(photo.getvalue(), "image/jpeg")
    assert status == 200 and answer["label"] in classes_of(exported)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (f"/predictions/{MODEL}", b"no picture", 400, "bad_image"),
        (f"/predictions/{MODEL}", b"\x00" * 10_000_001, 413, "http_413"),
        (f"/predictions/{MODEL}", None, 405, "http_405"),
        ("/predictions/another", b"x", 404, "http_404"),
        ("/models", None, 404, "http_404"),
        ("/api-description", None, 404, "http_404"),
    ],
    ids=["text", "large", "get", "unknown model", "management", "torchserve's own"],
)
def test_what_it_refuses_is_clear_json(
    service: Service, path: str, body: bytes | None, status: int, code: str
) -> None:
    got, answer = get(service.address + path, body, "application/octet-stream")
    assert got == status
    assert answer["error"]["code"] == code and answer["error"]["message"]


def test_a_hundred_clients_with_good_and_bad_pictures_get_what_is_theirs(
    service: Service, exported: RunFolder
) -> None:
    files, labels = pictures(exported, 10), predictions(exported, 10)
    wrong: list[Any] = []

    def client(number: int) -> None:
        good = number % 3 != 0
        status, answer = service.predict(files[number % 10] if good else b"bad")
        fine = answer.get("label") == labels[number % 10] if good else status == 400
        if not fine and status != 503:  # full is an answer, too
            wrong.append((number, status, answer))

    run_all([threading.Thread(target=client, args=(number,)) for number in range(100)])
    assert not wrong


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_live_ready_and_metrics(service: Service) -> None:
    assert get(f"{service.address}/livez")[0] == 200
    assert get(f"{service.address}/readyz")[0] == 200
    with urllib.request.urlopen(f"{service.metrics}/metrics", timeout=10) as response:
        assert b"ts_inference_requests_total" in response.read()


def test_sigterm_under_load_fails_no_request(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    """Clients send until the listener is gone, which is when a load balancer would have left."""
    service = start(archive, tmp_path / "state")
    service.wait_until_ready()
    picture = pictures(exported, 1)[0]
    statuses: Counter[int] = Counter()
    leaving = threading.Event()

    def client() -> None:
        while not leaving.is_set():
            statuses[service.predict(picture)[0]] += 1

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    while statuses.total() < 200:
        time.sleep(0.05)
    service.process.send_signal(signal.SIGTERM)
    while not any(event["event"] == "draining" for event in service.events()):
        time.sleep(0.02)
    assert get(f"{service.address}/readyz")[0] == 503
    before = statuses.total()
    time.sleep(0.7)  # within endpoint_seconds: requests are still answered
    leaving.set()
    for thread in threads:
        thread.join()
    assert service.process.wait(60) == 0
    assert statuses.total() > before
    assert set(statuses) == {200}, statuses


def test_a_dead_child_ends_the_service(archive: Path, tmp_path: Path) -> None:
    service = start(archive, tmp_path / "state")
    service.wait_until_ready()
    found = subprocess.run(
        ["pgrep", "-P", str(service.process.pid), "-f", "caddy"], capture_output=True, check=True
    )
    os.kill(int(found.stdout), signal.SIGKILL)
    assert service.process.wait(30) == 1
    assert service.events()[-1]["child"] == "gateway"


def test_two_services_share_a_machine(archive: Path, service: Service, tmp_path: Path) -> None:
    second = start(archive, tmp_path / "state")
    second.wait_until_ready()
    assert get(f"{service.address}/readyz")[0] == 200
    assert stop(second) == 0
    assert get(f"{service.address}/readyz")[0] == 200


def test_archives_that_are_not_what_they_should_be_are_refused(
    archive: Path, tmp_path: Path
) -> None:
    whole = archive.read_bytes()
    (tmp_path / "short.mar").write_bytes(whole[: len(whole) // 2])
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 0xFF
    (tmp_path / "changed.mar").write_bytes(changed)
    cases = {"absent.mar": "no such file", "short.mar": "not a model archive"}
    cases |= {"changed.mar": "damaged|not a model archive"}
    for name, complaint in cases.items():
        with pytest.raises(ModelError, match=complaint):
            open_model(from_environment({"MODEL_URI": str(tmp_path / name)}))
    right = {"MODEL_URI": str(archive), "SERVING_MODEL_SHA256": sha256(archive)}
    assert open_model(from_environment(right)).name == MODEL
    wrong = {**right, "SERVING_MODEL_SHA256": "0" * 64}
    with pytest.raises(ModelError, match="its SHA-256 is"):
        open_model(from_environment(wrong))


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "SERVING_MODEL_URI: Field required"),
        ({"MODEL_URI": "m.mar", "SERVING_PRT": "80"}, "SERVING_PRT: Extra inputs"),
        ({"MODEL_URI": "m.mar", "SERVING_PORT": "many"}, "SERVING_PORT: Input should be"),
    ],
)
def test_settings_that_make_no_service_are_refused(
    environment: dict[str, str], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        from_environment(environment)
