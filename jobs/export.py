"""The winner as a TorchServe archive, checked against the job's own predictions.

The archive holds the handler and its modules, the network as a `torch.export` program and as an
OpenVINO IR, and model.json: name, version, classes, the size that pictures are scaled to, and what
the model was trained on. Pictures enter the network as uint8 in the size of the training pictures;
scaling to 299 and normalisation are part of it, so serving cannot differ from training there.
Nothing in it is a pickle.
"""

import importlib.util
import io
import logging
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import Inception3

import serving
from jobs import data, interruption, models
from jobs.config import Export
from jobs.data import Images
from jobs.errors import ConfigurationError, JobError, UnavailableError
from jobs.progress import log, task
from jobs.runs import RunFolder, sha256, write, write_json
from serving import runtimes
from serving.images import to_input
from serving.messages import softmax

Logits = NDArray[np.float32]
Handle = Callable[[list[dict[str, bytes]]], list[dict[str, Any]]]

BATCH = 8  # pictures at a time
MAX_BATCH = 1024
PARITY_IMAGES = 200  # at most; the handler runs them on one thread, as a worker does
GOLDEN = "golden.png"
# Of `serving`, what the handler imports.
MODULES = ("__init__", "images", "messages", "metrics", "runtimes")
# int8 and bf16 round. A label may differ from the job's only where the job's first two classes
# are closer than this, and no probability may be further off than that.
LABEL_MARGIN = 0.2
PROBABILITY_TOLERANCE = 0.25


class ExportError(JobError):
    """The archive does not give what the job got."""


class Served(nn.Module):
    """From pictures as they come, uint8 [N, 3, H, W], to logits float32 [N, C]."""

    def __init__(self, network: Inception3, input_size: int, normalization: str) -> None:
        super().__init__()
        self.network, self.input_size, self.normalization = network, input_size, normalization

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(to_input(images, self.input_size, self.normalization))
        return logits


def export(folder: RunFolder, settings: Export) -> Path:
    """Writes model/<name>.mar and MODEL_CARD.md of a finished run's winner.

    Raises:
        UnavailableError: the run is unfinished or has no winner.
        ConfigurationError: the packages of the extra `export` are not installed.
        ExportError: the archive does not give the job's predictions; nothing is written.
    """
    if missing := missing_packages():
        names = ", ".join(missing)
        raise ConfigurationError(f"export needs {names}: pip install 'inception-transfer[export]'")
    folder.manifest()
    config, result = folder.config(), folder.comparison()
    winner = result["winner"]
    if winner is None:
        raise UnavailableError(f"{folder.path}: no variant came to a result, nothing to export")
    log(f"export: {winner} of {folder.run_id} as {settings.name}")
    dataset = data.load(config.data)
    judged = dataset.validation if len(dataset.validation) else dataset.test
    judged = judged.take(torch.arange(min(len(judged), settings.images)))
    best = folder.variant(winner, config.runtime.seeds[0]).best
    served = _served(best, len(dataset.classes), config.data.input_size, config.data.normalization)

    with folder.open(config), tempfile.TemporaryDirectory() as work:
        stage = Path(work) / "stage"
        stage.mkdir()
        reference = _predict("reference", _eager(served), judged)
        forms = _write_networks(served, dataset.train, judged, reference, stage, settings)
        description = {
            "name": settings.name,
            "version": folder.run_id,
            "classes": list(dataset.classes),
            "image_size": dataset.description["image_size"],
            "variant": winner,
            "weights": result["weights"],
            "data": {k: v for k, v in dataset.description.items() if k != "skipped"},
            "test": result["variants"][winner]["test"],
            "forms": forms,
            "golden": _golden(judged, reference, dataset.classes, stage),
        }
        write_json(stage / "model.json", description)
        archive = _archive(stage, Path(work), settings.name, folder.run_id)
        few = torch.arange(min(len(judged), PARITY_IMAGES))
        parity = check_parity(archive, dataset.classes, judged.take(few), reference[: len(few)])
        card = _model_card(description, parity)
        target = folder.path / "model" / archive.name
        write(target, archive.read_bytes())
        beside = {**description, "sha256": sha256(target), "parity": parity}
        write_json(target.with_suffix(".json"), beside)
        write(folder.path / "MODEL_CARD.md", card)
        folder.write_manifest()
    return target


def missing_packages() -> list[str]:
    """What export needs and this environment lacks: packages of the extra `export`."""
    return [n for n in ("openvino", "nncf", "model_archiver") if not importlib.util.find_spec(n)]


