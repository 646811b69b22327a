"""When parts of the service are full, killed or broken: what clients see, and what it says."""

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, pictures, predictions
from service import Service, exchange, get, start, stop

from jobs.runs import RunFolder


def test_a_full_queue_says_so_and_the_service_stays_ready(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    service = start(archive, tmp_path / "state", SERVING_QUEUE_SIZE="2", SERVING_WORKERS="1")
    service.wait_until_ready()
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    url = service.address + f"/predictions/{archive.stem}"
    statuses: Counter[int] = Counter()
    stopped = threading.Event()

    def client() -> None:
        while not stopped.is_set():
            status, headers, answer = exchange(url, file, {"Content-Type": "image/png"})
            statuses[status] += 1
            if status == 200:
                assert answer["label"] == label
            else:
                assert headers["Retry-After"] == "1" and answer["error"]["code"] == "busy"

    threads = [threading.Thread(target=client) for _ in range(40)]
    for thread in threads:
        thread.start()
    unready = 0
    for _ in range(60):  # 12 s, longer than the time between two probes
        unready += get(f"{service.address}/readyz")[0] != 200
        time.sleep(0.2)
    stopped.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}, statuses
    assert unready == 0
    assert stop(service) == 0


def workers_of(service: Service) -> list[int]:
    """Process numbers of TorchServe's workers."""
    state = str(service.log.parent)
    found = subprocess.run(
        ["pgrep", "-f", f"model_service_worker.py.*{state}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(line) for line in found.stdout.split()]


def test_a_killed_worker_costs_its_batch_and_comes_back(
    archive: Path, exported: RunFolder, tmp_path: Path, record_property: object
) -> None:
    service = start(archive, tmp_path / "state")
    service.wait_until_ready()
    while len(workers_of(service)) < 2:
        time.sleep(0.1)
    before = workers_of(service)
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    statuses: Counter[int] = Counter()
    stopped = threading.Event()

    def client() -> None:
        while not stopped.is_set():
            status, answer = service.predict(file)
            statuses[status] += 1
            assert status != 200 or answer["label"] == label

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(before[0], signal.SIGKILL)
    killed = time.monotonic()
    while len(set(workers_of(service)) - set(before)) < 1:
        assert time.monotonic() < killed + 120
        time.sleep(0.1)
    recovered = time.monotonic() - killed
    stopped.set()
    for thread in threads:
        thread.join()
    print(f"a new worker after {recovered:.1f} s; clients saw {dict(statuses)}")
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 8, "no more than the batch that it held"
    assert get(f"{service.address}/readyz")[0] == 200
    assert stop(service) == 0


def broken(archive: Path, folder: Path) -> Path:
    """The archive with a handler that fails when it is loaded."""
    target = folder / archive.name
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "handler.py":
                content += b"\nraise ValueError('planted: no such weights')\n"
            copy.writestr(name, content)
    return target


def test_a_handler_that_cannot_start_is_never_ready_and_says_why(
    archive: Path, tmp_path: Path
) -> None:
    service = start(broken(archive, tmp_path), tmp_path / "state")
    deadline = time.monotonic() + 60
    reason = ""
    while "planted" not in reason:
        status, answer = get(f"{service.address}/readyz")
        assert status in (0, 503), answer
        reason = answer.get("reason", "")
        assert time.monotonic() < deadline, service.log.read_text()[-3000:]
        time.sleep(0.2)
    assert "ValueError: planted: no such weights" in reason
    assert get(f"{service.address}/livez")[0] == 200
    assert stop(service) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_runs_as_nobody_and_writes_to_its_state_alone(archive: Path, tmp_path: Path) -> None:
    """The user owns nothing; what belongs to it afterwards, it has written."""
    user = 54_321
    for folder in (tmp_path, *tmp_path.parents[:-2], *archive.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    state = tmp_path / "state"
    service = start(archive, state, user=user, HOME="/nonexistent")
    service.wait_until_ready()
    places = ["/tmp", "/var/tmp", "/dev/shm", str(ROOT)]
    found = subprocess.run(
        ["find", *places, "-user", str(user), "-not", "-path", f"{state}*"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert stop(service) == 0
    assert found.stdout == ""
    assert [p.name for p in state.iterdir()] == ["log"], "and leaves nothing behind"


@pytest.mark.parametrize(
    ("environment", "code", "complaint"),
    [
        ({"MODEL_URI": "/nowhere.mar"}, 3, "/nowhere.mar: no such file"),
        ({"MODEL_URI": "http://127.0.0.1:9/m.mar"}, 3, "its digest is needed"),
        ({"SERVING_PRT": "1"}, 2, "SERVING_PRT: Extra inputs"),
        ({"SERVING_API_KEYS_FILE": "/nowhere"}, 2, "SERVING_API_KEYS_FILE: "),
    ],
)
def test_what_cannot_be_served_is_one_line_and_a_code(
    environment: dict[str, str], code: int, complaint: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving"],
        cwd=ROOT,
        env={**os.environ, "MODEL_URI": "m.mar", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr and done.stderr.count("\n") == 1


def test_settings_come_from_a_file_too_and_the_environment_wins(tmp_path: Path) -> None:
    from serving.settings import SettingsError, from_environment

    file = tmp_path / "settings.yaml"
    file.write_text("model_uri: m.mar\nport: 9000\nworkers: 3\n")
    settings = from_environment({"SERVING_CONFIG": str(file), "SERVING_PORT": "9001"})
    assert (settings.model_uri, settings.port, settings.workers) == ("m.mar", 9001, 3)
    for content, complaint in (
        ("model_uri: m\nprt: 1", "prt: Extra inputs"),
        ("a: [", "SERVING_CONFIG: "),
        ("- 1", "not a mapping"),
    ):
        file.write_text(content)
        with pytest.raises(SettingsError, match=complaint):
            from_environment({"SERVING_CONFIG": str(file)})
