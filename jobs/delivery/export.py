"""Exports the winner as a TorchServe archive; every part is verified before it is written.

serving/archive.py says what is in it. Nothing in it is a pickle.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

import serving
from jobs import interruption
from jobs.config import Export
from jobs.data import sources
from jobs.data.dataset import Dataset, load
from jobs.data.images import Images
from jobs.delivery import forms, trust
from jobs.delivery.parity import ExportError, Logits, asked, asked_all, compare, predict
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Diverged, Summary
from jobs.runs import RunFolder, now, read_arrays, write_arrays
from jobs.seeds import generator
from jobs.statistics import paired_difference
from jobs.train import evaluation
from serving import archive
from serving.archive import (
    ARCHIVE,
    PREDICTIONS,
    TOLERANCES,
    Calibration,
    Check,
    Compared,
    Data,
    Description,
    Form,
    Interval,
)
from serving.files import temporary, write
from serving.images import to_png
from serving.messages import logarithms, softmax
from serving.progress import duration, log
from serving.runtimes import Outputs, Predict

GOLDEN_IMAGES = 32
SAMPLES = 10  # golden pictures to try the service with
DIFFERENT = 0.001  # a p-value below which rounding is no explanation
# Of `serving`, what the handler and the check need.
MODULES = (
    *("__init__", "archive", "checking", "drift", "explanations", "files", "images", "messages"),
    *("metrics", "predictor", "runtimes", "trust"),
)


def export(folder: RunFolder, settings: Export) -> Path:
    """Writes model/<name>.{mar,npz,json} and MODEL_CARD.md of a finished run's winner.

    The archive is packed, unpacked and queried, and written only if it passes. `.npz` has its
    logits for the test set, `.json` is the registry's future version.json.

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
    if result.winner is None or result.winner_seed is None:
        raise UnavailableError(f"{folder.path}: no variant has a result, nothing to export")
    log(f"export: {result.winner} of {folder.run_id} as {settings.name}")
    dataset = load(config.data, folder.facts().digest)
    variant = folder.variant(result.winner, result.winner_seed)
    network = forms.served(
        variant.best, len(dataset.classes), config.data.input_size, config.data.normalization
    )
    held_out = _held_out(dataset, settings.images)
    target = folder.path / folder.archive(settings.name)

    with folder.open(config), temporary() as work:
        stage = work / "stage"
        stage.mkdir()
        with forms.written(network, dataset.train, settings.calibration_images, stage):
            trained = predict("reference", forms.eager(network), held_out)
        reference, temperature = trained.logits, 1.0
        if len(dataset.validation):
            temperature = trust.fit_temperature(reference, held_out.labels.numpy())
        _write_golden(held_out, reference / temperature, stage)
        description = Description(
            name=settings.name,
            version=folder.run_id,
            variant=result.winner,
            seed=result.winner_seed,
            weights=result.weights,
            data=Data.model_validate(dataset.description.model_dump()),
            selected_on=result.selected_on,
            compared=tuple(_compared(one) for one in result.variants.values()),
            sentences=result.sentences,
            samples=min(len(held_out), SAMPLES) if _may_show(settings, config.data.source) else 0,
            forms=("int8", "float", "program"),
            temperature=temperature,
            map_size=trained.maps.shape[2:],
        )
        packed = _pack(stage, work, description)
        job_logits = read_arrays(variant.path / PREDICTIONS)["logits"]
        with archive.unpacked(packed) as unpacked:
            archive.write_description(unpacked, description)
            given = (dataset, held_out, reference, job_logits)
            description, logits = _check(description, unpacked, *given, settings)
            packed = _complete(packed, stage, unpacked, description)
        archive.open_model(packed)
        write(target, packed.read_bytes())
        arrays = {"logits": logits, "labels": dataset.test.labels.numpy()}
        arrays["digests"] = dataset.test.digests()
        arrays["leaked"] = np.isin(np.arange(len(logits)), folder.facts().leaked)
        write_arrays(target.with_suffix(".npz"), arrays)
        write(target.with_suffix(".json"), _version(target, description).to_json())
        write(folder.path / "MODEL_CARD.md", _model_card(description, config.data.input_size))
        folder.write_manifest()
    return target


