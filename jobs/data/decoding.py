"""Picture files, decoded once into a store in the cache, which those of later runs are added to.

A store belongs to one root and one input size. Its file `pixels-<n>` has a row of pixels for every
picture. Rows are only ever added, and an index says which row is which picture's; what a killed
process left after the last row of the index is overwritten. Another file is begun when the pictures
need another size, or when fewer than half of the rows would be in use.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jobs import config, interruption
from jobs.data import index
from jobs.data.images import Images
from jobs.data.listing import MANIFESTS, SPLITS, Picture
from jobs.errors import UnavailableError
from serving import ahead
from serving.files import naming
from serving.images import ImageError, decode, opened, to_pixels
from serving.progress import task

CACHE_VERSION = 3  # to be raised when decoding gives other pixels than before
DECODING_AHEAD = 64  # pictures that wait decoded for the disk; 268 KB each at 299 pixels
SCHEMA = """
CREATE TABLE IF NOT EXISTS store(file INTEGER, height INTEGER, width INTEGER, rows INTEGER);
CREATE TABLE IF NOT EXISTS wanted(
    name TEXT PRIMARY KEY, file BLOB, version TEXT, split TEXT, label TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures(
    name TEXT PRIMARY KEY, version TEXT, height INTEGER, width INTEGER,
    row INTEGER, digest BLOB, error TEXT) WITHOUT ROWID;
"""
MISSING = """
SELECT name, file FROM pictures JOIN wanted USING (name) WHERE {} IS NULL AND error IS NULL
"""
FOUND = np.dtype([("label", "i8"), ("row", "i8"), ("digest", "u1", 32)])

Shape = tuple[int, int]
"""Height and width."""
Read = tuple[bytes | None, NDArray[np.uint8] | ImageError]
"""SHA-256 of a file, and its pixels uint8 [3, H, W], or why there are none."""


@dataclass(frozen=True)
class Decoded:
    """The readable pictures of a listing, sorted by class and digest: their names do not matter."""

    splits: dict[str, Images]
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]
    """The other files, and why."""


def decoded(listing: Iterable[Picture], settings: config.Data) -> Decoded:
    """The pictures of a listing; what the store has of them is not decoded again.

    Raises:
        UnavailableError: there are too few classes, or one has no readable picture.
    """
    folder = store(settings)
    with index.opened(folder, SCHEMA) as db:
        _note(db, listing)
        classes = _classes(db, str(settings.root))
        file = _fill(db, folder, settings.input_size)
        _require_pictures(db)
        (height, width) = db.execute("SELECT height, width FROM store").fetchone()
        pixels = memory_mapped(file.path, (height, width))
        splits = {}
        for split in SPLITS:
            found = _rows(db, split, {name: number for number, name in enumerate(classes)})
            rows, labels = (torch.from_numpy(found[name].copy()) for name in ("row", "label"))
            splits[split] = Images(pixels, rows, labels, settings, found["digest"], file)
        skipped = db.execute(
            "SELECT name, error FROM pictures JOIN wanted USING (name) "
            "WHERE error IS NOT NULL ORDER BY split DESC, name"
        )
        return Decoded(splits, classes, skipped.fetchall())


def store(settings: config.Data) -> Path:
    """The folder of a root's decoded pictures."""
    root = str(settings.root)
    place = root if root.startswith("s3:") else str(Path(root).expanduser().absolute())
    key = json.dumps([CACHE_VERSION, place, settings.s3.endpoint_url, settings.input_size])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(settings.cache).expanduser() / f"pictures-{digest}"


def paths(images: Images, split: str) -> list[str]:
    """The names of images, for people and for `data.exclude`: a file's path below the data's root;
    split and row of an image without a file, or whose store has been replaced since."""
    known: dict[int, str] = {}
    if images.file is not None:
        with index.opened(images.file.path.parent, SCHEMA) as db:
            (number,) = db.execute("SELECT file FROM store").fetchone() or (None,)
            if images.file.path.name == f"pixels-{number}":  # else another run has begun a new one
                known = dict(db.execute("SELECT row, name FROM pictures WHERE row IS NOT NULL"))
    return [
        below_root(known[row], images.settings) if row in known else f"{split}/{row}"
        for row in images.rows.tolist()
    ]


def below_root(name: str, settings: config.Data) -> str:
    root = str(settings.root)
    place = root.rstrip("/") if "://" in root else str(Path(root).expanduser().absolute())
    if place.endswith(MANIFESTS):
        place = place.rpartition("/")[0]
        place = place if "://" in root else os.path.normpath(place)  # as listing.in_manifest does
    return name.removeprefix(f"{place.rstrip('/')}/")


def memory_mapped(path: Path, shape: Shape) -> torch.Tensor:
    """The rows of a store's file, uint8 [M, 3, H, W]."""
    rows = path.stat().st_size // (3 * shape[0] * shape[1])
    return torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=(rows, 3, *shape)))


