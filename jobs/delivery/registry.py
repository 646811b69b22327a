"""Model registry in S3: immutable versions, and channels that point to the serving one.

serving/archive.py has the layout. A version's description goes last; a channel's pointer is swapped
as a whole, in place of the one that was read.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from jobs import results
from jobs.delivery.storage import THREADS, Storage
from jobs.errors import ConfigurationError, UnavailableError
from jobs.runs import now
from serving.archive import (
    ARCHIVE,
    CHANNELS,
    MODELS,
    SIGNATURE,
    Earlier,
    Pointer,
    Version,
    channel_key,
    version_key,
)
from serving.files import digest_of, replacing
from serving.progress import Advance, task
from serving.s3 import Conflict

POINTER, VERSION = TypeAdapter(Pointer), TypeAdapter(Version)
HISTORY = 20  # earlier versions that a channel remembers, and that `prune` spares for it


@dataclass(frozen=True)
class Channel:
    """A channel as it was read; `etag` stands for exactly that content."""

    pointer: Pointer
    etag: str

    @property
    def version(self) -> str:
        return self.pointer.version

    @property
    def versions(self) -> set[str]:
        """The version that it points to and the earlier ones that it remembers."""
        return {self.version, *(earlier.version for earlier in self.pointer.history)}

    def previous(self) -> str | None:
        """The version to go back to: the latest earlier one that was not rolled back."""
        left = {self.version}
        for earlier in self.pointer.history:
            if earlier.rolled_back:
                left.add(earlier.version)
            elif earlier.version not in left:
                return earlier.version
        return None


class Registry:
    """The versions and channels of one model name."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name, self.root = storage, name, f"{MODELS}/{name}"

    def uri(self, version: str) -> str:
        return f"{self.storage.uri}/{self.root}/{version}/"

    def models(self) -> list[str]:
        """The names of all models in this storage."""
        return self.storage.folders(f"{MODELS}/")

    def channel(self, channel: str) -> Channel | None:
        """The channel's current pointer; None if it was never set.

        Raises:
            UnavailableError: storage cannot be reached, or the pointer is invalid.
        """
        key = channel_key(self.name, channel)
        found = self.storage.get(key)
        if found is None:
            return None
        pointer = results.parse(f"{self.storage.uri}/{key}", found.body, POINTER)
        return Channel(pointer, found.etag)

    def channels(self) -> dict[str, Channel]:
        prefix = f"{self.root}/{CHANNELS}/"
        names = [Path(entry.key).stem for entry in self.storage.entries(prefix)]
        return {name: channel for name in names if (channel := self.channel(name))}

    def point(
        self, channel: str, version: str, current: Channel | None, *, rolled_back: bool = False
    ) -> None:
        """Makes a channel point to a version, provided that it still is what was read.

        Args:
            rolled_back: marks the current version as rolled back.

        Raises:
            Conflict: it is not.
            UnavailableError: there is no such version.
        """
        pointer = Pointer(
            name=self.name,
            version=version,
            sha256=self.version(version).files[ARCHIVE].sha256,
            time=now(),
            history=_history(current, rolled_back=rolled_back),
        )
        etag = current.etag if current else None
        self.storage.put(channel_key(self.name, channel), pointer.to_json(), replacing=etag)

    def version(self, version: str) -> Version:
        """
        Raises:
            UnavailableError: there is no such version, or it is not whole.
        """
        found = self._version(version)
        if found is None:
            raise UnavailableError(f"{self.uri(version)}: no such version; `models` lists them")
        return found

    def _version(self, version: str) -> Version | None:
        found = self.storage.get(version_key(self.name, version))
        return results.parse(self.uri(version), found.body, VERSION) if found else None

    def whole_versions(self) -> list[Version]:
        """All versions that are whole, the newest first."""
        with ThreadPoolExecutor(THREADS) as threads:
            found = [v for v in threads.map(self._version, self.versions()) if v]
        return sorted(found, key=lambda version: version.time, reverse=True)

    def versions(self) -> list[str]:
        """The names of all versions, of those that are still being written, too."""
        folders = self.storage.folders(f"{self.root}/")
        return [version for version in folders if version != CHANNELS]

    def add(self, files: Mapping[str, Path], record: Version) -> None:
        """Writes a version, its version.json last; the same one again changes nothing.

        Args:
            files: by their names there.
            record: what version.json is to say.

        Raises:
            ConfigurationError: another one is there under this name.
        """
        version = record.description.version
        self.storage.abort_uploads(version_key(self.name, version, ""))
        size = sum(entry.size for entry in record.files.values()) / 2**20
        with task(f"version {version}", size, "MiB") as advance:
            for name, path in files.items():
                key = version_key(self.name, version, name)
                if not self._write_once(path, key, record.files[name].sha256, advance):
                    raise self.taken(version)
        try:
            self.storage.put(version_key(self.name, version), record.to_json(), replacing=None)
        except Conflict:
            if self.version(version).files != record.files:
                raise self.taken(version) from None

    def sign(self, version: str, signature: bytes) -> None:
        """Puts a signature beside a version's archive, unless it has one: no two are the same."""
        key = version_key(self.name, version, ARCHIVE + SIGNATURE)
        with suppress(Conflict):
            self.storage.put(key, signature, replacing=None)

    def fetch(self, version: str, path: Path, name: str = ARCHIVE) -> None:
        """Downloads a version's archive, or another of its files, whole or not at all.

        Raises:
            UnavailableError: it is not there, or not what its version.json says.
        """
        expected = self.version(version).files[name]
        with replacing(path) as part:
            with task(f"fetch {version}", expected.size / 2**20, "MiB") as advance:
                self.storage.fetch(version_key(self.name, version, name), part, advance)
            if digest_of(part) != expected.sha256:
                raise UnavailableError(f"{self.uri(version)}: {name} is damaged there")

    def _write_once(self, path: Path, key: str, digest: str, advance: Advance) -> bool:
        """Whether this very file is there in the end."""
        if self.storage.digest(key) is None:
            with suppress(Conflict):
                self.storage.send(path, key, digest, advance, once=True)
        return self.storage.digest(key) == digest

    def taken(self, version: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.uri(version)}: another model is there, and versions are written once; "
            "train under another --run-id"
        )


def _history(current: Channel | None, *, rolled_back: bool) -> tuple[Earlier, ...]:
    """What a channel remembers once something else takes the place of `current`."""
    if current is None:
        return ()
    last = current.pointer
    earlier = Earlier(
        version=last.version, sha256=last.sha256, time=last.time, rolled_back=rolled_back
    )
    return (earlier, *last.history)[:HISTORY]
