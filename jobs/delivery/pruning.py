"""Deletes old runs and versions by a retention rule, but none that a channel refers to."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby

from jobs import interruption
from jobs.delivery.registry import Registry
from jobs.delivery.storage import Entry, Storage
from jobs.runs import MANIFEST
from serving.archive import CHANNELS, MODELS, VERSION

UNTOUCHED = timedelta(days=1)  # what is younger may be under way right now


@dataclass(frozen=True)
class Item:
    """A run or a version: everything under one prefix that ends in a slash."""

    prefix: str
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """The run's id or the version."""
        return self.prefix.rstrip("/").rpartition("/")[2].removeprefix("run_id=")

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> datetime:
        return max(entry.modified for entry in self.entries)


def prune(
    storage: Storage,
    *,
    days: float | None,
    keep: int,
    dry_run: bool,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> list[Item]:
    """Deletes runs and versions older than `days`, but never the newest `keep` of the runs or of
    a model's versions, what any channel names, nor what was touched within a day; parts that
    killed publishers left behind more than a day ago go too.

    Returns:
        What was, or would be, deleted.
    """
    age = max(UNTOUCHED, timedelta(days=days or 0))
    gone = []
    for items in _groups(storage):
        newest = sorted(items, key=lambda item: item.modified, reverse=True)
        for item in newest[keep:]:
            interruption.check()
            # Checked again for each: a channel may be moved while others are deleted.
            if now() - item.modified >= age and item.name not in protected(storage):
                gone.append(item)
                if not dry_run:
                    _delete(storage, item)
    if not dry_run:
        for own in ("runs/dt=", "parts/", f"{MODELS}/"):
            storage.abort_uploads(own, before=now() - UNTOUCHED)
    return gone


def protected(storage: Storage) -> set[str]:
    """All versions, and so run ids, that a channel points to or remembers."""
    registries = [Registry(storage, name) for name in storage.folders(f"{MODELS}/")]
    channels = [channel for registry in registries for channel in registry.channels().values()]
    return {version for channel in channels for version in channel.versions}


def _groups(storage: Storage) -> Iterator[list[Item]]:
    """The runs, then their parts, then each model's versions."""
    runs = storage.entries("runs/dt=")
    yield _items([entry for entry in runs if re.match("runs/[^/]+/run_id=", entry.key)])
    yield _items(storage.entries("parts/"))
    for name in storage.folders(f"{MODELS}/"):
        entries = storage.entries(f"{MODELS}/{name}/")
        channels = f"{MODELS}/{name}/{CHANNELS}/"
        yield _items([e for e in entries if not e.key.startswith(channels)])


def _items(entries: list[Entry]) -> list[Item]:
    """Objects by runs/dt=…/run_id=…, parts/<run_id>/<digest> or models/<name>/<version>: three
    parts of the key. Others than those in such folders are somebody else's."""

    def prefix(entry: Entry) -> str:
        return "".join(f"{part}/" for part in entry.key.split("/")[:3])

    inside = (entry for entry in entries if entry.key.count("/") > 2)
    return [Item(key, tuple(found)) for key, found in groupby(inside, prefix)]


def _delete(storage: Storage, item: Item) -> None:
    """Deletes the manifest first, so that no reader takes the rest for complete."""
    last = {f"{item.prefix}{name}" for name in (MANIFEST, VERSION)}
    keys = [entry.key for entry in item.entries]
    storage.delete([key for key in keys if key in last])
    storage.delete([key for key in keys if key not in last])
