"""Models in S3: versions that are written once, and channels that say which one serves.

models/<name>/<version>/{model.mar, test_predictions.npz, manifest.json}    the manifest last
models/<name>/channels/<channel>.json    swapped as a whole, in place of the one that was read
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import ConfigurationError, UnavailableError
from jobs.progress import task
from jobs.runs import MANIFEST, now, sha256
from jobs.storage import THREADS, Advance, Conflict, Storage

ARCHIVE = "model.mar"
PREDICTIONS = "test_predictions.npz"
CHANNELS = "channels"
HISTORY = 20  # earlier versions that a channel remembers, and that `prune` spares for it


@dataclass(frozen=True)
class Channel:
    """A channel as it was read; `etag` stands for exactly that content."""

    content: Mapping[str, Any]
    etag: str

    @property
    def version(self) -> str:
        return str(self.content["version"])

    @property
    def versions(self) -> set[str]:
        """The version that it points to and the earlier ones that it remembers."""
        return {self.version, *(entry["version"] for entry in self.content["history"])}

    def previous(self) -> str | None:
        """The version to go back to: the latest earlier one that nobody went back from."""
        left = {self.version}
        for entry in self.content["history"]:
            if entry.get("rolled_back"):
                left.add(entry["version"])
            elif entry["version"] not in left:
                return str(entry["version"])
        return None


class Registry:
    """The versions and channels of one model name."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name, self.root = storage, name, f"models/{name}"

    def uri(self, version: str) -> str:
        return f"{self.storage.uri}/{self.root}/{version}/"

    def channel(self, channel: str) -> Channel | None:
        found = self.storage.get(self._channel_key(channel))
        return Channel(json.loads(found.body), found.etag) if found else None

    def channels(self) -> dict[str, Channel]:
        prefix = f"{self.root}/{CHANNELS}/"
        names = [Path(entry.key).stem for entry in self.storage.entries(prefix)]
        found = {name: self.channel(name) for name in names}
        return {name: channel for name, channel in found.items() if channel}

    def point(
        self, channel: str, version: str, current: Channel | None, *, rolled_back: bool = False
    ) -> None:
        """Makes a channel point to a version, provided that it still is what was read.

        Args:
            rolled_back: notes that the version so far was not good.

        Raises:
            Conflict: it is not.
            UnavailableError: there is no such version.
        """
        content = {
            "name": self.name,
            "version": version,
            "sha256": self.manifest(version)["files"][ARCHIVE]["sha256"],
            "time": now(),
            "history": _history(current, rolled_back=rolled_back),
        }
        etag = current.etag if current else None
        self.storage.put(self._channel_key(channel), _json(content), replacing=etag)

    def manifest(self, version: str) -> dict[str, Any]:
        """
        Raises:
            UnavailableError: there is no such version, or it is not whole.
        """
        found = self.storage.get(f"{self.root}/{version}/{MANIFEST}")
        if found is None:
            raise UnavailableError(f"{self.uri(version)}: no such version; `models` lists them")
        manifest: dict[str, Any] = json.loads(found.body)
        return manifest

    def manifests(self) -> list[dict[str, Any]]:
        """Of all versions that are whole, the newest first."""

        def read(version: str) -> dict[str, Any] | None:
            found = self.storage.get(f"{self.root}/{version}/{MANIFEST}")
            return json.loads(found.body) if found else None

        with ThreadPoolExecutor(THREADS) as threads:
            found = [manifest for manifest in threads.map(read, self.versions()) if manifest]
        return sorted(found, key=lambda manifest: str(manifest["time"]), reverse=True)

    def versions(self) -> list[str]:
        folders = self.storage.folders(f"{self.root}/")
        return [version for version in folders if version != CHANNELS]

    def add(self, version: str, files: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
        """Writes a version, its manifest last; the same one again changes nothing.

        Raises:
            ConfigurationError: another one is there under this name.
        """
        entries: dict[str, dict[str, Any]] = {
            name: {"size": path.stat().st_size, "sha256": sha256(path)}
            for name, path in files.items()
        }
        root = f"{self.root}/{version}"
        self.storage.abort_uploads(f"{root}/")
        size = sum(entry["size"] for entry in entries.values()) / 2**20
        with task(f"version {version}", size, "MiB") as advance:
            for name, path in files.items():
                digest = entries[name]["sha256"]
                if not self._write_once(path, f"{root}/{name}", digest, advance):
                    raise self.taken(version)
        manifest = {"name": self.name, "version": version, "time": now(), **facts}
        try:
            body = _json({**manifest, "files": entries})
            self.storage.put(f"{root}/{MANIFEST}", body, replacing=None)
        except Conflict:
            if self.manifest(version)["files"] != entries:
                raise self.taken(version) from None

    def fetch(self, version: str, path: Path, name: str = ARCHIVE) -> None:
        """Downloads a version's archive, or another of its files, whole or not at all.

        Raises:
            UnavailableError: it is not there, or not what its manifest says.
        """
        expected = self.manifest(version)["files"][name]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with task(f"fetch {version}", expected["size"] / 2**20, "MiB") as advance:
                self.storage.fetch(f"{self.root}/{version}/{name}", part, advance)
            if sha256(part) != expected["sha256"]:
                raise UnavailableError(f"{self.uri(version)}: {name} is damaged there")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

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

    def _channel_key(self, channel: str) -> str:
        return f"{self.root}/{CHANNELS}/{channel}.json"


def _history(current: Channel | None, *, rolled_back: bool) -> list[dict[str, Any]]:
    """What a channel remembers once something else takes the place of `current`."""
    if current is None:
        return []
    entry = {key: current.content[key] for key in ("version", "sha256", "time")}
    if rolled_back:
        entry["rolled_back"] = True
    return [entry, *current.content["history"]][:HISTORY]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
