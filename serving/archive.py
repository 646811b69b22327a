"""The archive format: its files, its description, and where its versions are stored in S3.

An archive is a TorchServe `.mar`, a zip file of

    model.json                what it is (:class:`Description`)
    network.pt2               the network as a `torch.export` program, which a GPU runs
    float.xml float.bin       the same for OpenVINO, which a CPU runs
    int8.xml int8.bin         … in 8-bit integers, where they are accurate enough
    golden/00.png …           pictures, and the probabilities that the trained network gave them in
    golden/probabilities.json float32: what every copy of the archive has to answer
    familiarity.npz           what serving/trust.py needs, where enough pictures were held out
    handler.py serving/…      the code that runs it

In S3, below a prefix,

    models/<name>/<version>/{model.mar, test_predictions.npz, version.json}    the last one last
                            model.mar.sig                                      if it is signed
    models/<name>/channels/<channel>.json

`version.json` is a :class:`Version`, a channel's file a :class:`Pointer`. Nothing here imports
torch, NumPy or Pillow.
"""

import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.files import digest_of, naming, temporary

# zipfile's errors
UNREADABLE = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
FORMAT: Literal[2] = 2
DESCRIPTION = "model.json"
GOLDEN = "golden"  # a folder
PROBABILITIES = f"{GOLDEN}/probabilities.json"
FAMILIARITY = "familiarity.npz"

MODELS, CHANNELS = "models", "channels"
ARCHIVE, PREDICTIONS, VERSION = "model.mar", "test_predictions.npz", "version.json"
SIGNATURE = ".sig"  # after an archive's name, wherever it lies

Form = Literal["program", "float", "int8"]
FILES: Mapping[Form, tuple[str, ...]] = {
    "program": ("network.pt2",),
    "float": ("float.xml", "float.bin"),
    "int8": ("int8.xml", "int8.bin"),
}
"""A form's files; the first is the one that is loaded."""


@dataclass(frozen=True)
class Tolerance:
    """How far a form's answers may be from the trained network's; see :class:`Check`. Measured:
    docs/performance.md."""

    agreement: float
    logit_error: float
    probability_error: float


TOLERANCES: Mapping[Form, Tolerance] = {
    "program": Tolerance(agreement=0.99, logit_error=0.001, probability_error=0.001),
    "float": Tolerance(agreement=0.9, logit_error=0.1, probability_error=0.05),
    "int8": Tolerance(agreement=0.9, logit_error=0.2, probability_error=0.15),
}


class ModelError(Exception):
    """The archive is unavailable or invalid; the message is one line that says which."""


class Record(BaseModel):
    """A typed JSON object; fields that later versions add are ignored."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class Interval(Record):
    value: float
    low: float
    high: float


class Scores(Record):
    """How good one set of predictions is; `jobs.train.evaluation.scores` makes it."""

    images: int
    loss: float
    """Mean cross-entropy, in nats."""
    accuracy: float
    """A share, as all accuracies here."""
    accuracy_low: float
    accuracy_high: float
    """Its 95 % interval (Wilson)."""
    balanced: Interval | None = None
    """The mean of all classes' accuracies, where some have far more test images than others."""
    per_class: tuple[float | None, ...]
    """Accuracy of each class; None for one without images."""
    calibration_error: float
    """Expected, over 15 equal bins (Guo et al. 2017)."""


class Counts(Record):
    """Numbers of images."""

    train: int
    validation: int
    test: int


class Data(Record):
    """What a model was trained and tested on."""

    source: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    """Height and width in which pictures are stored, and so enter the network."""
    images: Counts
    test_digest: str
    """SHA-256 over the test images and their labels."""


class Check(Record):
    """How far a form's answers are from those of the trained network, on the same pictures."""

    images: int
    accuracy: float
    agreement: float
    """Share of equal labels."""
    logit_error: float
    """Root mean square of the differences of all logits, as a share of the trained network's own
    spread over these pictures: 0 for the same answers, 1 or more for a constant one."""
    probability_error: float
    """99th percentile over the pictures of the largest difference of any probability; see
    :func:`serving.messages.probability_errors`."""
    largest_probability_error: float

    def within(self, allowed: Tolerance) -> bool:
        return (
            self.agreement >= allowed.agreement
            and self.logit_error <= allowed.logit_error  # not so for NaN
            and self.probability_error <= allowed.probability_error
        )


class Calibration(Record):
    """Expected calibration errors on the test set with 95 % intervals of a bootstrap over its
    pictures, freed of their upward bias: `value` itself may lie above them."""

    before: Interval
    """Of the network's own probabilities."""
    after: Interval
    """… divided by the temperature, as they are served."""


class Compared(Record):
    """A variant that the job trained on the same data."""

    variant: str
    accuracy: Interval | None
    """On the test set, by the trained network; the mean over seeds. None where its loss became
    non-finite."""
    seconds: float | None
    """Of training."""


