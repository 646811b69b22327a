"""Tar shards in the WebDataset layout: `KEY.jpg` and then `KEY.cls` or `KEY.json` in one file."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jobs.errors import UnavailableError
from serving.files import text
from serving.images import SUFFIXES
from serving.tar import opened

SUFFIX = ".tar"


def is_one(file: str) -> bool:
    return file.endswith(SUFFIX)


class Sample(NamedTuple):
    name: str
    """The picture's, within its shard; not fit for a path."""
    label: str
    data: bytes


def samples(file: Path, name: str) -> Iterator[Sample]:
    """All pictures of a shard with their labels; other kinds of files are passed over.

    A label is the text of `KEY.cls`, or what `KEY.json` has as `label` or as `cls`.

    Args:
        name: of the shard, for messages.

    Raises:
        UnavailableError: it is no whole tar file, or a picture has no label.
    """
    try:
        with opened(file) as shard:
            for _, members in groupby(_files(shard), lambda member: member[0]):
                yield from _sample(list(members), name)
    except tarfile.TarError as error:
        raise UnavailableError(f"{name}: not a whole tar file: {error}") from None


def _files(shard: tarfile.TarFile) -> Iterator[tuple[str, str, str, bytes]]:
    """Of each file: the key, which is its path up to the first dot of its name, the rest of the
    name, its path and its content."""
    for member in shard:
        content = shard.extractfile(member) if member.isreg() else None
        if content is not None:
            path = text(member.name)
            parent, slash, last = path.rpartition("/")
            stem, _, suffix = last.partition(".")
            if stem:  # else it is a hidden file, such as a Mac adds to every other
                yield parent + slash + stem, suffix.lower(), path, content.read()


def _sample(files: list[tuple[str, str, str, bytes]], name: str) -> Iterator[Sample]:
    contents = {suffix: data for _, suffix, _, data in files}
    pictures = [file for file in files if f".{file[1]}".endswith(SUFFIXES)]
    # Beside KEY.jpg, KEY.seg.png is a mask, and of no class.
    for key, _, path, data in [file for file in pictures if f".{file[1]}" in SUFFIXES] or pictures:
        label = _label(contents)
        if not label:
            raise UnavailableError(f"{name}: {key} has no label, in {key}.cls or {key}.json")
        yield Sample(path, label, data)


def _label(contents: dict[str, bytes]) -> str | None:
    try:
        if "cls" in contents:
            return contents["cls"].decode().strip()
        about = json.loads(contents.get("json", b"null"))
    except ValueError:
        return None
    label = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    return str(label) if isinstance(label, str | int | float) else None
