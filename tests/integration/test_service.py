"""The service as it runs: it answers rightly, refuses clearly, drains, and dies with a part."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
import zipfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import MODEL, classes_of, pictures, predictions
from PIL import Image
from readme import command_lines
from service import LONGEST, Service, exchange, get, leaking, load, run_all, running, start

from jobs.runs import RunFolder
from serving.archive import DESCRIPTION, ModelError, check_digest, open_model, write_description
from serving.files import digest_of


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
    for cut in (multipart[:-6], multipart[7:], b"--x--", b""):
        refused = service.predict(cut, "multipart/form-data; boundary=x")
        assert refused[0] == 400 and "multipart" in refused[1]["error"]["message"]
    photo = io.BytesIO()
    Image.effect_noise((900, 700), 80).convert("RGB").save(photo, "JPEG")
    status, answer = service.predict(photo.getvalue(), "image/jpeg")
    assert status == 200 and answer["label"] in classes_of(exported)


def test_it_abstains_and_gives_sets_where_that_is_asked_for(
    service: Service, exported: RunFolder
) -> None:
    url = f"{service.address}/predictions/{MODEL}"
    files = pictures(exported, 10)
    answers = [(get(url, file)[1], file) for file in files]
    least, picture = min(answers, key=lambda one: float(one[0]["familiarity"]))
    familiarity = least["familiarity"]
    assert 0 < familiarity < 1 and least["label"] is not None and "set" not in least
    status, strange = get(f"{url}?abstain={familiarity}", picture)
    assert status == 200 and strange["label"] is None and strange["reason"] == "unfamiliar"
    assert strange["top"] == least["top"]
    assert get(f"{url}?abstain={familiarity / 2}", picture)[1]["label"] == least["label"]
    some, every = (get(f"{url}?confidence={c}", picture)[1]["set"] for c in (0.5, 0.999))
    assert some[0] == least["label"] and set(every) == set(classes_of(exported))
    for query in ("abstain=2", "confidence=x"):
        assert get(f"{url}?{query}", picture)[1]["error"]["code"] == "bad_request"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("words", command_lines("curl"), ids=" ".join)
def test_curl_gets_an_answer_to_what_the_documentation_tells_to_type(
    words: list[str], service: Service, exported: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "cat.jpg").write_bytes(pictures(exported, 1)[0])
    here = [word.replace("http://localhost:8080", service.address) for word in words]
    done = subprocess.run(here, cwd=tmp_path, check=True, capture_output=True)
    if "-o" in words:
        with Image.open(tmp_path / words[words.index("-o") + 1]) as picture:
            assert picture.format == "PNG"
    else:
        assert json.loads(done.stdout)["label"] == predictions(exported, 1)[0]


def test_it_explains_in_numbers_and_in_a_picture(service: Service, exported: RunFolder) -> None:
    url = f"{service.address}/explanations/{MODEL}"
    picture, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    status, answer = get(f"{url}?top=2", picture)
    assert status == 200 and answer["label"] == label and len(answer["top"]) == 2
    assert answer["explanation"]["label"] == label
    assert np.shape(answer["explanation"]["map"]) == (1, 1), "at 75 pixels"
    many = json.dumps({"instances": [{"b64": b64encode(picture).decode()}] * 2}).encode()
    several = get(url, many, "application/json")[1]["predictions"]
    expected = answer["explanation"]
    assert [one["explanation"]["label"] for one in several] == [expected["label"]] * 2
    maps = np.array([one["explanation"]["map"] for one in several])
    assert maps == pytest.approx(np.array([expected["map"]] * 2), rel=0.05)

    headers = {"Content-Type": "image/png", "Accept": "image/png", "X-Request-Id": "why"}
    with urllib.request.urlopen(urllib.request.Request(url, picture, headers)) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert response.headers["X-Request-Id"] == "why" and response.headers["X-Form"]
        shown = Image.open(io.BytesIO(response.read()))
    assert shown.format == "PNG" and shown.size == Image.open(io.BytesIO(picture)).size
    for body, code in ((b"no picture", "bad_image"), (many, "bad_request")):
        status, received, refusal = exchange(url, body, headers)
        assert (status, refusal["error"]["code"]) == (400, code)
        assert received["Content-Type"] == "application/json"


def test_nothing_is_explained_unasked(service: Service, exported: RunFolder) -> None:
    headers = {"Content-Type": "image/png", "Accept": "image/png", "explain": "True"}
    url = f"{service.address}/predictions/{MODEL}"
    status, received, answer = exchange(url, pictures(exported, 1)[0], headers)
    assert status == 200 and received["Content-Type"] == "application/json"
    assert "explanation" not in answer


def packed(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return file


def described(folder: Path, work: Path, **changes: Any) -> Path:
    """The same archive, which says something else of itself."""
    copy = work / "copy"
    shutil.copytree(folder, copy, copy_function=os.link)
    description = open_model(copy).description.model_copy(update=changes)
    (copy / DESCRIPTION).unlink()
    write_description(copy, description)
    return packed(copy, work / f"{MODEL}.mar")


def test_it_serves_the_form_that_is_right_on_this_machine_and_abstains_by_default(
    strange_integers: Path, exported: RunFolder, tmp_path: Path
) -> None:
    """An archive that gives no class maps, as those of earlier versions."""
    archive = described(strange_integers, tmp_path, map_size=None)
    picture, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    with running(archive, tmp_path / "state", SERVING_ABSTAIN="0.999") as service:
        assert get(f"{service.address}/v2/models/{MODEL}")[1]["form"] == "float"
        while "float serves instead" not in service.log.read_text():  # by way of TorchServe
            time.sleep(0.1)
        url = f"{service.address}/predictions/{MODEL}"
        _, headers, answer = exchange(url, picture, {"Content-Type": "image/png"})
        assert headers["X-Form"] == "float" and answer["top"][0]["label"] == label
        assert (answer["label"] is None) == (answer["familiarity"] <= 0.999)
        assert get(f"{url}?abstain=0", picture)[1]["label"] == label
        explanations = f"/explanations/{MODEL}"
        assert get(service.address + explanations, picture)[0] == 404
        assert explanations not in get(f"{service.address}/openapi.json")[1]["paths"]


def test_it_does_not_start_where_it_could_never_abstain(
    strange_integers: Path, tmp_path: Path
) -> None:
    archive = described(strange_integers, tmp_path, held_out=0)
    service = start(archive, tmp_path / "state", SERVING_ABSTAIN="0.1")
    assert service.process.wait() == 2
    assert "SERVING_ABSTAIN: this archive knows nothing" in service.log.read_text()


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (f"/predictions/{MODEL}", b"no picture", 400, "bad_image"),
        (f"/predictions/{MODEL}", b"\x00" * 10_000_001, 413, "too_large"),
        (f"/predictions/{MODEL}", None, 405, "method_not_allowed"),
        (f"/explanations/{MODEL}", None, 405, "method_not_allowed"),
        (f"/explanations/{MODEL}", b"\x00" * 10_000_001, 413, "too_large"),
        ("/explanations/another", b"x", 404, "not_found"),
        ("/predictions/another", b"x", 404, "not_found"),
        ("/models", None, 404, "not_found"),
        ("/api-description", None, 404, "not_found"),
    ],
    ids=[
        *("text", "large", "get", "explain: get", "explain: large", "explain: unknown model"),
        *("unknown model", "management", "torchserve's own"),
    ],
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
    right: list[int] = []

    def client(number: int) -> None:
        good = number % 3 != 0
        status, answer = service.predict(files[number % 10] if good else b"bad")
        fine = answer.get("label") == labels[number % 10] if good else status == 400
        if fine:
            right.append(status)
        elif status != 503:  # full is an answer, too
            wrong.append((number, status, answer))

    run_all([threading.Thread(target=client, args=(number,)) for number in range(100)])
    assert not wrong and 200 in right


def metrics_of(service: Service) -> str:
    with urllib.request.urlopen(f"{service.metrics}/metrics", timeout=LONGEST) as response:
        text: str = response.read().decode()
        return text


def test_live_ready_and_metrics(service: Service, exported: RunFolder) -> None:
    assert service.predict(pictures(exported, 1)[0])[0] == 200
    assert get(f"{service.address}/livez")[0] == 200
    assert get(f"{service.address}/readyz")[0] == 200
    wanted = {"Requests2XX", "inception_predictions_total", "inception_confidence_bucket"}
    while True:  # TorchServe's workers tell it what they have counted when they have answered
        lines = metrics_of(service).splitlines()
        samples = {line.partition("{")[0].partition(" ")[0] for line in lines if line[:1] != "#"}
        if samples >= wanted:
            break
        time.sleep(0.1)


def evidence_of(service: Service) -> dict[str, float]:
    """Of a change, for each worker that has answered, by its process."""
    found = {}
    line = re.compile(r"^inception_drift_evidence\{(.*)\} (\S+)$", re.MULTILINE)
    for labels, value in line.findall(metrics_of(service)):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert pairs["ModelName"] == MODEL and pairs["version"]
        found[pairs["worker"]] = float(value)
    return found


def test_every_worker_shows_its_evidence_of_a_change_which_clients_pictures_move(
    service: Service, exported: RunFolder
) -> None:
    assert service.predict(pictures(exported, 1)[0])[0] == 200
    while not set(before := evidence_of(service)) & set(map(str, workers_of(service))):
        time.sleep(0.1)
    noise = io.BytesIO()
    Image.effect_noise((40, 40), 200).save(noise, "PNG")
    assert service.predict(noise.getvalue())[0] == 200
    while all(value == before.get(worker, 0) for worker, value in evidence_of(service).items()):
        time.sleep(0.1)
    assert "inception_familiarity_bucket" in metrics_of(service)


def workers_of(service: Service) -> list[int]:
    """Process numbers of TorchServe's workers, or of the other engine."""
    state = str(service.log.parent)
    found = subprocess.run(
        ["pgrep", "-f", f"(model_service_worker.py|serving.asgi).*{state}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("service", ["torchserve"], indirect=True)  # the other one has none
def test_a_killed_worker_costs_its_batch_and_comes_back(
    service: Service, exported: RunFolder
) -> None:
    """… so that the shared service is what it was."""
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    while len(before := workers_of(service)) < 2:
        time.sleep(0.1)
    with load(service, file, label, clients=4) as statuses:
        while statuses[200] < 20:
            time.sleep(0.05)
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        while not set(workers_of(service)) - set(before):
            time.sleep(0.1)
    print(f"a new worker after {time.monotonic() - killed:.1f} s; clients saw {statuses}")
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 2, "no more than the batch that it held"
    assert get(f"{service.address}/readyz")[0] == 200


@pytest.mark.parametrize("engine", [pytest.param("torchserve", marks=pytest.mark.slow), "asgi"])
def test_sigterm_under_load_fails_no_request(
    archive: Path, exported: RunFolder, tmp_path: Path, engine: str
) -> None:
    """Clients send until the listener is gone, which is when a load balancer would have left."""
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    environment = {"SERVING_ENGINE": engine, "SERVING_ENDPOINT_SECONDS": "20"}
    with running(archive, tmp_path / "state", **environment) as service:
        with load(service, file, label, clients=8) as statuses:
            while statuses.total() < 200:
                time.sleep(0.05)
            service.process.send_signal(signal.SIGTERM)
            while not any(event["event"] == "draining" for event in service.events()):
                time.sleep(0.02)
            assert get(f"{service.address}/readyz")[0] == 503
            before = statuses.total()
            time.sleep(0.7)  # within endpoint_seconds: requests are still answered
        assert service.process.wait() == 0
    assert statuses.total() > before
    assert set(statuses) == {200}, statuses


def test_a_terminal_that_is_closed_ends_the_service_and_all_its_processes(
    archive: Path, tmp_path: Path
) -> None:
    prefix = ("env", "--default-signal=HUP")  # though somebody has started this under nohup
    with running(archive, tmp_path / "state", prefix=prefix, SERVING_ENGINE="asgi") as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        assert len(children) >= 2
        service.process.send_signal(signal.SIGHUP)
        assert service.process.wait() == 0
    assert [event["event"] for event in service.events()[-2:]] == ["draining", "drained"]
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_too_much_memory_ends_the_service_and_no_request(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    environment = {"SERVING_ENGINE": "asgi", "SERVING_ENDPOINT_SECONDS": "20"}
    environment |= {"SERVING_MEMORY_MB": "1500"}
    environment |= leaking(tmp_path / "leak", megabytes=100)
    service = start(archive, tmp_path / "state", **environment)
    service.wait_until_ready()
    (tmp_path / "leak" / "go").touch()
    with load(service, file, label, clients=4) as statuses:
        while service.events()[-1]["event"] != "draining":
            assert service.process.poll() is None
            time.sleep(0.02)
        time.sleep(0.7)  # within endpoint_seconds
    assert service.process.wait() == 1
    assert set(statuses) == {200}, statuses
    reason, *rest = service.events()[-3:]
    assert (reason["event"], reason["limit_mb"]) == ("too much memory", 1500)
    assert 1500 < reason["used_mb"] < 3000, "it is looked at every 3 s, and grows by 100 MB in one"
    assert [event["event"] for event in rest] == ["draining", "drained"]


@pytest.mark.parametrize(
    ("child", "command"),
    [pytest.param("gateway", "caddy", marks=pytest.mark.slow), ("asgi", "serving.asgi")],
)
def test_a_dead_child_ends_the_service(
    archive: Path, tmp_path: Path, child: str, command: str
) -> None:
    with running(archive, tmp_path / "state", SERVING_ENGINE="asgi") as service:
        found = subprocess.run(
            ["pgrep", "-P", str(service.process.pid), "-f", command],
            capture_output=True,
            check=True,
        )
        os.kill(int(found.stdout), signal.SIGKILL)
        assert service.process.wait() == 1
        assert service.events()[-1]["child"] == child


@pytest.mark.slow
def test_a_killed_service_leaves_nothing_that_the_next_one_does_not_remove(
    archive: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    killed = start(archive, state, SERVING_ENGINE="asgi")
    killed.wait_until_ready()
    children = subprocess.check_output(["pgrep", "-P", str(killed.process.pid)], text=True).split()
    for pid in [killed.process.pid, *map(int, children)]:  # as a container is ended
        os.kill(pid, signal.SIGKILL)
    killed.process.wait()
    [left] = folders(state)
    with running(archive, state, SERVING_ENGINE="asgi"):
        [used] = folders(state)
        assert used != left
    assert not folders(state)


def folders(state: Path) -> list[Path]:
    return [path for path in state.iterdir() if path.is_dir()]


def test_two_services_share_a_machine(service: Service, locked: Service) -> None:
    assert service.address != locked.address
    for one in (service, locked):
        assert get(f"{one.address}/readyz")[0] == 200
        assert get(f"{one.address}/v1/models")[1] == {"models": [MODEL]}


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
            open_model(tmp_path / name)
    check_digest(archive, digest_of(archive))
    with pytest.raises(ModelError, match="its SHA-256 is"):
        check_digest(archive, "0" * 64)


def test_an_archive_that_would_unpack_beside_its_folder_is_refused(
    archive: Path, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.mar"
    shutil.copy(archive, evil)
    with zipfile.ZipFile(evil, "a") as file:
        file.writestr("../outside.py", "")
    with pytest.raises(ModelError, match=r"\.\./outside.py would be unpacked outside"):
        open_model(evil)