def _held_out(dataset: Dataset, count: int) -> Images:
    """Pictures by which the archive is judged and its trust is measured: validation's, if there
    are any, else the test set's. Drawn, as those in folders are sorted by class."""
    images = dataset.validation if len(dataset.validation) else dataset.test
    drawn = torch.randperm(len(images), generator=generator("held out"))[:count]
    return images.take(drawn.sort().values)


def _compared(variant: Summary | Diverged) -> Compared:
    if isinstance(variant, Diverged):
        return Compared(variant=variant.variant, accuracy=None, seconds=None)
    low, high = variant.accuracy_low, variant.accuracy_high
    accuracy = Interval(value=variant.accuracy_mean, low=low, high=high)
    return Compared(variant=variant.variant, accuracy=accuracy, seconds=variant.seconds)


def missing_packages() -> list[str]:
    """What export needs and this environment lacks: packages of the extra `export`."""
    return [n for n in ("openvino", "nncf", "model_archiver") if not importlib.util.find_spec(n)]


def _may_show(settings: Export, source: str) -> bool:
    """Whether pictures of the data set may be shown to whoever reaches the service."""
    published: bool = getattr(sources.find(source), "PUBLISHED", False)
    return published if settings.samples is None else settings.samples


def _write_golden(held_out: Images, reference: Logits, stage: Path) -> None:
    """Stores the most confident images, by class in rotation, and their predictions."""
    probabilities = softmax(reference)
    chosen = most_confident_first(probabilities)[:GOLDEN_IMAGES]
    (stage / archive.GOLDEN).mkdir()
    for index, image in enumerate(held_out.raw(torch.from_numpy(chosen)).cpu().numpy()):
        (stage / archive.golden_file(index)).write_bytes(to_png(image))
    rows = probabilities[chosen].astype(float).round(6).tolist()
    (stage / archive.PROBABILITIES).write_text(json.dumps(rows))


