"""The archive says what the job said, whole and without pickles; test_service.py serves it."""

import ctypes
import json
import zipfile
from base64 import b64encode
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL, classes_of, copy_of, pictures, predictions, tiny_config

from jobs import data, export
from jobs.config import Export
from jobs.errors import UnavailableError
from jobs.runs import RunFolder, sha256
from serving import runtimes
from serving.handler import Handler
from serving.messages import softmax


@pytest.fixture(scope="module")
def unpacked(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(exported.path / "model" / f"{MODEL}.mar") as archive:
        archive.extractall(folder)
    return folder


def test_the_archive_is_whole_and_holds_no_pickle(exported: RunFolder, unpacked: Path) -> None:
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert names == {
        "MAR-INF/MANIFEST.json",
        "handler.py",
        "model.json",
        "golden.png",
        "network.pt2",
        "network.xml",
        "network.bin",
        *(f"serving/{module}.py" for module in export.MODULES),
    }
    with zipfile.ZipFile(unpacked / "network.pt2") as program:
        assert not [name for name in program.namelist() if name.endswith(".pkl")]
    described = json.loads((unpacked / "model.json").read_text())
    assert described["version"] == exported.run_id and len(described["classes"]) == 10
    assert described["forms"]["shipped"] in ("int8", "float")
    assert "random weights" in described["weights"]


def test_the_manifest_lists_the_archive_and_its_card(exported: RunFolder) -> None:
    files = exported.manifest()["files"]
    for name in (f"model/{MODEL}.mar", "MODEL_CARD.md"):
        assert files[name]["sha256"] == sha256(exported.path / name)
    card = (exported.path / "MODEL_CARD.md").read_text()
    assert "A CPU runs **" in card and "random weights" in card


class SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def test_signals_can_still_be_handled_after_an_export(exported: RunFolder) -> None:
    """OpenVINO may leave the thread with a signal stack that is unmapped; SIGTERM then kills."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps]
    mapped = any(int(a, 16) <= (stack.start or 0) < int(b, 16) for a, b in ranges)
    assert stack.start is None or mapped


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "half")
    with folder.open(tiny_config()):
        pass
    with pytest.raises(UnavailableError, match="not a finished run"):
        export.export(folder, Export())


def test_int8_ships_only_within_the_allowed_drop(
    exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An int8 network that is made to lose half of its accuracy stays out of the archive."""
    copy = copy_of(exported, tmp_path)
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


def test_an_archive_of_another_network_is_found_out(exported: RunFolder) -> None:
    judged = data.load(exported.config().data).test.take(torch.arange(4))
    other = np.eye(10, dtype=np.float32)[[9, 9, 9, 9]] * 20
    with pytest.raises(export.ExportError, match="does not give the job's predictions"):
        export.check_parity(
            exported.path / "model" / f"{MODEL}.mar", classes_of(exported), judged, other
        )


class Context(SimpleNamespace):
    """What the handler uses of TorchServe's context."""

    def __init__(self, folder: Path) -> None:
        properties = {"model_dir": str(folder), "gpu_id": None}
        super().__init__(system_properties=properties, statuses={}, refusals={}, metrics=None)

    def get_request_header(self, index: int, name: str) -> str | None:
        return None

    def set_response_header(self, index: int, name: str, value: str) -> None:
        self.refusals[index] = value

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code


def test_bad_requests_touch_no_neighbour_in_their_batch(
    exported: RunFolder, unpacked: Path
) -> None:
    handler, context = Handler(), Context(unpacked)
    handler.initialize(context)
    good = pictures(exported, 3)
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
    expected = predictions(exported, 3)
    assert [answers[0]["label"], answers[2]["label"], answers[6]["label"]] == expected
    assert [p["label"] for p in answers[3]["predictions"]] == [expected[2]] * 2
    assert answers[0]["model"] == {"name": MODEL, "version": exported.run_id}
    assert answers[0]["top"][0]["label"] == answers[0]["label"]
    shares = [entry["probability"] for entry in answers[0]["top"]]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.0001


def test_the_program_runs_on_the_device_it_is_moved_to(unpacked: Path) -> None:
    """It was traced on the CPU, and on a GPU would refuse pictures that are not there."""
    program = torch.export.load(unpacked / runtimes.PROGRAM)
    size = json.loads((unpacked / "model.json").read_text())["image_size"]
    network = runtimes.on_device(program, "meta")
    assert network(torch.empty(3, 3, *size, dtype=torch.uint8, device="meta")).is_meta
    nodes: Any = network.graph.nodes  # type: ignore[union-attr]
    checked = {str(n.kwargs["device"]) for n in nodes if "device" in n.kwargs}
    assert checked == {"meta"}


def test_the_compiled_network_of_a_gpu_agrees_with_the_programs_own_answers(
    unpacked: Path, exported: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and traced but not compiled: the code path, not its speed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    size = json.loads((unpacked / "model.json").read_text())["image_size"]
    predict = runtimes.load_compiled(unpacked / runtimes.PROGRAM, "cpu", tuple(size), chunk=2)
    images = data.load(exported.config().data).test.raw(torch.arange(5)).numpy()
    logits = runtimes.in_chunks(predict, 2)(images)
    with np.load(exported.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        expected = softmax(arrays["logits"][:5])
    np.testing.assert_allclose(softmax(logits), expected, atol=0.05)
