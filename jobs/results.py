"""Typed records of a run's JSON files, and how they are read; imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from jobs.errors import UnavailableError
from serving.archive import Data, File, Record, Scores, in_one_line


class Facts(Data):
    """data.json: what a run is trained and tested on."""

    digest: str
    """SHA-256 over all pictures of the source, by class and split: it changes exactly when they do,
    whatever their names are."""
    skipped: tuple[str, ...]
    """Pictures that were left out because they are damaged, and why, one a line."""
    doubles: dict[str, int] | None = None
    """How many pictures are the same as another one, by kinds as in findings.csv; None before
    `run` has looked for them."""
    leaked: tuple[int, ...] = ()
    """Test images, by their positions, that are trained on or chosen by as well."""


class Trained(Record):
    """A network that was trained and is not tested: the stand-in for pretrained weights."""

    status: Literal["done"] = "done"
    seconds: float


class Done(Trained):
    """One variant with one seed, trained and tested."""

    variant: str
    seed: int
    parameters: int
    trainable_parameters: int
    epochs: int
    best_epoch: int
    """The epoch whose weights were kept, counted from 0."""
    selected_on: str
    selection_accuracy: float
    """Of those weights, on the split that chose them."""
    images_per_second: float
    test: Scores
    peak_memory_bytes: int


class Diverged(Record):
    """A variant whose loss became non-finite."""

    status: Literal["diverged"] = "diverged"
    variant: str
    seed: int
    reason: str


class Summary(Done):
    """A variant over its seeds: the first seed's result, and the aggregates of all of them."""

    accuracy_by_seed: tuple[float, ...]
    accuracy_mean: float
    accuracy_low: float
    accuracy_high: float
    accuracy_spread: float | None
    """Standard deviation over seeds; None with one seed."""
    selection_by_seed: tuple[float, ...]
    seconds_to_accuracy: dict[str, float]
    """By thresholds as they are printed, as far as they were reached."""


class Difference(Record):
    """Of two classifiers' accuracies on the same images."""

    difference: float
    low: float
    high: float
    """95 % interval."""
    p_value: float
    only_a: int | None = None
    only_b: int | None = None
    """Images that one alone gets right; None where seeds were compared."""


class Pair(Difference):
    a: str
    b: str
    p_value_holm: float
    """Corrected for the number of pairs."""
    sentence: str


class Comparison(Record):
    """comparison.json."""

    run_id: str
    time: str
    data: Facts
    weights: str
    selected_on: str
    winner: str | None
    winner_seed: int | None
    """The winner's best seed on the split that selects, whose weights are exported."""
    sentences: tuple[str, ...]
    seeds: int
    thresholds: tuple[str, ...]
    variants: dict[str, Annotated[Summary | Diverged, Field(discriminator="status")]]
    pairs: tuple[Pair, ...]

    @property
    def done(self) -> dict[str, Summary]:
        """The variants that were tested."""
        return {name: v for name, v in self.variants.items() if isinstance(v, Summary)}


class Start(Record, extra="allow"):
    """One entry of environment.json; the rest is what `environment.describe` says, unchecked."""

    time: str


class Manifest(Record):
    """manifest.json: a run is finished once this is there."""

    run_id: str
    started: str
    """When work on the run began, ISO 8601 in UTC."""
    time: str
    files: Mapping[str, File]


Kind = TypeVar("Kind")
RESULT: TypeAdapter[Done | Diverged] = TypeAdapter(
    Annotated[Done | Diverged, Field(discriminator="status")]
)
"""result.json of a variant."""
FACTS, COMPARISON, MANIFEST = TypeAdapter(Facts), TypeAdapter(Comparison), TypeAdapter(Manifest)
STARTS = TypeAdapter(Annotated[list[Start], Field(min_length=1)])
"""environment.json: every start of the run, the first one first."""
ARCHITECTURE = TypeAdapter(dict[str, Any])
"""architecture.json, as `models.describe` makes it."""


def read(path: Path, kind: TypeAdapter[Kind]) -> Kind:
    """One of these records from its file.

    Raises:
        UnavailableError: the file is not there, or not what it should be.
    """
    try:
        return parse(path, path.read_bytes(), kind)
    except FileNotFoundError:
        raise UnavailableError(f"{path}: no such file") from None


def parse(where: object, content: bytes, kind: TypeAdapter[Kind]) -> Kind:
    """One of these records from the content of its file or object.

    Raises:
        UnavailableError: it is not what it should be.
    """
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        raise UnavailableError(f"{where}: {in_one_line(error)}") from None
