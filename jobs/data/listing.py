"""Which pictures there are, of what class, in which split: of folders and of manifests."""

import csv
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import ConfigurationError, UnavailableError
from serving.files import text
from serving.progress import log

SPLITS = ("train", "test")
MANIFESTS = (".csv", ".parquet")


class Picture(NamedTuple):
    name: str
    """What messages call it; no two have the same."""
    file: bytes
    """Where it is on this machine; bytes, for not every file's name is text."""
    version: str
    """Changes whenever the file does."""
    split: str
    label: str


def in_folders(root: Path) -> Iterator[Picture]:
    """The files of `train/<class>/` and, if it is there, `test/<class>/`.

    Raises:
        UnavailableError: there is no `train`, or a class is empty.
    """
    others: list[Path] = []
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            if split == "train":
                raise UnavailableError(
                    f"{folder}: no such folder; pictures go to {folder}/<class>/"
                )
            continue
        visible = [path for path in folder.iterdir() if path.name[0] != "."]
        labels = sorted(path.name for path in visible if path.is_dir())
        others += (path for path in visible if not path.is_dir())
        for label in labels:
            empty = True
            with os.scandir(folder / label) as entries:
                for entry in entries:
                    if entry.name[0] == ".":
                        continue
                    if entry.is_file(follow_symlinks=False) or Path(entry.path).is_file():
                        empty = False
                        with suppress(FileNotFoundError):  # it has vanished since
                            yield _on_disk(entry.path, entry.stat(), split, label)
                    else:
                        others.append(Path(entry.path))
            if empty:
                raise UnavailableError(f"{folder / label}: the class has no pictures")
    others += (
        d for d in root.iterdir() if d.is_dir() and d.name not in SPLITS and d.name[0] != "."
    )
    if others:
        log(
            f"passed over {len(others):,} that are not train/<class>/<picture> or "
            f"test/<class>/<picture>, the first: {text(str(others[0]))}"
        )


def in_manifest(file: Path) -> Iterator[Picture]:
    """The pictures that a manifest on this machine lists, relative to its folder.

    Raises:
        UnavailableError: it cannot be read, or leads out of its folder.
    """
    if not file.is_file():
        raise UnavailableError(f"{file}: no such file")
    root = Path(os.path.normpath(file.parent.absolute()))
    for path, split, label in rows(file):
        place = Path(os.path.normpath(root / path))
        if not place.is_relative_to(root):
            raise UnavailableError(f"{file}: {path} is not below {root}")
        try:
            stat = place.stat() if place.is_file() else None
        except OSError as error:  # its name is too long
            raise UnavailableError(f"{file}: {path}: {error.strerror}") from None
        yield _on_disk(str(place), stat, split, label)


def _on_disk(path: str, stat: os.stat_result | None, split: str, label: str) -> Picture:
    return Picture(text(path), os.fsencode(path), version(stat) if stat else "", split, text(label))


def version(stat: os.stat_result) -> str:
    """With ctime, which a change of name sets: two pictures that swap their names may have the same
    size and mtime."""
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """Path, split and label of a manifest's rows: `path` or `url`, `label` and, if there is one,
    `split`, which is `train` where it is empty.

    Raises:
        UnavailableError: it cannot be read, or lacks a column or a value.
        ConfigurationError: it is Parquet, which needs pyarrow.
    """
    for number, row in enumerate(_parquet(file) if file.suffix == ".parquet" else _csv(file), 1):
        path, label = row.get("path") or row.get("url"), row.get("label")
        split = row.get("split") or "train"
        if not path or label in (None, "") or label != label:  # noqa: PLR0124 - NaN
            raise UnavailableError(f"{file}: row {number} lacks path (or url) or label")
        if "\0" in str(path) or not isinstance(label, str | int | float):
            raise UnavailableError(f"{file}: row {number}: a path and one word or number is needed")
        if split not in SPLITS:
            raise UnavailableError(f"{file}: row {number}: the split {split} is not train or test")
        yield str(path), str(split), str(label)


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            yield from csv.DictReader(lines)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UnavailableError(f"{file}: not a CSV file in UTF-8: {error}") from None


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ConfigurationError(
            f"{file}: Parquet needs pip install 'inception-transfer[score]'"
        ) from None
    try:
        with pq.ParquetFile(file) as table:
            wanted = {"path", "url", "label", "split"}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(10_000, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnavailableError(f"{file}: {' '.join(str(error).split())}") from None