def most_confident_first(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """All rows: the most confident of every predicted class, then the second of each, and so on.

    Args:
        probabilities: float32 [N, C].

    Returns:
        Row indices, int64 [N].
    """
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    by_confidence = np.argsort(-confidence, kind="stable")
    rank = np.empty(len(confidence), np.int64)  # within its class
    for label in np.unique(predicted):
        of_class = by_confidence[predicted[by_confidence] == label]
        rank[of_class] = np.arange(len(of_class))
    return np.lexsort((-confidence, rank))


def _pack(stage: Path, work: Path, description: Description) -> Path:
    """Packs the stage and the code by TorchServe's own archiver; model.json is added later."""
    source = Path(serving.__file__).parent
    (stage / "serving").mkdir(exist_ok=True)
    for module in MODULES:
        file = f"{module}.py"
        (stage / "serving" / file).write_bytes((source / file).read_bytes())
    name = description.name
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--force"]
    command += ["--model-name", name, "--version", description.version, "--export-path", str(work)]
    command += ["--handler", str(source / "handler.py"), "--extra-files", str(stage)]
    # It works in a folder of the model's name, which another export of that name would share.
    (own := work / "archiver").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(own)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        interruption.check()  # the signal was for all processes of the group
        words = done.stderr.strip().splitlines() or [str(done.returncode)]
        raise ExportError(f"torch-model-archiver: {words[-1]}")
    return work / f"{name}.mar"


def _complete(packed: Path, stage: Path, unpacked: Path, description: Description) -> Path:
    """The archive with what the checks have found: forms, description, familiarity."""
    if "int8" not in description.forms:
        for name in archive.FILES["int8"]:
            (stage / name).unlink()
        packed = _pack(stage, packed.parent, description)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(archive.DESCRIPTION, description.to_json())
        if description.held_out:
            file.write(unpacked / archive.FAMILIARITY, archive.FAMILIARITY)
    return packed


def _version(target: Path, description: Description) -> archive.Version:
    files = {
        name: archive.describe_file(target.with_suffix(suffix))
        for name, suffix in ((ARCHIVE, ".mar"), (PREDICTIONS, ".npz"))
    }
    return archive.Version(time=now(), files=files, description=description)


def _check(
    description: Description,
    unpacked: Path,
    dataset: Dataset,
    held_out: Images,
    reference: Logits,
    job_logits: Logits,
    settings: Export,
) -> tuple[Description, Logits]:
    """Runs all that is in the archive, from its unpacked files.

    Returns:
        The description with what was found, and the logits that a CPU gives to the test images.

    Raises:
        ExportError: a part of it deviates by more than rounding explains.
    """
    with asked_all(unpacked, description.forms) as networks:
        description, answers = _check_forms(description, networks, held_out, reference, settings)
        description, logits = _score(description, networks, dataset, job_logits)
        form = description.forms[0]
        if len(dataset.validation):
            given = (dataset.train, held_out, answers[form])
            description = _fit_trust(description, unpacked, networks[form], *given)
        tempered = logits / description.temperature
        checks = {
            **description.checks,
            "handler": _check_handler(description, unpacked, dataset.test, tempered),
            # The last one, as its process takes longest to start.
            "program": _check_program(networks["program"], held_out, reference),
        }
    return description.model_copy(update={"checks": checks}), logits


def _check_forms(
    description: Description,
    networks: Mapping[Form, Predict],
    held_out: Images,
    reference: Logits,
    settings: Export,
) -> tuple[Description, Mapping[Form, Outputs]]:
    """Runs a CPU's forms on held-out images; int8 is kept if it is accurate enough, floats have to
    be.

    Returns:
        The description with the forms that stay, and what a CPU's forms gave.

    Raises:
        ExportError: floats deviate by more than rounding explains.
    """
    labels = held_out.labels.cpu().numpy()
    on_cpu: list[Form] = [form for form in description.forms if form != "program"]
    answers = {form: predict(form, networks[form], held_out) for form in on_cpu}
    checks = {"reference": compare(reference, reference, labels)}
    for form, given in answers.items():
        checks[form] = compare(given.logits, reference, labels)
    description = description.model_copy(update={"checks": checks})
    if "int8" in description.forms:
        log(f"export: {int8_outcome(checks, settings.max_accuracy_drop)}")
        if not int8_serves(checks, settings.max_accuracy_drop):
            description = _without_int8(description)
    for form in answers:
        if form in description.forms:
            _require(checks[form], form, form)
    return description, answers


def _without_int8(description: Description) -> Description:
    forms = tuple(form for form in description.forms if form != "int8")
    return description.model_copy(update={"forms": forms})


def _score(
    description: Description, networks: Mapping[Form, Predict], dataset: Dataset, job_logits: Logits
) -> tuple[Description, Logits]:
    """Scores the form that a CPU uses on the test set: its answers are the ones that are served, so
    the promotion gate goes by them, and not by the job's.

    Returns:
        The description with scores, and logits float32 [N, C] of the test images. If int8 was just
        within its tolerance on the held-out images and is beyond it on these, it is left out.
    """
    form = description.forms[0]
    logits = predict(f"{form}, test", networks[form], dataset.test).logits
    labels = dataset.test.labels.cpu()
    check = compare(logits, job_logits, labels.numpy())
    if form == "int8" and not check.within(TOLERANCES[form]):
        log("export: but too far off on the test set: a CPU runs it in floats")
        return _score(_without_int8(description), networks, dataset, job_logits)
    # A job in bf16 was off by 40 % of the logits' spread on a network that is hardly trained; the
    # archive's float32 is not, and was compared with these weights in float32 before.
    right, right_before = (x.argmax(1) == labels.numpy() for x in (logits, job_logits))
    if paired_difference(right, right_before).p_value < DIFFERENT:
        _require(check, form, f"{form} form, on the test set,")
    before, after = torch.from_numpy(logits), torch.from_numpy(logits / description.temperature)
    found = {
        "test": evaluation.scores(after, labels),
        "test_check": check,
        "calibration": Calibration(
            before=evaluation.calibration_interval(before, labels),
            after=evaluation.calibration_interval(after, labels),
        ),
    }
    return description.model_copy(update=found), logits


def _fit_trust(
    description: Description,
    unpacked: Path,
    network: Predict,
    train: Images,
    held_out: Images,
    answers: Outputs,
) -> Description:
    """Fits familiarity and sets of classes to the first form's answers to held-out images and to
    some of the training images, and writes them into the unpacked archive."""
    if len(held_out) < trust.MIN_HELD_OUT:
        few = f"{len(held_out)} held-out pictures are too few"
        log(
            f"export: no familiarity and no sets of classes: {few}, {trust.MIN_HELD_OUT} are enough"
        )
        return description
    order = torch.randperm(len(train), generator=generator("familiarity"))[: trust.KNOWN]
    known = predict("training images", network, train.take(order)).features
    logits = answers.logits / description.temperature
    fitted = trust.fit(known, answers.features, logits, held_out.labels.cpu().numpy())
    fitted.save(unpacked / archive.FAMILIARITY)
    return description.model_copy(update={"held_out": len(held_out)})


def _check_handler(
    description: Description, unpacked: Path, images: Images, logits: Logits
) -> Check:
    """Runs the archive's handler on some images, whose logits in the form that it runs are known.

    Raises:
        ExportError: it answers something else.
    """
    few = min(len(images), GOLDEN_IMAGES)
    archive.write_description(unpacked, description)
    with asked(unpacked, "handler") as network:
        handled = predict("handler", network, images.take(torch.arange(few))).logits
    expected = logarithms(softmax(logits[:few]))  # a network may be surer than probabilities can be
    check = compare(handled, expected, images.labels[:few].cpu().numpy())
    _require(check, "float", "handler")
    return check


def _check_program(network: Predict, held_out: Images, reference: Logits) -> Check:
    """
    Raises:
        ExportError: it answers something else than the trained network.
    """
    found = predict("program", network, held_out).logits
    check = compare(found, reference, held_out.labels.cpu().numpy())
    _require(check, "program", "program")
    return check


def _require(check: Check, form: Form, what: str) -> None:
    if not check.within(TOLERANCES[form]):
        raise ExportError(f"the archive's {what} does not give the job's predictions: {check}")


def int8_serves(checks: Mapping[str, Check], allowed_drop: float) -> bool:
    """Whether int8 loses at most `allowed_drop` points of accuracy and is within its tolerance."""
    return _drop(checks) <= allowed_drop and checks["int8"].within(TOLERANCES["int8"])


def _drop(checks: Mapping[str, Check]) -> float:
    """In points; rounded, or three of a thousand pictures would be more than 0.3."""
    return round((checks["reference"].accuracy - checks["int8"].accuracy) * 100, 9)


def int8_outcome(checks: Mapping[str, Check], allowed_drop: float) -> str:
    """Whether a CPU computes in int8 or floats, and why, in one sentence for the log."""
    reference, rounded = checks["reference"], checks["int8"]
    got = (
        f"{rounded.accuracy:.1%} of {rounded.images} held-out pictures right, "
        f"{reference.accuracy:.1%} without"
    )
    if int8_serves(checks, allowed_drop):
        return f"a CPU runs it in 8-bit integers, which is faster: {got}"
    drop = _drop(checks)
    why = "too far off in its probabilities"
    if drop > allowed_drop:
        why = f"{drop:.1f} points are lost, {allowed_drop:.1f} may be"
    return f"a CPU runs it in floats; not in 8-bit integers, which is faster: {got} ({why})"


def _plain(name: object) -> str:
    """As Markdown shows it, whatever it has of Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(name).split()))


def _model_card(description: Description, input_size: int) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["plain"] = _plain
    card = templates.get_template("model_card.md")
    return card.render(model=description, input_size=input_size, duration=duration) + "\n"
