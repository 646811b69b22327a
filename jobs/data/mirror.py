"""A copy in the cache of the pictures in a bucket, and of those in tar shards.

An index says of each object which ETag it was fetched with; its file is named after the digest of
its key, so that no key can lead anywhere else. An object without an ETag in the index is not whole,
and the next call fetches or removes it; what has the same ETag and size as before is not fetched
again. Everything of which there are many is in SQLite, so that memory is bounded.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from jobs import config, interruption
from jobs.data import index, listing, shards
from jobs.data.listing import SPLITS, Picture
from jobs.data.origins import THREADS, Bucket, Entry, Folder
from jobs.errors import JobError, UnavailableError
from serving.ahead import mapped
from serving.files import PARTIAL, write
from serving.progress import log, task

WAITING = 4 * 2**30  # bytes of shards that may wait on the disk to be unpacked, two at least

SCHEMA = """
CREATE TABLE IF NOT EXISTS listed(
    key TEXT PRIMARY KEY, split TEXT, label TEXT, etag TEXT, size INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS objects(key TEXT PRIMARY KEY, etag TEXT, size INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples(
    shard TEXT, name TEXT, label TEXT, PRIMARY KEY (shard, name)) WITHOUT ROWID;
"""
# `listed` is the root as it is now. A row has no ETag if only a manifest names it, and no label if
# it is a shard.

Origin = Bucket | Folder


@contextmanager
def refreshed(settings: config.Data) -> Iterator[Iterator[Picture]]:
    """The pictures of the root as it is now, all in the copy, which no other process changes while
    the block runs.

    Raises:
        UnavailableError: the root cannot be listed, or not all of it be fetched; the next call
            goes on from there.
    """
    origin = Bucket(settings) if str(settings.root).startswith("s3://") else Folder(settings)
    key = f"{settings.s3.endpoint_url} {origin.name(origin.prefix)} {origin.manifest}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = Path(settings.cache).expanduser() / f"mirror-{digest}"
    with index.opened(folder, SCHEMA) as db:
        for half in folder.glob(f"objects/*/{PARTIAL}"):
            half.unlink()
        _list(db, folder, origin)
        _compare(db)
        _remove(db, folder)
        _fetch(db, folder, origin)
        yield _pictures(db, folder, origin)


def has_shards(root: Path) -> bool:
    return any(any((root / split).glob(f"[!.]*{shards.SUFFIX}")) for split in SPLITS)


def check(settings: config.Data) -> tuple[bool, str]:
    """Whether the manifest, or anything below the prefix, is there, and a line that says so."""
    try:
        bucket = Bucket(settings)
        wanted = bucket.manifest or bucket.prefix
        keys = [entry.key for entry in bucket.entries(wanted, limit=1)]
    except JobError as error:
        return False, str(error)
    there = keys == [wanted] if bucket.manifest else bool(keys)
    return there, f"{bucket.name(wanted)} {'is there' if there else 'is not there'}"


def _list(db: sqlite3.Connection, folder: Path, origin: Origin) -> None:
    with db:
        db.execute("DELETE FROM listed")
        if isinstance(origin, Bucket) and origin.manifest:
            _list_manifest(db, folder, origin)
        else:
            _list_root(db, origin)


def _list_root(db: sqlite3.Connection, origin: Origin) -> None:
    """Objects `train/<class>/<picture>` and `train/<shard>.tar`, and the same of `test`."""
    others, first = 0, ""
    for key, etag, size in origin.entries():
        interruption.check()
        match key.removeprefix(origin.prefix).split("/"):
            case [("train" | "test") as split, label, file] if _visible(label, file):
                db.execute(
                    "INSERT INTO listed VALUES (?, ?, ?, ?, ?)", (key, split, label, etag, size)
                )
            case [("train" | "test") as split, file] if _visible(file) and shards.is_one(file):
                db.execute("INSERT INTO listed VALUES (?, ?, NULL, ?, ?)", (key, split, etag, size))
            case _:
                others, first = others + 1, first or key
    if others:
        log(
            f"passed over {others:,} that are not <class>/<picture> or <shard>.tar in train or "
            f"test, the first: {origin.name(first)}"
        )


def _visible(*names: str) -> bool:
    return all(name and name[0] != "." for name in names)


def _list_manifest(db: sqlite3.Connection, folder: Path, origin: Bucket) -> None:
    file = folder / f"manifest{Path(str(origin.manifest)).suffix}"
    if not origin.fetch(Entry(origin.root, "", 0), file):
        raise UnavailableError(f"{origin.name(origin.root)}: is not there")
    for path, split, label in listing.rows(file):
        entry = (origin.key(path), split, label)
        try:
            db.execute("INSERT INTO listed(key, split, label) VALUES (?, ?, ?)", entry)
        except sqlite3.IntegrityError:
            raise UnavailableError(f"{origin.name(origin.root)}: {path} is listed twice") from None
    ends = db.execute("SELECT min(key), max(key) FROM listed").fetchone()
    if ends[0] is None:
        raise UnavailableError(f"{origin.name(origin.root)}: lists no pictures")
    prefix = os.path.commonprefix(ends)  # noqa: RUF071 - of keys, which are no paths
    for key, etag, size in origin.entries(prefix):
        interruption.check()
        db.execute("UPDATE listed SET etag = ?, size = ? WHERE key = ?", (etag, size, key))


def _compare(db: sqlite3.Connection) -> None:
    """Clears the ETag of each object that is gone or has changed, and adds new ones without one."""
    with db:
        db.execute(
            "UPDATE objects SET etag = NULL WHERE NOT EXISTS (SELECT 1 FROM listed AS l "
            "WHERE l.key = objects.key AND l.etag = objects.etag AND l.size = objects.size)"
        )
        db.execute(
            "INSERT OR IGNORE INTO objects(key) SELECT key FROM listed WHERE etag IS NOT NULL"
        )


def _remove(db: sqlite3.Connection, folder: Path) -> None:
    gone = (
        "SELECT key FROM objects WHERE key NOT IN (SELECT key FROM listed WHERE etag IS NOT NULL) "
        "AND key > ?"
    )
    for page in index.pages(db, gone):
        for (key,) in page:
            _remove_samples(db, folder, key)
            _file(folder, key).unlink(missing_ok=True)
        with db:
            db.executemany("DELETE FROM objects WHERE key = ?", page)


def _remove_samples(db: sqlite3.Connection, folder: Path, shard: str) -> None:
    for (name,) in db.execute("SELECT name FROM samples WHERE shard = ?", [shard]).fetchall():
        _file(folder, shard, name).unlink(missing_ok=True)
    with db:
        db.execute("DELETE FROM samples WHERE shard = ?", [shard])


def _fetch(db: sqlite3.Connection, folder: Path, origin: Origin) -> None:
    """Fetches what has no ETag yet, and unpacks shards."""
    missing = (
        "SELECT key, listed.etag, listed.size FROM objects JOIN listed USING (key) "
        "WHERE objects.etag IS NULL"
    )
    total, largest = db.execute(f"SELECT count(*), max(size) FROM ({missing})").fetchone()
    ahead = min(2 * THREADS, max(2, WAITING // (largest or 1)))
    entries = (Entry(*row) for page in index.pages(db, f"{missing} AND key > ?") for row in page)
    fetched: list[Entry] = []

    def fetch(entry: Entry) -> Entry | None:
        if origin.fetch(entry, _file(folder, entry.key)):
            return entry
        _file(folder, entry.key).unlink(missing_ok=True)  # as it was before
        return None

    def commit() -> None:
        with db:
            rows = [(etag, size, key) for key, etag, size in fetched]
            db.executemany("UPDATE objects SET etag = ?, size = ? WHERE key = ?", rows)
        fetched.clear()

    with ThreadPoolExecutor(THREADS) as pool, task("fetching", total, "files") as advance:
        try:
            for entry in mapped(pool, fetch, entries, ahead):
                interruption.check()
                advance(1)
                if entry is not None:
                    if shards.is_one(entry.key):
                        _unpack(db, folder, entry.key, origin.name(entry.key))
                    fetched.append(entry)
                if len(fetched) == index.PAGE:
                    commit()
        finally:
            commit()


def _unpack(db: sqlite3.Connection, folder: Path, shard: str, name: str) -> None:
    """Replaces a shard by its pictures: writes all of their files, and only then notes them."""
    _remove_samples(db, folder, shard)
    found = []
    for sample in shards.samples(_file(folder, shard), name):
        interruption.check()
        write(_file(folder, shard, sample.name), sample.data)
        found.append((shard, sample.name, sample.label))
    try:
        with db:
            db.executemany("INSERT INTO samples VALUES (?, ?, ?)", found)
    except sqlite3.IntegrityError:
        raise UnavailableError(f"{name}: has two files of the same name") from None
    _file(folder, shard).unlink()


def _file(folder: Path, *names: str) -> Path:
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()
    return folder / "objects" / digest[:2] / digest[2:40]


def _pictures(db: sqlite3.Connection, folder: Path, origin: Origin) -> Iterator[Picture]:
    for key, split, label, etag in db.execute(
        "SELECT key, split, label, objects.etag FROM listed LEFT JOIN objects USING (key) "
        "WHERE label IS NOT NULL"
    ):
        yield Picture(origin.name(key), os.fsencode(_file(folder, key)), etag or "", split, label)
    for shard, name, split, label, etag in db.execute(
        "SELECT shard, name, split, samples.label, objects.etag FROM samples "
        "JOIN listed ON listed.key = shard JOIN objects ON objects.key = shard"
    ):
        file = os.fsencode(_file(folder, shard, name))
        yield Picture(f"{origin.name(shard)}: {name}", file, etag, split, label)