class Description(Record):
    """What an archive says of itself."""

    format: Literal[2] = FORMAT
    name: str
    version: str
    variant: str
    seed: int
    """Of several, the one that was best on the split that selects."""
    weights: str
    """What training started from."""
    data: Data
    selected_on: str
    """The split that chose the variant, its seed and its epoch."""
    compared: tuple[Compared, ...] = ()
    """All variants it was chosen among, itself too."""
    sentences: tuple[str, ...] = ()
    """What the comparison of these says."""
    samples: int = 0
    """How many golden pictures the service shows to anybody, to try it with."""
    forms: tuple[Form, ...]
    """Those in the archive; a CPU runs the first, a GPU the program."""
    temperature: float = 1.0
    """What logits are divided by before the softmax (Guo et al. 2017)."""
    map_size: tuple[int, int] | None = None
    """Height and width of class maps; None of earlier archives, which give none."""
    held_out: int = 0
    """Pictures that familiarity and sets of classes are calibrated on; 0 where there are none."""
    calibration: Calibration | None = None
    checks: Mapping[str, Check] = Field(default_factory=dict)
    """Of every form that was made, run from the unpacked archive, on held-out pictures. `handler`
    are the answers of its handler to some test pictures, against those of the first form."""
    test: Scores | None = None
    """Of the first form, run from the unpacked archive, on the test set."""
    test_check: Check | None = None
    """Those answers against the job's own."""


class File(Record):
    size: int
    """In bytes."""
    sha256: str


class Version(Record):
    """version.json: a version is whole once this is there, and never changes."""

    time: str
    """ISO 8601, in UTC."""
    files: Mapping[str, File]
    description: Description


class Earlier(Record):
    """What a channel pointed to before."""

    version: str
    sha256: str
    time: str
    rolled_back: bool = False


class Pointer(Record):
    """channels/<channel>.json: which version serves, and which did before, the latest first."""

    name: str
    version: str
    sha256: str
    """Of its archive."""
    time: str
    history: tuple[Earlier, ...] = ()


def version_key(name: str, version: str, file: str = VERSION) -> str:
    return f"{MODELS}/{name}/{version}/{file}"


def channel_key(name: str, channel: str) -> str:
    return f"{MODELS}/{name}/{CHANNELS}/{channel}.json"


def is_channel(key: str) -> bool:
    return PurePosixPath(key).parent.name == CHANNELS


def beside_channel(key: str, version: str) -> str:
    """The folder of a version whose channel's key is given."""
    return f"{PurePosixPath(key).parents[1]}/{version}"


@dataclass(frozen=True)
class Golden:
    """A picture and the answer that the trained network gave to it."""

    picture: bytes
    probabilities: Sequence[float]
    """One for each class."""


@dataclass(frozen=True)
class Model:
    """An archive whose description and golden pictures have been read."""

    path: Path
    description: Description
    golden: Sequence[Golden]

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def version(self) -> str:
        return self.description.version

    @property
    def classes(self) -> Sequence[str]:
        return self.description.data.classes


def open_model(path: Path) -> Model:
    """Reads and checks an archive, or the folder that one was unpacked to.

    Raises:
        ModelError: a damaged file, or not an archive of this project.
    """
    if path.is_dir():
        return _read_model(path, lambda name: (path / name).read_bytes())
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ModelError(f"{path}: damaged at {damaged}")
            _refuse_outside(path, archive.namelist())
            return _read_model(path, archive.read)
    except UNREADABLE as error:
        raise ModelError(f"{path}: not a model archive: {error}") from None


def _read_model(path: Path, read: Any) -> Model:
    try:
        description = parse_description(path, read(DESCRIPTION))
        probabilities = json.loads(read(PROBABILITIES))
        golden = [Golden(read(golden_file(i)), row) for i, row in enumerate(probabilities)]
        return Model(path.resolve(), description, golden)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a model archive: {error}") from None


def parse_description(path: Path | str, content: bytes) -> Description:
    """The description in the content of a model.json.

    Args:
        path: of its archive, for messages.

    Raises:
        ModelError: it is not one, or one of another format.
    """
    try:
        found = json.loads(content)
        if found.get("format", 1) != FORMAT:
            raise ModelError(
                f"{path}: an archive of format {found.get('format', 1)}, and this reads format "
                f"{FORMAT}; `python -m jobs export RUN` makes a new one"
            )
        return Description.model_validate(found)
    except (AttributeError, ValueError) as error:
        raise ModelError(f"{path}: {DESCRIPTION}: {in_one_line(error)}") from None


def in_one_line(error: Exception) -> str:
    """What is wrong with a typed JSON object: the first of it."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return " ".join(str(error).split())


def write_description(folder: Path, description: Description) -> None:
    (folder / DESCRIPTION).write_bytes(description.to_json())


def describe_file(path: Path) -> File:
    return File(size=path.stat().st_size, sha256=digest_of(path))


def golden_file(index: int) -> str:
    return f"{GOLDEN}/{index:02}.png"


@contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The archive's files in a temporary folder.

    Raises:
        ModelError: it is not an archive.
    """
    with temporary() as folder:
        unpack(archive, folder)
        yield folder


def unpack(archive: Path, folder: Path) -> None:
    """Extracts all files of an archive into a folder.

    Raises:
        ModelError: it is not an archive, or an entry would be extracted outside of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            _refuse_outside(archive, file.namelist())
            with naming(folder):
                file.extractall(folder)
    except OSError as error:
        raise ModelError(f"{archive}: not unpacked: {error}") from None
    except UNREADABLE as error:
        raise ModelError(f"{archive}: not a model archive: {error}") from None


def check_digest(path: Path, sha256: str | None) -> None:
    """Raises:
    ModelError: the file's SHA-256 is another one.
    """
    if sha256 is None:
        return
    if (digest := digest_of(path)) != sha256:
        raise ModelError(f"{path}: its SHA-256 is {digest}, not {sha256}")


def _refuse_outside(path: Path, names: Sequence[str]) -> None:
    """TorchServe and this package unpack archives; no entry may land outside of their folder."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise ModelError(f"{path}: {name} would be unpacked outside of its folder")