def _served(best: Path, classes: int, input_size: int, normalization: str) -> Served:
    network = models.build(classes, aux=False)
    state = {k: v for k, v in load_file(best).items() if not k.startswith("AuxLogits.")}
    network.load_state_dict(state)
    network.to(memory_format=torch.contiguous_format)
    return Served(network, input_size, normalization).eval()


def _eager(served: Served) -> runtimes.Predict:
    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> Logits:
        result: Logits = served(torch.from_numpy(images)).numpy()
        return result

    return predict


def _predict(label: str, predict: runtimes.Predict, images: Images) -> Logits:
    """Logits float32 [N, C] of all images, in batches."""
    outputs = []
    with task(f"export, {label}", len(images)) as advance:
        for batch in torch.arange(len(images)).split(BATCH):
            interruption.check()
            outputs.append(predict(images.raw(batch).numpy()))
            advance(len(batch))
    return np.concatenate(outputs)


def _write_networks(
    served: Served,
    train: Images,
    judged: Images,
    reference: Logits,
    stage: Path,
    settings: Export,
) -> dict[str, Any]:
    """Writes the program and the IR; int8 becomes the IR if it is accurate enough.

    Returns:
        How every form did against the reference, and which one the IR is.
    """
    import openvino

    runtimes.core()  # before the cores of the next steps, which are freed
    log("export: the network as a program for GPUs")
    program = _program(served, train)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, stage / runtimes.PROGRAM)
    log("export: converted for CPUs")
    model = openvino.convert_model(program)
    openvino.save_model(model, stage / "float.xml")

    openvino.save_model(_quantised(model, train, settings.calibration_images), stage / "int8.xml")

    labels = judged.labels.numpy()
    forms: dict[str, Any] = {"reference": compare(reference, reference, labels)}
    for form in ("float", "int8"):
        network = runtimes.load_ir(stage / f"{form}.xml", threads=torch.get_num_threads())
        forms[form] = compare(_predict(form, network, judged), reference, labels)
    allowed = forms["reference"]["accuracy"] - settings.max_accuracy_drop / 100
    accurate = forms["int8"]["accuracy"] >= allowed
    shipped = "int8" if accurate and _close(forms["int8"]) else "float"
    for form in ("float", "int8"):
        for suffix in (".xml", ".bin"):
            file = stage / f"{form}{suffix}"
            if form == shipped:
                file.rename((stage / runtimes.IR).with_suffix(suffix))
            else:
                file.unlink()
    forms |= {"shipped": shipped, "allowed": allowed, "images": len(labels)}
    log(f"export: {_verdict(forms, settings.max_accuracy_drop)}")
    return forms


def _quantised(model: Any, train: Images, count: int) -> Any:
    """The OpenVINO model in int8, its ranges taken from `count` training pictures at most."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import nncf

    order = torch.randperm(len(train), generator=data.generator("calibration"))[:count]
    # Its own bars are drawn for a terminal even where there is none.
    with task("export, ranges for int8", len(order)) as advance, redirect_stdout(io.StringIO()):

        def picture(batch: Tensor) -> NDArray[np.uint8]:
            interruption.check()
            advance(1)
            pixels: NDArray[np.uint8] = train.raw(batch).numpy()
            return pixels

        dataset = nncf.Dataset(order.split(1), picture)
        return nncf.quantize(model, dataset, subset_size=len(order))


def _verdict(forms: Mapping[str, Any], allowed_drop: float) -> str:
    """Which numbers a CPU computes with, and why, for somebody who has never heard of int8."""
    reference, rounded = forms["reference"]["accuracy"], forms["int8"]["accuracy"]
    drop = (reference - rounded) * 100
    got = f"{rounded:.1%} of {forms['images']} held-out pictures right, {reference:.1%} without"
    if forms["shipped"] == "int8":
        return f"a CPU runs it in 8-bit integers, which is faster: {got}"
    if drop > allowed_drop:
        why = f"{drop:.1f} points are lost, {allowed_drop:.1f} may be"
    else:
        why = "too far off in a single probability"
    return f"a CPU runs it in floats; not in 8-bit integers, which is faster: {got} ({why})"


def _program(served: Served, train: Images) -> torch.export.ExportedProgram:
    example = train.raw(torch.arange(2))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        return torch.export.export(served, (example,), dynamic_shapes={"images": {0: batch}})


def compare(logits: Logits, reference: Logits, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy of some predictions, and how far they are from the reference's.

    Returns:
        `accuracy`; `agreement`, the share of equal labels; `probability_error`, the largest
        difference of any probability; `margin`, the largest lead, in the reference, of a first
        class over its second where the label differs, 0 where none does.
    """
    probabilities, expected = softmax(logits), softmax(reference)
    differs = logits.argmax(1) != reference.argmax(1)
    first_two = np.sort(expected, axis=1)[:, -2:]
    leads = (first_two[:, 1] - first_two[:, 0])[differs]
    return {
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "agreement": float(1 - differs.mean()),
        "probability_error": float(np.abs(probabilities - expected).max()),
        "margin": float(leads.max(initial=0)),
    }


