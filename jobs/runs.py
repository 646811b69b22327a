"""The run folder: the files of a run, written so that a crash at any time loses nothing.

    runs/<run_id>/
      config.yaml environment.json data.json metrics.jsonl
      weights/stand-in/…                            where weights are trained on the spot
      variants/<name>/{last.ckpt, best.safetensors, validation_predictions.npz,
                       test_predictions.npz, kernels.npz, examples.npz, result.json}
                                                    further seeds in variants/<name>/seed-<n>/
      comparison.json report/… manifest.json        the manifest last

`last.ckpt` is deleted once its variant is trained; that of one that diverged stays. A run without a
manifest is unfinished.
"""

import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from jobs import config, locks, results
from jobs.config import Config
from jobs.errors import ConfigurationError, UnavailableError, first_line
from jobs.results import Comparison, Diverged, Done, Facts, Manifest, Trained
from serving import strict_yaml
from serving.archive import describe_file
from serving.files import PARTIAL, naming, replacing, write

ENVIRONMENT, MANIFEST = "environment.json", "manifest.json"
KEPT = "kept"  # in the best weights' file; more entries would have no fixed order
DELIVERED = ".delivered"  # left by `deliver`, whatever the gate said
CHECKPOINT = "last.ckpt"
WEIGHTS = "weights.sha256"  # of the file that they came from
TENSORBOARD = "tensorboard"  # written until after the manifest
DAMAGED = (OSError, ValueError, EOFError, BadZipFile, zlib.error, RuntimeError)
UNLISTED = {MANIFEST, ".lock", ".locks", DELIVERED, CHECKPOINT}
Row = dict[str, Any]  # of metrics.jsonl
COLUMNS = (
    *("time", "run_id", "variant", "seed", "epoch", "split", "loss", "aux_loss", "accuracy"),
    *("images_per_second", "learning_rate", "seconds"),
)  # of metrics.jsonl; null where a row has nothing to say


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a compressed .npz file atomically; arrays of any shape and numeric dtype."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file by name, as written by :func:`write_arrays`; never unpickles.

    Raises:
        OSError: the file is not there.
        UnavailableError: it is damaged, or contains pickled objects.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise UnavailableError(f"{path}: damaged: {first_line(error)}") from None


def check_zip(path: Path) -> None:
    """Compares the contents of a zip file with their checksums, which torch does not look at.

    Raises:
        BadZipFile: they have changed, or it is none.
    """
    with ZipFile(path) as file:
        if (changed := file.testzip()) is not None:
            raise BadZipFile(f"{changed} has changed")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class VariantFolder:
    """Where one variant of one seed keeps its progress and its result."""

    path: Path
    run: "RunFolder"
    untrained: Mapping[str, Any] = field(default_factory=dict)
    """Weights of the network that its training leaves out; `best.safetensors` has them too."""

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").is_file()

    def result(self) -> Done | Diverged | None:
        """The variant's outcome; None while it is unfinished.

        Raises:
            UnavailableError: result.json is invalid.
        """
        return results.read(self.path / "result.json", results.RESULT) if self.finished else None

    def tidy(self) -> None:
        """Removes what a killed process was writing; called by the one process that trains it."""
        for half in self.path.glob(PARTIAL):
            half.unlink()

    def save_result(self, result: Trained | Diverged) -> None:
        """Marks the variant as finished, and deletes its checkpoint if it is of no more use."""
        write(self.path / "result.json", result.to_json())
        if result.status == "done":
            self.checkpoint.unlink(missing_ok=True)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        import torch

        with replacing(self.checkpoint) as part, part.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own, in whose context a full disk is hidden
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state saved last, on the CPU; None where there is none.

        Raises:
            UnavailableError: it is damaged.
        """
        import torch

        if not self.checkpoint.is_file():
            return None
        try:
            check_zip(self.checkpoint)
            state: dict[str, Any] = torch.load(
                self.checkpoint, map_location="cpu", weights_only=True
            )
        except Exception as error:  # zip's, torch's or pickle's own
            raise UnavailableError(
                f"{self.checkpoint}: damaged: {first_line(error)}; without that file, the variant "
                "is trained from its start"
            ) from None
        return state

    def save_best(self, weights: Mapping[str, Any], epoch: int, accuracy: float) -> None:
        from safetensors.torch import save

        whole = {**self.untrained, **weights}
        tensors = {name: tensor.contiguous() for name, tensor in whole.items()}
        write(self.best, save(tensors, {KEPT: json.dumps([epoch, accuracy])}))

    def kept(self) -> tuple[int, float] | None:
        """Epoch and accuracy of the best weights, which may be newer than the checkpoint; None
        where there are none, or damaged ones, or ones of an earlier version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.best, "numpy") as file:
                epoch, accuracy = json.loads(file.metadata()[KEPT])
        except (OSError, SafetensorError, TypeError, KeyError):
            return None
        return epoch, accuracy

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.run.append_metrics(rows)


