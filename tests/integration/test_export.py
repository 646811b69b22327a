"""The archive answers what the job's network did, from its own files; test_service.py serves it."""

import contextlib
import ctypes
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from base64 import b64encode
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from conftest import MODEL, copy_of, pictures, predictions, tiny_config
from numpy.typing import NDArray
from safetensors.torch import load_file

from jobs import config, interruption
from jobs.config import Export
from jobs.data.dataset import load
from jobs.data.images import Images
from jobs.delivery import export, forms, parity
from jobs.delivery.parity import ExportError, asked, compare
from jobs.errors import Interrupted, UnavailableError
from jobs.results import Diverged
from jobs.runs import RunFolder
from serving import Predictor, archive, runtimes
from serving.archive import FILES, TOLERANCES, Check, Form, ModelError, Version
from serving.files import digest_of
from serving.handler import Handler
from serving.images import to_png
from serving.messages import RequestError, logarithms, softmax
from serving.metrics import PROBE, Meter


@pytest.fixture(scope="module")
def unpacked(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    archive.unpack(exported.path / "model" / f"{MODEL}.mar", folder)
    return folder


def test_the_archive_is_whole_and_holds_no_pickle(exported: RunFolder, unpacked: Path) -> None:
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    model = archive.open_model(exported.path / "model" / f"{MODEL}.mar")
    description = model.description
    assert names == {
        "MAR-INF/MANIFEST.json",
        "handler.py",
        "model.json",
        "familiarity.npz",
        "golden/probabilities.json",
        *(archive.golden_file(i) for i in range(len(model.golden))),
        *(file for form in description.forms for file in FILES[form]),
        *(f"serving/{module}.py" for module in export.MODULES),
    }
    with zipfile.ZipFile(unpacked / FILES["program"][0]) as program:
        assert not [name for name in program.namelist() if name.endswith(".pkl")]
    assert description.version == exported.run_id and len(description.data.classes) == 10
    assert description.forms[-2:] == ("float", "program")
    assert "random weights" in description.weights


def test_what_is_said_of_the_archive_was_measured_on_the_archive(exported: RunFolder) -> None:
    """model.json, the record beside it and the stored predictions are about the same answers."""
    model = exported.path / "model" / f"{MODEL}.mar"
    whole = Version.model_validate_json(model.with_suffix(".json").read_bytes())
    assert whole.description == archive.open_model(model).description
    assert whole.files["model.mar"].sha256 == digest_of(model)
    with np.load(model.with_suffix(".npz")) as arrays:
        logits, labels = arrays["logits"], arrays["labels"]
        assert arrays["leaked"].nonzero()[0].tolist() == list(exported.facts().leaked)
    test = whole.description.test
    assert test is not None
    assert test.accuracy == pytest.approx((logits.argmax(1) == labels).mean())  # a float32
    with np.load(exported.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        assert whole.description.test_check == compare(logits, arrays["logits"], labels)
    for form, check in whole.description.checks.items():
        allowed = TOLERANCES.get(form, TOLERANCES[whole.description.forms[0]])  # type: ignore[call-overload]
        assert check.within(allowed) or form == "int8"
    assert set(whole.description.checks) == {"reference", "int8", "float", "program", "handler"}


def test_the_manifest_lists_the_archive_and_its_card(exported: RunFolder) -> None:
    files = exported.manifest().files
    names = [f"model/{MODEL}.{suffix}" for suffix in ("mar", "json", "npz")]
    for name in (*names, "MODEL_CARD.md"):
        assert files[name].sha256 == digest_of(exported.path / name)
    card = (exported.path / "MODEL_CARD.md").read_text()
    assert "which a CPU runs, from this very archive" in card and "random weights" in card
    assert "is shrunk first" not in card, "its pictures are as large as the input"


def test_the_card_of_small_pictures_says_that_larger_ones_are_shrunk(exported: RunFolder) -> None:
    description = archive.open_model(exported.path / "model" / f"{MODEL}.mar").description
    small = description.data.model_copy(update={"image_size": (24, 32)})
    described = description.model_copy(update={"data": small})
    card = export._model_card(described, input_size=75)
    assert "**A larger picture is shrunk first**, to the 32×24 pixels" in card


def test_the_card_tells_what_it_was_chosen_among(exported: RunFolder) -> None:
    description = archive.open_model(exported.path / "model" / f"{MODEL}.mar").description
    accuracy = archive.Interval(value=0.5, low=0.25, high=0.875)
    among = (
        archive.Compared(variant="frozen", accuracy=accuracy, seconds=100.0),
        archive.Compared(variant="scratch", accuracy=None, seconds=None),
    )
    told = {"compared": among, "sentences": ("frozen wins",)}
    card = export._model_card(description.model_copy(update=told), input_size=75)
    assert "| frozen, chosen | 50.00 % (25.00 to 87.50, 95 %) | 2 min |\n" in card
    assert "| scratch | none: its loss became non-finite | |\n" in card
    assert "\n- frozen wins\n" in card


@pytest.mark.parametrize(
    ("source", "samples", "shown"),
    [
        ("cifar10", None, True),
        ("digits", None, True),
        ("cifar10", False, False),
        ("folder", None, False),
        ("folder", True, True),
    ],
)
def test_ones_own_pictures_are_shown_only_if_one_says_so(
    source: str, samples: bool | None, shown: bool
) -> None:
    assert export._may_show(Export(samples=samples), source) is shown


def test_a_diverged_variant_is_among_the_compared() -> None:
    diverged = Diverged(variant="scratch", seed=0, reason="its loss is nan")
    assert export._compared(diverged) == archive.Compared(
        variant="scratch", accuracy=None, seconds=None
    )


# A notebook's way in


def test_a_predictor_answers_as_the_job_did(exported: RunFolder, tmp_path: Path) -> None:
    predictor = Predictor.open(exported.path / "model" / f"{MODEL}.mar")
    files = []
    for index, picture in enumerate(pictures(exported, 4)):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(picture)
    answers = [predictor(str(file)) for file in files]
    assert [answer["label"] for answer in answers] == predictions(exported, 4)
    assert answers[0] == predictor(files[0].read_bytes())
    assert answers[0]["model"] == {"name": MODEL, "version": exported.run_id}
    with pytest.raises(ModelError, match="not a model archive"):
        Predictor.open(files[0])


def test_an_archive_with_nothing_but_a_program_is_refused_on_a_cpu(
    unpacked: Path, tmp_path: Path
) -> None:
    for_gpus = tmp_path / "for-gpus"
    shutil.copytree(unpacked, for_gpus)
    described = archive.open_model(for_gpus).description
    archive.write_description(for_gpus, described.model_copy(update={"forms": ("program",)}))
    with pytest.raises(ModelError, match="has the network only as program"):
        Predictor.open(for_gpus)


def test_a_predictor_of_a_cpu_imports_neither_torch_nor_torchserve(unpacked: Path) -> None:
    """The folder of the archive is first on the path, so these are the archive's modules."""
    code = (
        "import sys; from serving import Predictor; p = Predictor.open('.');"
        "print(p(open('golden/00.png', 'rb').read())['label']);"
        "print(*{'torch', 'ts', 'jobs'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, check=True
    )
    label, *imported = done.stdout.split()
    model = archive.open_model(unpacked)
    best = int(np.argmax(model.golden[0].probabilities))
    assert label == model.classes[best].split()[0] and imported == model.classes[best].split()[1:]


def test_a_form_that_is_off_on_this_machine_gives_way_to_the_next(
    exported: RunFolder, strange_integers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Libraries that other tests import disable loggers, or raise the root's level.
    logging.getLogger("serving.predictor").disabled = False
    caplog.set_level(logging.WARNING, "serving.predictor")
    predictor = Predictor.open(strange_integers)
    assert predictor.form == "float" and "float serves instead" in caplog.text
    picture = pictures(exported, 1)[0]
    assert predictor(picture)["label"] == predictions(exported, 1)[0]
    assert Predictor.open(strange_integers, form="int8").form == "int8", "as it was asked for"


def test_a_form_that_gives_the_golden_answers_stays(unpacked: Path, tmp_path: Path) -> None:
    """As float's own files do, under the name of int8."""
    copy = copy_without(unpacked, tmp_path / "copy")
    for given, shown in zip(FILES["float"], FILES["int8"], strict=True):
        (copy / shown).unlink(missing_ok=True)
        (copy / shown).hardlink_to(copy / given)
    description = archive.open_model(copy).description
    forms = ("int8", "float", "program")
    archive.write_description(copy, description.model_copy(update={"forms": forms}))
    assert Predictor.open(copy).form == "int8"


def test_an_archive_that_knows_nothing_of_familiarity_says_so(
    exported: RunFolder, unpacked: Path, tmp_path: Path
) -> None:
    """As those of earlier versions, whose description has none of the fields."""
    copy = copy_without(unpacked, tmp_path / "copy", archive.FAMILIARITY)
    found = json.loads((copy / archive.DESCRIPTION).read_text())
    for field in ("temperature", "held_out", "calibration", "map_size"):
        del found[field]
    (copy / archive.DESCRIPTION).write_text(json.dumps({**found, "forms": ["float", "program"]}))
    model = runtimes.core().read_model(unpacked / FILES["float"][0])
    for result in model.get_results()[1:]:
        model.remove_result(result)
    for file in FILES["float"]:
        (copy / file).unlink()
    openvino.save_model(model, copy / FILES["float"][0])
    predictor, picture = Predictor.open(copy), pictures(exported, 1)[0]
    answer = predictor(picture)
    assert answer["label"] == predictions(exported, 1)[0] and answer["familiarity"] is None
    with pytest.raises(RequestError, match="too few pictures were held out"):
        predictor(picture, abstain=0.1)
    with pytest.raises(RequestError, match="this archive gives no class maps"):
        predictor(picture, explain=True)


@pytest.mark.parametrize("form", ["int8", "float", "program"])
def test_a_class_map_and_the_bias_add_up_to_the_logit(
    exported: RunFolder, unpacked: Path, form: Form
) -> None:
    if form not in archive.open_model(unpacked).description.forms:
        pytest.skip("it was not accurate enough on this machine")
    predictor = Predictor.open(unpacked, form=form)
    images = load(exported.config().data).test.raw(torch.arange(6)).numpy()
    check_maps(predictor.network(images), exported, form)


def test_an_explanation_has_the_map_of_the_label_and_changes_nothing_else(
    exported: RunFolder, unpacked: Path
) -> None:
    predictor, picture = Predictor.open(unpacked, form="float"), pictures(exported, 1)[0]
    answer, plain = predictor(picture, explain=True), predictor(picture)
    explanation = answer.pop("explanation")
    assert answer == plain and explanation["label"] == answer["label"]
    label = predictor.classes.index(answer["label"])
    found = predictor.network(predictor.pixels(picture)[None])
    assert explanation["map"] == found.maps[0, label].tolist()


@pytest.mark.slow
def test_each_place_of_a_larger_input_has_its_own_part_in_the_logit(
    exported: RunFolder, tmp_path: Path
) -> None:
    """107 pixels are the fewest that give more than one."""
    best = exported.path / "variants" / "frozen" / "best.safetensors"
    train = load(exported.config().data).train
    with forms.written(forms.served(best, 10, 107, "inception"), train, 4, tmp_path):
        pass
    for form in FILES:
        network = runtimes.load(tmp_path / FILES[form][0], None, (75, 75))
        found = network(train.raw(torch.arange(6)).numpy())
        assert found.maps.shape == (6, 10, 2, 2) and found.maps.std(axis=(2, 3)).min() > 0
        check_maps(found, exported, form)


@pytest.mark.slow
def test_int8_that_cannot_be_made_says_why(
    exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nncf.py").write_text("raise ImportError('a package that is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    best = exported.path / "variants" / "frozen" / "best.safetensors"
    network, train = forms.served(best, 10, 75, "inception"), load(exported.config().data).train
    refused = pytest.raises(ExportError, match="int8 was not made: ImportError: a package that is")
    with refused, forms.written(network, train, 4, tmp_path):
        pass


def last_bias(run: RunFolder) -> NDArray[np.float32]:
    best = load_file(run.path / "variants" / "frozen" / "best.safetensors")
    return best["fc.bias"].numpy()


def check_maps(found: runtimes.Outputs, run: RunFolder, form: Form) -> None:
    logits = found.maps.mean(axis=(2, 3)) + last_bias(run)
    labels = found.logits.argmax(1)
    assert compare(logits, found.logits, labels).logit_error < TOLERANCES[form].logit_error


def test_the_archive_tells_how_familiar_a_picture_is(exported: RunFolder, unpacked: Path) -> None:
    description = archive.open_model(unpacked).description
    assert description.held_out == 60 and description.calibration is not None
    predictor = Predictor.open(unpacked)
    test = load(exported.config().data).test
    found = predictor.find(test.raw(torch.arange(len(test))).numpy())
    assert found.familiarity is not None
    assert set((found.familiarity * 61).round(6)) <= set(range(1, 62))
    assert 0.2 < found.familiarity.mean() < 0.8, "0.5 in the mean of many draws"
    noise = np.random.default_rng(0).integers(256, size=(8, 3, *predictor.size), dtype=np.uint8)
    strange = predictor.find(noise).familiarity
    assert strange is not None and strange.mean() < found.familiarity.mean()


# What is checked


def copy_without(unpacked: Path, folder: Path, missing: str = "") -> Path:
    """An unpacked archive that a test may change, less the files of one name."""
    for source in unpacked.rglob("*"):
        if source.is_file() and source.name != missing:
            target = folder / source.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(source)
    description = (unpacked / archive.DESCRIPTION).read_bytes()
    (folder / archive.DESCRIPTION).unlink()
    (folder / archive.DESCRIPTION).write_bytes(description)
    return folder


@pytest.mark.parametrize(
    "form", ["float", pytest.param("program", marks=pytest.mark.slow), "handler"]
)
@pytest.mark.parametrize("missing", ["messages.py", "images.py"])
def test_a_file_that_the_archive_lacks_is_noticed(
    unpacked: Path, tmp_path: Path, form: str, missing: str
) -> None:
    """Also where the checkout, from which this runs, has it."""
    copy = copy_without(unpacked, tmp_path / "copy", missing)
    module = missing.removesuffix(".py")
    image = np.zeros((1, 3, *archive.open_model(unpacked).description.data.image_size), np.uint8)
    with (
        pytest.raises(ExportError, match=f"No module named 'serving.{module}'"),
        asked(copy, form) as network,
    ):
        network(image)


def logits_of(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


SURE = logits_of([9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0])
UNSURE = SURE / 30
LABELS = np.array([0, 1, 2, 0])


@pytest.mark.parametrize("reference", [SURE, UNSURE], ids=["sure", "unsure"])
@pytest.mark.parametrize("form", ["program", "float", "int8"])
def test_a_constant_answer_is_no_form_of_a_model(form: Any, reference: Any) -> None:
    """However unsure the model is of itself."""
    constant = np.broadcast_to(reference.mean(axis=0), reference.shape)
    assert not compare(constant, reference, LABELS).within(TOLERANCES[form])
    assert not compare(reference[::-1], reference, LABELS).within(TOLERANCES[form])
    assert compare(reference, reference, LABELS).within(TOLERANCES[form])
    shifted = reference + np.float32(3)  # which changes no probability
    assert compare(shifted, reference, LABELS).within(TOLERANCES[form])
    assert not compare(reference * np.float32("nan"), reference, LABELS).within(TOLERANCES[form])
    one = reference[:1], LABELS[:1]  # which has no spread over pictures
    assert compare(one[0] * np.float32(1.0001), *one).within(TOLERANCES[form])
    assert not compare(one[0][:, ::-1], *one).within(TOLERANCES[form])


class Four:
    """Pictures of LABELS."""

    labels = torch.from_numpy(LABELS)

    def __len__(self) -> int:
        return len(LABELS)

    def take(self, _: object) -> "Four":
        return self


@pytest.mark.parametrize("right", [True, False])
def test_a_handler_may_be_surer_than_probabilities_can_tell(
    right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 100 * SURE
    told = logarithms(softmax(logits if right else logits[::-1]))
    assert not compare(told, logits, LABELS).within(TOLERANCES["float"])
    monkeypatch.setattr(export, "asked", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(archive, "write_description", lambda *_: None)
    monkeypatch.setattr(export, "predict", lambda *_: runtimes.outputs([told]))
    with contextlib.nullcontext() if right else pytest.raises(ExportError, match="handler"):
        export._check_handler(None, None, Four(), logits)  # type: ignore[arg-type]


def test_a_signal_to_all_processes_is_no_error_of_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the children first, and their pipes say so before anything else does."""
    images = np.zeros((1, 3, 75, 75), np.uint8)
    with asked(tmp_path, "float") as ask, pytest.raises(ExportError, match="does not run"):
        ask(images)
    monkeypatch.setattr(interruption, "_received", ["SIGINT"])
    with asked(tmp_path, "float") as ask, pytest.raises(Interrupted):
        ask(images)


def test_an_archiver_that_is_killed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    given = SimpleNamespace(name="m", version="1")
    with pytest.raises(ExportError, match="torch-model-archiver: -9"):
        export._pack(tmp_path, tmp_path, given)  # type: ignore[arg-type]


def test_names_are_no_markup_in_the_card() -> None:
    assert export._plain("<i>__init__</i>\n# a|b") == r"\<i\>\_\_init\_\_\</i\> \# a\|b"


@pytest.mark.parametrize(("undecided", "accepted"), [(1, True), (2, False)])
def test_one_picture_of_few_may_be_between_two_classes(undecided: int, accepted: bool) -> None:
    """Rounding moves one that is near a tie further than others; two of twenty are too many."""
    reference = np.tile(SURE, (5, 1))
    reference[:undecided] = [6, 5, 0]
    rounded = reference.copy()
    rounded[:undecided] = [6, 5.5, 0]
    check = compare(rounded, reference, np.tile(LABELS, 5))
    assert check.largest_probability_error > 2 * TOLERANCES["float"].probability_error
    assert check.within(TOLERANCES["float"]) is accepted


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


def test_packing_leaves_alone_what_another_export_of_the_name_works_on(
    exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe's archiver works in a folder of the model's name, which it empties first."""
    for name in ("shared", "work", "stage"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "shared"))
    (others := tmp_path / "shared" / MODEL).mkdir()
    (others / "network.pt2").write_text("of another export")
    version = Version.model_validate_json((exported.path / "model" / f"{MODEL}.json").read_bytes())
    packed = export._pack(tmp_path / "stage", tmp_path / "work", version.description)
    assert zipfile.is_zipfile(packed)
    assert (others / "network.pt2").read_text() == "of another export"


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "half")
    with folder.open(tiny_config()):
        pass
    with pytest.raises(UnavailableError, match="not a finished run"):
        export.export(folder, Export())


def check(accuracy: float, **changes: float) -> Check:
    figures = {"agreement": 1.0, "logit_error": 0.01, "probability_error": 0.01}
    return Check(
        images=100, accuracy=accuracy, largest_probability_error=0.02, **{**figures, **changes}
    )


def test_int8_ships_only_within_the_allowed_drop_and_deviation() -> None:
    reference = check(0.9)
    for int8, serves, reason in (
        (check(0.898), True, "in 8-bit integers, which is faster: 89.8% of 100"),
        (check(0.897), True, "in 8-bit integers"),  # (0.9 - 0.897) * 100 is more than 0.3
        (check(0.896), False, "(0.4 points are lost, 0.3 may be)"),
        (check(0.9, agreement=0.7), False, "(too far off in its probabilities)"),
        (check(0.9, logit_error=0.5), False, "(too far off in its probabilities)"),
    ):
        checks = {"reference": reference, "int8": int8}
        assert export.int8_serves(checks, 0.3) is serves
        assert reason in export.int8_outcome(checks, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("off", ["int8", "int8, test"])
def test_int8_that_loses_too_much_stays_out_of_the_archive(
    exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """The real int8 network, whose answers are turned round on their way here: those to held-out
    images, or those to the test images after perfect ones to the others."""
    copy, real = copy_of(exported, tmp_path), parity.predict
    answers: dict[str, Any] = {}

    def turned(label: str, network: Any, images: Any) -> Any:
        if label == "int8" != off:
            return answers["reference"]
        answers[label] = given = real(label, network, images)
        return given._replace(logits=given.logits[:, ::-1].copy()) if label == off else given

    monkeypatch.setattr(export, "predict", turned)
    target = export.export(copy, Export(calibration_images=2, images=4))
    assert off in answers
    description = archive.open_model(target).description
    assert description.forms == ("float", "program")
    assert description.test_check is not None
    assert description.test_check.within(TOLERANCES["float"])
    with zipfile.ZipFile(target) as packed:
        assert not [name for name in packed.namelist() if "int8" in name]
    assert "int8 was not accurate enough" in (copy.path / "MODEL_CARD.md").read_text()


def test_an_archive_of_another_network_is_found_out(
    exported: RunFolder, unpacked: Path, tmp_path: Path
) -> None:
    copy = copy_without(unpacked, tmp_path / "copy")
    description = archive.open_model(copy).description
    judged = load(exported.config().data).test.take(torch.arange(4))
    with np.load(exported.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        another = np.roll(arrays["logits"][:4], 1, axis=1)
    refused = pytest.raises(ExportError, match="does not give the job's predictions")
    with parity.asked_all(copy, description.forms) as networks, refused:
        export._check_forms(description, networks, judged, another, Export(max_accuracy_drop=100))


def test_the_golden_set_has_the_surest_images_of_every_class() -> None:
    probabilities = logits_of([0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.95, 0.05])
    assert export.most_confident_first(probabilities).tolist() == [4, 2, 0, 3, 1]


class Context(SimpleNamespace):
    """What the handler uses of TorchServe's context."""

    def __init__(self, folder: Path) -> None:
        properties = {"model_dir": str(folder), "gpu_id": None}
        super().__init__(system_properties=properties, statuses={}, refusals={}, metrics=None)
        self.headers: dict[str, str] = {}

    def get_request_header(self, index: int, name: str) -> str | None:
        return self.headers.get(name)

    def set_response_header(self, index: int, name: str, value: str) -> None:
        if name == "X-Refusal":
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


def test_evidence_of_a_change_rises_with_foreign_pictures_and_not_with_golden_ones(
    exported: RunFolder, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, context = Handler(), Context(unpacked)
    handler.initialize(context)
    assert handler.drift is not None
    told: set[str] = set()
    of_clients = {"predictions_total", "confidence", "familiarity"}
    monkeypatch.setattr(Meter, "_update", lambda meter, name, *rest: told.add(name))

    def send(files: list[bytes]) -> float:
        """The evidence after that."""
        handler.handle([{"body": file} for file in files], context)
        assert handler.drift is not None and not context.statuses
        return handler.drift.evidence

    noise = np.random.default_rng(0).integers(256, size=(20, 3, 75, 75), dtype=np.uint8)
    foreign = [to_png(pixels) for pixels in noise]
    context.headers = {"X-Request-Id": PROBE}
    assert send(foreign) == 0 and handler.drift.pictures == 0
    assert "batch_size" in told and not of_clients & told
    context.headers = {}
    familiar = send(pictures(exported, 20))
    assert of_clients <= told
    assert handler.drift.pictures == 20
    assert familiar < 2 < send(foreign)


def test_there_is_no_pickle_in_the_program(unpacked: Path) -> None:
    with zipfile.ZipFile(unpacked / FILES["program"][0]) as program:
        members = {name: program.read(name) for name in program.namelist()}
    assert not any(content for name, content in members.items() if "/sample_inputs/" in name)
    configs = [content for name, content in members.items() if name.endswith("_config.json")]
    assert configs and not any(b'"use_pickle": true' in content for content in configs)
    assert not any(content.startswith(b"PK\x03\x04") for content in members.values())  # torch.save


def test_the_program_runs_on_the_device_it_is_moved_to(unpacked: Path) -> None:
    """It was traced on the CPU, and on a GPU would refuse pictures that are not there."""
    program = torch.export.load(unpacked / FILES["program"][0])
    size = archive.open_model(unpacked).description.data.image_size
    network = runtimes.on_device(program, "meta")
    found = network(torch.empty(3, 3, *size, dtype=torch.uint8, device="meta"))
    assert [(tensor.device.type, *tensor.shape) for tensor in found] == [
        ("meta", 3, 10),
        ("meta", 3, 2048),
        ("meta", 3, 10, 1, 1),
    ]
    nodes: Any = network.graph.nodes  # type: ignore[union-attr]
    checked = {str(n.kwargs["device"]) for n in nodes if "device" in n.kwargs}
    assert checked == {"meta"}


@pytest.mark.slow
def test_the_compiled_network_of_a_gpu_agrees_with_the_programs_own_answers(
    unpacked: Path, exported: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and traced but not compiled: the code path, not its speed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    size = archive.open_model(unpacked).description.data.image_size
    predict = runtimes.load_compiled(unpacked / FILES["program"][0], "cpu", size, chunk=2)
    images = load(exported.config().data).test.raw(torch.arange(5)).numpy()
    logits, features, maps = runtimes.in_chunks(predict, 2)(images)
    assert features.shape == (5, 2048) and maps.shape == (5, 10, 1, 1)
    with np.load(exported.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        expected = softmax(arrays["logits"][:5])
    np.testing.assert_allclose(softmax(logits), expected, atol=0.05)


def test_nobody_is_told_what_is_exported() -> None:
    """OpenVINO's converter and NNCF have taken what they take where there is no telemetry."""
    from nncf.telemetry import wrapper
    from openvino.tools.ovc import convert_impl, telemetry_stub

    assert convert_impl.tm is telemetry_stub
    assert isinstance(wrapper.telemetry, wrapper.NNCFTelemetryStub)


def test_held_out_pictures_are_of_all_classes_though_they_are_sorted_by_class() -> None:
    labels = torch.arange(10).repeat_interleave(200)
    pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(2000, -1, -1, -1)
    images = Images.all(pixels, labels, config.Data())
    none = images.take(labels[:0])
    dataset: Any = SimpleNamespace(validation=images, test=none)
    drawn = export._held_out(dataset, 1000)
    assert len(set(drawn.rows.tolist())) == 1000 and drawn.labels.bincount().min() > 50
    assert torch.equal(export._held_out(dataset, 1000).rows, drawn.rows)
    dataset = SimpleNamespace(validation=none, test=images)
    assert torch.equal(export._held_out(dataset, 5000).rows, images.rows), "all, in their order"
