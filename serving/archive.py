"""The archive that is to be served: whole, one of ours, and what it says of itself."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

DESCRIPTION = "model.json"
GOLDEN = "golden.png"


class ModelError(RuntimeError):
    """The archive cannot be had or is not what it should be; one line that says which."""


@dataclass(frozen=True)
class Model:
    """An archive that has been looked into."""

    archive: Path
    name: str
    version: str
    classes: Sequence[str]
    golden: bytes
    """A picture …"""
    expected: dict[str, Any]
    """… and the answer to it: label, probability, tolerance."""


def open_model(path: Path, sha256: str | None = None) -> Model:
    """Checks the archive's digest, that it is whole, and that it is one of ours.

    Raises:
        ModelError: it is not.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    check_digest(path, sha256)
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ModelError(f"{path}: damaged at {damaged}")
            _refuse_outside(path, archive.namelist())
            description = json.loads(archive.read(DESCRIPTION))
            golden = archive.read(GOLDEN)
            return Model(
                path.resolve(),
                description["name"],
                description["version"],
                description["classes"],
                golden,
                description["golden"],
            )
    except (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: not a model archive: {error}") from None


def check_digest(path: Path, sha256: str | None) -> None:
    """Raises:
    ModelError: the file's SHA-256 is another one.
    """
    if sha256 is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ModelError(f"{path}: its SHA-256 is {digest}, not {sha256}")


def _refuse_outside(path: Path, names: Sequence[str]) -> None:
    """TorchServe unpacks it; nothing may land beside the folder that it unpacks to."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise ModelError(f"{path}: {name} would be unpacked outside of its folder")