def _note(db: sqlite3.Connection, listing: Iterable[Picture]) -> None:
    """Writes down what is wanted, and forgets pictures that are gone or have changed."""
    with db:
        db.execute("DELETE FROM wanted")
        for picture in listing:
            try:
                db.execute(
                    "INSERT INTO wanted(name, file, version, split, label) VALUES (?, ?, ?, ?, ?)",
                    picture,
                )
            except sqlite3.IntegrityError:
                raise UnavailableError(f"{picture.name}: is listed twice") from None
        db.execute(
            "DELETE FROM pictures WHERE NOT EXISTS (SELECT 1 FROM wanted "
            "WHERE wanted.name = pictures.name AND wanted.version = pictures.version)"
        )
        db.execute("INSERT OR IGNORE INTO pictures(name, version) SELECT name, version FROM wanted")


def _classes(db: sqlite3.Connection, root: str) -> tuple[str, ...]:
    train, test = (
        {label for (label,) in db.execute("SELECT DISTINCT label FROM wanted WHERE split = ?", [s])}
        for s in SPLITS
    )
    if len(train) < 2:
        raise UnavailableError(
            f"{root}: two classes at least are needed, found {sorted(train)} for training"
        )
    if strangers := sorted(test - train):
        raise UnavailableError(f"{root}: test has classes that train has not: {strangers}")
    return tuple(sorted(train))


def _require_pictures(db: sqlite3.Connection) -> None:
    """Of each class in each split."""
    if empty := db.execute(
        "SELECT split, label, name, max(error) FROM pictures JOIN wanted USING (name) "
        "GROUP BY split, label HAVING count(row) = 0 ORDER BY split DESC, label"
    ).fetchone():
        split, label, name, error = empty
        raise UnavailableError(f"{split}/{label}: not one readable picture, {name}: {error}")


def _fill(db: sqlite3.Connection, folder: Path, input_size: int) -> index.Held:
    """Decodes what is wanted and not yet in the store; gives the file that has all of it."""
    with ThreadPoolExecutor() as pool:
        _measure(db, pool)
        file, shape = _current_file(db, folder, input_size)
        _decode(db, pool, file, shape)
    _remove_others(file)
    return index.Held(file)


def _measure(db: sqlite3.Connection, pool: ThreadPoolExecutor) -> None:
    """Notes the size that every new file's header says, 0 by 0 where it has none."""
    for page in index.pages(db, MISSING.format("height") + "AND name > ?"):
        interruption.check()
        sizes = pool.map(_header_size, [file for _, file in page])
        found = [(*size, name) for (name, _), size in zip(page, sizes, strict=True)]
        with db:
            db.executemany("UPDATE pictures SET height = ?, width = ? WHERE name = ?", found)


