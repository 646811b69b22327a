"""Promotion through a quality gate, and rollback: all that changes what production serves."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from jobs import config, interruption
from jobs.config import Config
from jobs.delivery import publishing
from jobs.delivery.registry import Channel, Registry
from jobs.delivery.storage import Storage
from jobs.errors import ConfigurationError, NotPromoted, UnavailableError
from jobs.report import comparison
from jobs.runs import RunFolder, read_arrays
from serving.archive import (
    ARCHIVE,
    CHANNELS,
    PREDICTIONS,
    Description,
    ModelError,
    Version,
    in_one_line,
    open_model,
)
from serving.files import digest_of, temporary
from serving.progress import log
from serving.s3 import Conflict

LATENCY_CALLS = 20  # after as many that do not count
SHARED = 0.5  # of the test pictures of what serves, which a model has to be compared on at least


@dataclass(frozen=True)
class Candidate:
    """An exported run's winner, as the gate sees it."""

    files: Mapping[str, Path]
    """By their names in the registry."""
    record: Version
    """What export says of them: the registry's future version.json."""
    leaked: Sequence[int]
    """Test images, by their positions, that are trained on or chosen by as well."""

    @property
    def version(self) -> str:
        return self.description.version

    @property
    def description(self) -> Description:
        return self.record.description

    @cached_property
    def answers(self) -> dict[str, NDArray[Any]]:
        """The arrays of the archive's test_predictions.npz, without the leaked test images."""
        found = read_arrays(self.files[PREDICTIONS])
        return {name: np.delete(rows, self.leaked, axis=0) for name, rows in found.items()}


def read_candidate(folder: RunFolder, name: str) -> Candidate:
    """
    Raises:
        UnavailableError: the run is unfinished, or has not been exported under this name.
        ConfigurationError: its id cannot be a version.
    """
    archive = folder.path / folder.archive(name)
    files = {ARCHIVE: archive, PREDICTIONS: archive.with_suffix(".npz")}
    beside = archive.with_suffix(".json")
    listed, again = folder.manifest().files, f"`export {folder.path} --set export.name={name}`"
    for path in (*files.values(), beside):
        if path.relative_to(folder.path).as_posix() not in listed:
            raise UnavailableError(f"{folder.path}: has no {path.name}; {again} makes it")
    if folder.run_id == CHANNELS:
        raise ConfigurationError(f"{folder.run_id}: cannot be a version's name")
    try:
        record = Version.model_validate_json(beside.read_bytes())
    except ValidationError as error:
        raise UnavailableError(f"{beside}: {in_one_line(error)}; {again} rewrites it") from None
    return Candidate(files, record, folder.facts().leaked)


def promote(folder: RunFolder, settings: Config) -> str:
    """Publishes a run and, if the gate lets it through, makes the channel point to its model.

    Returns:
        The version's address.

    Raises:
        NotPromoted: the gate is closed, or another promotion came first.
        UnavailableError: there is no archive, or storage failed; call again to resume.
        ConfigurationError: another model has this version's name.
    """
    gate = settings.promotion
    storage = Storage(settings.storage)
    registry = Registry(storage, settings.export.name)
    candidate = read_candidate(folder, registry.name)
    publishing.publish(storage, folder)
    version, champion = candidate.version, registry.channel(gate.channel)
    if champion and champion.version == version:
        if registry.version(version).files != candidate.record.files:
            raise registry.taken(version)
        _sign(registry, candidate, gate)
        log(f"{gate.channel} serves {version} already")
        return registry.uri(version)
    if reasons := objections(candidate, champion, registry, gate):
        raise NotPromoted(f"{version} is published and not promoted: {'; '.join(reasons)}")
    with folder.open(settings):
        registry.add(candidate.files, candidate.record)
    _sign(registry, candidate, gate)
    _swap(registry, gate.channel, version, champion)
    before = f", {champion.version} before" if champion else ""
    log(f"{gate.channel} serves {version} now{before}")
    return registry.uri(version)


def rollback(settings: Config, version: str | None = None) -> str:
    """Makes the channel point to an earlier version, by default the one that served before.

    Returns:
        That version's address.

    Raises:
        UnavailableError: there is no such version, or nothing to go back to.
        NotPromoted: the channel was changed concurrently.
    """
    channel = settings.promotion.channel
    registry = Registry(Storage(settings.storage), settings.export.name)
    current = _pointed_to(registry, channel)
    target = version or current.previous()
    if target is None:
        raise UnavailableError(
            f"{channel}: nothing served before {current.version}; name a version"
        )
    if target != current.version:
        # Whoever names a version that was just left takes that rollback back: `current` is good.
        latest = takewhile(lambda earlier: earlier.rolled_back, current.pointer.history)
        undoes_rollback = version in {earlier.version for earlier in latest}
        _swap(registry, channel, target, current, rolled_back=not undoes_rollback)
    log(f"{channel} serves {target} again, {current.version} before")
    return registry.uri(target)


def served_uri(settings: Config) -> str:
    """The address of the version that the channel points to.

    Raises:
        UnavailableError: there is none.
    """
    registry = Registry(Storage(settings.storage), settings.export.name)
    return registry.uri(_pointed_to(registry, settings.promotion.channel).version)


def fetch(settings: Config, version: str | None, out: Path) -> Path:
    """Downloads an archive, by default of the version that the channel points to.

    Raises:
        UnavailableError: there is none, or it is damaged.
    """
    channel = settings.promotion.channel
    registry = Registry(Storage(settings.storage), settings.export.name)
    target = out / f"{registry.name}.mar"
    registry.fetch(version or _pointed_to(registry, channel).version, target)
    return target