class RunFolder:
    """One run's folder. Whoever changes the run as a whole locks it with :meth:`open`; several
    processes may each train a part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = False

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            UnavailableError: this is no run folder, or a damaged one.
            ConfigurationError: this version of the job does not take it.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            raise UnavailableError(f"{self.path}: not a run folder, it has no config.yaml")
        try:
            return config.validate(strict_yaml.parse(file.read_bytes(), file, UnavailableError))
        except ConfigurationError as error:
            raise ConfigurationError(f"{file}: {error}") from None

    @contextmanager
    def open(self, wanted: Config) -> Iterator[None]:
        """Creates the folder or continues in it, and locks it against other processes; within a
        block of the same process it may be entered again.

        Raises:
            ConfigurationError: another process works on it, or it has another configuration.
        """
        if self._held:
            self.begin(wanted)
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            if not locks.try_lock(lock.fileno()):
                raise ConfigurationError(f"{self.path}: another process is working on this run")
            self._held = True
            try:
                self.begin(wanted)
                yield
            finally:
                self._held = False

    @property
    def in_use(self) -> bool:
        """Whether a process works on it."""
        with (self.path / ".lock").open("w") as lock:
            return not locks.try_lock(lock.fileno())

    def alone(self, what: str) -> AbstractContextManager[None]:
        """Lets one process at a time do `what` in the folder; waits for one that does it now."""
        waiting = f"{self.path}: waiting for another process, which is at {what}"
        return locks.held(self.path / ".locks" / what, waiting)

    def begin(self, wanted: Config) -> None:
        """Creates the folder or continues in it.

        Raises:
            ConfigurationError: it has another configuration.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            write(file, wanted.to_yaml())
            return
        found = self.config()
        if differences := _differences(found.experiment, wanted.experiment):
            raise ConfigurationError(
                f"{self.path}: this run has another configuration ({', '.join(differences)}); "
                "take another --run-id"
            )
        if found != wanted and not self.finished:  # what is done later reads it: export, deliver
            write(file, wanted.to_yaml())

    def variant(self, name: str, seed: int | None = None) -> VariantFolder:
        """Of a seed, by default the first one."""
        path = self.path / "variants" / name
        if seed not in (None, self.config().runtime.seeds[0]):
            path /= f"seed-{seed}"
        return VariantFolder(path, self)

    def stand_in(self) -> VariantFolder:
        return VariantFolder(self.path / "weights" / "stand-in", self)

    @property
    def started(self) -> str:
        """When work on the run began, ISO 8601 in UTC."""
        return results.read(self.path / ENVIRONMENT, results.STARTS)[0].time

    def manifest(self) -> Manifest:
        """The manifest of a finished run.

        Raises:
            UnavailableError: there is none, or it is damaged.
        """
        if not self.finished:
            raise UnavailableError(f"{self.path}: not a finished run; `run` resumes it")
        return results.read(self.path / MANIFEST, results.MANIFEST)

    @staticmethod
    def archive(name: str) -> str:
        """Where in a run folder its winner is packed."""
        return f"model/{name}.mar"

    def packed(self, name: str) -> bool:
        """Whether the winner of a finished run is packed under this name.

        Raises:
            UnavailableError: the run is unfinished, or its manifest is damaged.
        """
        return self.archive(name) in self.manifest().files

    def facts(self) -> Facts:
        """What it is trained and tested on, as written to data.json."""
        return results.read(self.path / "data.json", results.FACTS)

    def comparison(self) -> Comparison:
        """Who won, as written to comparison.json.

        Raises:
            UnavailableError: it is missing or invalid.
        """
        return results.read(self.path / "comparison.json", results.COMPARISON)

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Adds the machine's description: one entry for each start of the run, none earlier than
        those before it, even if a clock went back, because S3 files the run by its first day."""
        time = max([now(), *(one["time"] for one in self.environments())])
        self.add_environments([{"time": time, **environment}])

    def add_environments(self, entries: list[dict[str, Any]]) -> None:
        with self.alone("writing"):
            everything = [*self.environments(), *entries]
            everything.sort(key=itemgetter("time"))
            write_json(self.path / ENVIRONMENT, everything)

    def environments(self) -> list[dict[str, Any]]:
        """Of all starts, the first one first."""
        path = self.path / ENVIRONMENT
        found = results.read(path, results.STARTS) if path.is_file() else []
        return [start.model_dump() for start in found]

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a line that a crash cut short is left out.

        Raises:
            UnavailableError: another line is damaged.
        """
        try:
            rows = [json.loads(line) for line in self._whole_lines().splitlines()]
            return [{name: row[name] for name in COLUMNS} for row in rows]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnavailableError(f"{self.path}/metrics.jsonl: damaged: {error}") from None

    def _whole_lines(self) -> bytes:
        path = self.path / "metrics.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        return content[: content.rfind(b"\n") + 1]

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows that are not there yet. An epoch done again after a crash adds nothing, unless
        it came out differently, as on a GPU: then its rows replace the earlier ones. If those of
        its training differ, all later epochs of that training are dropped, too."""
        stamp = {"time": now(), "run_id": self.run_id}
        path = self.path / "metrics.jsonl"
        with self.alone("writing"), naming(path):
            there, given = self.metrics(), {_key(row): row for row in rows}
            redone: dict[tuple[str, int], float] = {}  # the first epoch that came out differently
            for row in there:
                if row["split"] == "train" and not _is_same(row, given.get(_key(row), row)):
                    part = row["variant"], row["seed"]
                    redone[part] = min(row["epoch"], redone.get(part, row["epoch"]))
            kept = [
                row
                for row in there
                if _is_same(row, given.get(_key(row), row))
                and row["epoch"] < redone.get((row["variant"], row["seed"]), math.inf)
            ]
            if len(kept) < len(there):
                write(path, _lines(kept))
            known = {_key(row) for row in kept}
            with path.open("ab") as file:
                file.truncate(len(self._whole_lines()))
                file.write(_lines(stamp | row for row in rows if _key(row) not in known))
                file.flush()
                os.fsync(file.fileno())

    def write_manifest(self) -> None:
        """Lists every file with size and SHA-256, and so declares the run finished; what killed
        processes were writing is removed before."""
        with self.alone("writing"):
            for half in self.path.rglob(PARTIAL):
                half.unlink()
        files = {file.relative_to(self.path): file for file in sorted(self.path.rglob("*"))}
        entries = {
            name.as_posix(): describe_file(file)
            for name, file in files.items()
            if not UNLISTED & {*name.parts} and name.parts[0] != TENSORBOARD and file.is_file()
        }
        manifest = Manifest(run_id=self.run_id, started=self.started, time=now(), files=entries)
        write(self.path / MANIFEST, manifest.to_json())


class Shown:
    """The rows that a viewer has got. Their number would not do: an epoch that is done again and
    comes out differently replaces earlier rows."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = {_key(row): row for row in rows}

    def new(self, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
        """What has not been shown yet, and how many rows there are up to it; a row counts as shown
        once the next one is asked for."""
        for count, row in enumerate(rows, 1):
            if self.rows.get(_key(row)) != row:
                yield count, row
                self.rows[_key(row)] = row


def undelivered(parent: Path) -> RunFolder | None:
    """The newest finished run of a folder, if it has a winner that is left to `deliver`.

    Older ones are left out: what they trained is not to replace what came after them.
    """
    runs = [RunFolder(path.parent) for path in parent.glob(f"*/{MANIFEST}")]
    if not runs:
        return None
    newest = max(runs, key=lambda run: run.manifest().started)
    export = newest.config().export
    exported = export.enabled and newest.packed(export.name)  # by `run` itself
    done = exported or (newest.path / DELIVERED).exists()
    return None if done or newest.comparison().winner is None else newest


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(
        json.dumps({key: row.get(key) for key in COLUMNS}) + "\n" for row in rows
    ).encode()


def _is_same(row: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    """Compares what is written, so that a loss of NaN equals itself."""
    names = ("loss", "aux_loss", "accuracy")
    return all(repr(row[name]) == repr(again.get(name)) for name in names)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("variant", "seed", "epoch", "split"))


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Paths of the keys that two nested mappings do not agree on."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            path
            for key in keys
            for path in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [where]