def _current_file(db: sqlite3.Connection, folder: Path, input_size: int) -> tuple[Path, Shape]:
    """The file that new rows go to, a new one if the last cannot take them; and its rows' shape."""
    sizes = db.execute("SELECT DISTINCT height, width FROM pictures WHERE height > 0 LIMIT 2")
    height, width = (input_size, input_size)
    if len(found := sizes.fetchall()) == 1 and max(found[0]) <= input_size:
        height, width = found[0]
    wanted, have = db.execute("SELECT count(*), count(row) FROM pictures").fetchone()
    number, *before = db.execute("SELECT * FROM store").fetchone() or (0, 0, 0, 0)
    path, rows = folder / f"pixels-{number}", before[2]
    whole = path.is_file() and path.stat().st_size >= rows * 3 * height * width
    if before[:2] != [height, width] or not whole or rows + wanted - have > 2 * wanted:
        path = folder / f"pixels-{number + 1}"
        path.write_bytes(b"")
        with db:
            db.execute("DELETE FROM store")
            db.execute("INSERT INTO store VALUES (?, ?, ?, 0)", (number + 1, height, width))
            db.execute("UPDATE pictures SET row = NULL, digest = NULL, error = NULL")
    return path, (height, width)


def _decode(db: sqlite3.Connection, pool: ThreadPoolExecutor, path: Path, shape: Shape) -> None:
    """Adds the pixels of all readable pictures that have no row."""
    missing = MISSING.format("row")
    (total,) = db.execute(f"SELECT count(*) FROM ({missing})").fetchone()
    (rows,) = db.execute("SELECT rows FROM store").fetchone()
    entries = (entry for page in index.pages(db, missing + "AND name > ?") for entry in page)

    def read(entry: tuple[str, bytes]) -> tuple[str, Read]:
        return entry[0], _read(Path(os.fsdecode(entry[1])), shape)

    notes: list[tuple[int | None, bytes | None, str | None, str]] = []
    with naming(path), path.open("r+b") as file, task("decoding", total) as advance:
        file.truncate(rows * 3 * shape[0] * shape[1])
        file.seek(0, os.SEEK_END)

        def commit() -> None:
            file.flush()
            os.fsync(file.fileno())
            with db:
                db.executemany(
                    "UPDATE pictures SET row = ?, digest = ?, error = ? WHERE name = ?", notes
                )
                db.execute("UPDATE store SET rows = ?", (rows,))
            notes.clear()

        for name, (digest, result) in ahead.mapped(pool, read, entries, DECODING_AHEAD):
            interruption.check()
            advance(1)
            if isinstance(result, ImageError):
                notes.append((None, digest, str(result), name))
            else:
                file.write(result.data)
                notes.append((rows, digest, None, name))
                rows += 1
            if len(notes) == index.PAGE:
                commit()
        commit()


def _header_size(file: bytes) -> Shape:
    try:
        with opened(os.fsdecode(file)) as picture:
            return picture.height, picture.width
    except ImageError:
        return 0, 0  # _read says what is wrong with it


def _read(path: Path, size: Shape) -> Read:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None, ImageError("is not there")
    digest = hashlib.sha256(data).digest()
    try:
        return digest, np.ascontiguousarray(to_pixels(decode(data), size))
    except ImageError as error:
        return digest, error


def _rows(db: sqlite3.Connection, split: str, numbers: dict[str, int]) -> NDArray[np.void]:
    """FOUND [N]: the readable pictures of a split by class and digest."""
    found = db.execute(
        "SELECT label, row, digest FROM pictures JOIN wanted USING (name) "
        "WHERE split = ? AND row IS NOT NULL ORDER BY label, digest",
        [split],
    )
    entries = (
        (numbers[label], row, np.frombuffer(digest, np.uint8)) for label, row, digest in found
    )
    return np.fromiter(entries, FOUND)


def _remove_others(current: Path) -> None:
    """Removes earlier files of the store, unless a process holds them."""
    for path in current.parent.glob("pixels-*"):
        if not path.suffix and path != current and index.remove(path):
            for selection in path.parent.glob(f"{path.name}.*"):
                selection.unlink()