def objections(
    candidate: Candidate, champion: Channel | None, registry: Registry, gate: config.Promotion
) -> list[str]:
    """Why a model may not serve; nothing when it may."""
    found = [_unchecked(candidate), _floor(candidate, gate)]
    if champion and gate.tolerance is not None:
        found.append(_worse(candidate, champion.version, registry, gate.tolerance))
    if gate.max_latency_ms is not None and not any(found):
        found.append(_slow(candidate, gate.max_latency_ms))
    return [reason for reason in found if reason]


def _unchecked(candidate: Candidate) -> str | None:
    """Export notes the files that it has checked."""
    for name, path in candidate.files.items():
        if candidate.record.files[name].sha256 != digest_of(path):
            return f"{path.name} is not the file that export has checked"
    return None


def _floor(candidate: Candidate, gate: config.Promotion) -> str | None:
    right = comparison.right_answers(candidate.answers)
    percent = round(int(right.sum()) / max(len(right), 1) * 100, 9)  # 57 of 100 would be < 57
    if percent < gate.min_accuracy:
        of = "the test images" + " that are not in training" * bool(candidate.leaked)
        return f"{percent:.2f} % of {of} are right, {gate.min_accuracy:g} % are needed"
    return None


def _worse(candidate: Candidate, served: str, registry: Registry, allowed: float) -> str | None:
    """Compares what the candidate and the version that serves answered to the test pictures that
    both were asked."""
    from jobs.statistics import paired_difference

    with temporary() as folder:
        file = folder / PREDICTIONS
        registry.fetch(served, file, PREDICTIONS)
        classes = registry.version(served).description.data.classes
        theirs = _right_by_picture(read_arrays(file), classes)
    ours = _right_by_picture(candidate.answers, candidate.description.data.classes)
    shared = [picture for picture in ours if picture in theirs]
    if not shared or len(shared) < SHARED * len(theirs):
        return (
            f"{served}, which serves, was tested on other images: {len(shared)} of its "
            f"{len(theirs)} are here{' and not in training' * bool(candidate.leaked)}; "
            "promotion.tolerance=null leaves the comparison out"
        )
    if new := [right for picture, right in ours.items() if picture not in theirs]:
        log(
            f"{candidate.version}: {sum(new) / len(new):.2%} of {len(new)} new test images are "
            f"right; what follows is about the {len(shared)} that {served} was tested on, too"
        )
    right = (np.array([answers[picture] for picture in shared]) for answers in (ours, theirs))
    difference = paired_difference(*right)
    log(comparison.sentence(candidate.version, served, difference, difference.p_value))
    points = round(-difference.difference * 100, 9)
    if points > allowed:
        return f"{points:.2f} points worse than {served}, which serves; {allowed:g} are allowed"
    return None


def _right_by_picture(
    answers: Mapping[str, NDArray[Any]], classes: Sequence[str]
) -> dict[tuple[bytes, str], bool]:
    """Whether each test picture was right, by its SHA-256 and its class: a picture that has been
    given another class is another one. Those that the model has learned are left out; archives of
    earlier versions do not say which. Empty for an archive without digests."""
    right = comparison.right_answers(answers)
    learned = answers.get("leaked", np.zeros(len(right), bool))
    pictures = zip(answers.get("digests", ()), answers["labels"], right, learned, strict=False)
    return {
        (digest.tobytes(), classes[c]): bool(r) for digest, c, r, known in pictures if not known
    }


def _slow(candidate: Candidate, allowed_ms: float) -> str | None:
    from serving.predictor import Predictor

    archive = candidate.files[ARCHIVE]
    try:
        predictor = Predictor.open(archive, threads=1)  # as one of the service's workers
    except ModuleNotFoundError as error:
        hint = "pip install 'inception-transfer[export]'"
        raise ConfigurationError(f"promotion.max_latency_ms: {error}; {hint}") from None
    picture = open_model(archive).golden[0].picture
    seconds = []
    for _ in range(2 * LATENCY_CALLS):
        interruption.check()
        start = time.perf_counter()
        predictor(picture)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[LATENCY_CALLS:]) * 1000
    log(f"{candidate.version}: {median:.1f} ms for a picture on one core of this machine")
    if median > allowed_ms:
        return f"{median:.1f} ms for a picture on one core, {allowed_ms:g} are allowed"
    return None


def _pointed_to(registry: Registry, channel: str) -> Channel:
    current = registry.channel(channel)
    if current is None:
        others = ", ".join(registry.models())
        hint = f"; models that are there: {others} (export.name says which)" if others else ""
        raise UnavailableError(f"{registry.name}: {channel} has never pointed to a version{hint}")
    return current


def _sign(registry: Registry, candidate: Candidate, gate: config.Promotion) -> None:
    if gate.signing_key is None:
        return
    try:
        from serving import signing

        signature = signing.sign(candidate.files[ARCHIVE], Path(gate.signing_key))
    except (ModelError, ModuleNotFoundError) as error:
        hint = "pip install 'inception-transfer[signing]'"
        advice = f"; {hint}" * isinstance(error, ModuleNotFoundError)
        raise ConfigurationError(f"promotion.signing_key: {error}{advice}") from None
    registry.sign(candidate.version, signature)


def _swap(
    registry: Registry,
    channel: str,
    version: str,
    current: Channel | None,
    *,
    rolled_back: bool = False,
) -> None:
    try:
        registry.point(channel, version, current, rolled_back=rolled_back)
    except Conflict:
        # The answer to our own write may have been lost, and the write sent again.
        winner = registry.channel(channel)
        if winner is None or winner.version != version:
            name = winner.version if winner else "nothing"
            raise NotPromoted(
                f"{version} is not promoted: another promotion made {channel} point to {name} "
                "meanwhile; `promote` it again to be compared with that"
            ) from None