def _golden(
    judged: Images, reference: Logits, classes: Sequence[str], stage: Path
) -> dict[str, Any]:
    """Stores the picture that the network is surest of; a service is ready when it gets this
    answer for it."""
    probabilities = softmax(reference)
    surest = int(probabilities.max(1).argmax())
    (stage / GOLDEN).write_bytes(_png(judged.raw(torch.tensor([surest]))[0]))
    return {
        "label": classes[int(probabilities[surest].argmax())],
        "probability": float(probabilities[surest].max()),
        "tolerance": PROBABILITY_TOLERANCE,
    }


def _archive(stage: Path, work: Path, name: str, version: str) -> Path:
    """Packs the stage and the handler with TorchServe's own archiver."""
    source = Path(serving.__file__).parent
    (stage / "serving").mkdir()
    for module in MODULES:
        file = f"{module}.py"
        (stage / "serving" / file).write_bytes((source / file).read_bytes())
    out = work / "out"
    out.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += ["--model-name", name, "--version", version, "--export-path", str(out)]
    command += ["--handler", str(source / "handler.py"), "--extra-files", str(stage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"torch-model-archiver: {done.stderr.strip().splitlines()[-1]}")
    return out / f"{name}.mar"


def check_parity(
    archive: Path, classes: Sequence[str], judged: Images, reference: Logits
) -> dict[str, float]:
    """Runs the archive, unpacked, through its own handler on the pictures as PNG files.

    Returns:
        `images`, `agreement`, `probability_error` and `margin`, as :func:`compare` has them.

    Raises:
        ExportError: an answer is further from the reference's than rounding explains.
    """
    with unpacked(archive) as (_, handle):
        answers = _answers(handle, judged)
    if refused := [answer for answer in answers if "error" in answer]:
        raise ExportError(f"the archive refuses the job's pictures: {refused[0]['error']}")
    probabilities = softmax(reference)
    expected = [dict(zip(classes, row, strict=True)) for row in probabilities.tolist()]
    errors, leads = [], []
    for answer, row in zip(answers, expected, strict=True):
        errors += [abs(entry["probability"] - row[entry["label"]]) for entry in answer["top"]]
        first, second = sorted(row, key=lambda label: -row[label])[:2]
        if answer["label"] != first:
            leads.append(row[first] - row[second])
    parity = {
        "images": len(answers),
        "agreement": 1 - len(leads) / len(answers),
        "probability_error": max(errors),
        "margin": max(leads, default=0.0),
    }
    if not _close(parity):
        raise ExportError(f"the archive does not give the job's predictions: {parity}")
    return parity


def _close(figures: Mapping[str, float]) -> bool:
    near = figures["probability_error"] <= PROBABILITY_TOLERANCE
    return near and figures["margin"] <= LABEL_MARGIN


@contextmanager
def unpacked(archive: Path) -> Iterator[tuple[Path, Handle]]:
    """The archive's files in a temporary folder, and its own handler, as TorchServe calls it."""
    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(archive) as file:
            file.extractall(name)
        spec = importlib.util.spec_from_file_location("handler", Path(name) / "handler.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = module.Handler()
        properties = {"model_dir": name, "gpu_id": None}
        context = SimpleNamespace(
            system_properties=properties,
            metrics=None,
            get_request_header=lambda *_: None,
            set_response_status=lambda *_: None,
            set_response_header=lambda *_: None,
        )
        handler.initialize(context)
        yield Path(name), lambda rows: handler.handle(rows, context)


def _answers(handle: Handle, judged: Images) -> list[dict[str, Any]]:
    """What the archive's own handler says to every picture."""
    answers: list[dict[str, Any]] = []
    with task("export, parity", len(judged)) as advance:
        for batch in torch.arange(len(judged)).split(BATCH):
            interruption.check()
            rows = [{"body": _png(picture)} for picture in judged.raw(batch)]
            answers += handle(rows)
            advance(len(rows))
    return answers


def _png(picture_CHW: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_CHW.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def _model_card(description: dict[str, Any], parity: dict[str, float]) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    card = templates.get_template("model_card.md")
    return card.render(model=description, test=description["test"], parity=parity) + "\n"
