"""Where bulk scoring keeps its answers: Parquet files in a folder, or below a prefix in S3.

There are `part-00000.parquet` and so on, each written whole or not at all, and `_scoring.json`,
which says what model and what pictures they are of. Of two processes that write to one place one
is refused: in a folder by a lock, in S3 as soon as it would write another part than the other has
written, so that no picture gets two rows.
"""

import fcntl
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving import s3
from serving.ahead import mapped
from serving.files import PARTIAL, write

THREADS = 8  # that read parts at once
ABOUT = "_scoring.json"  # readers of Parquet pass over such names
PART = re.compile(r"part-(\d+).*\.parquet")

ENTRY = pa.struct([("label", pa.string()), ("probability", pa.float32())])
SCHEMA = pa.schema(
    [
        *(("path", pa.string()), ("label", pa.string()), ("probability", pa.float32())),
        ("familiarity", pa.float32()),
        *(("top", pa.list_(ENTRY)), ("model", pa.string()), ("version", pa.string())),
        *(("error", pa.string()), ("width", pa.int32()), ("height", pa.int32())),
        *(("bytes", pa.int64()), ("sha256", pa.string())),
    ]
)
"""Of a row; null where a picture that is refused has nothing to say. `bytes` and `sha256` are those
of the picture's file, `width` and `height` those of the upright picture, in pixels."""

Row = dict[str, Any]


class ScoringError(RuntimeError):
    """The source or the output cannot be used; one line that says why."""


class SourceError(ScoringError):
    """S3 does not answer, or not with these credentials; or a disk, or a cluster, does not."""


class Folder:
    """A folder of this machine or on a share; `str` gives its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the folder for this process while the block runs.

        Raises:
            ScoringError: another process writes there, or nobody may.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = (self.path / ".lock").open("w")
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ScoringError(f"{self}: {error.strerror}") from None
        with held as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScoringError(f"{self}: another process writes there") from None
            for left_behind in self.path.glob(PARTIAL):
                left_behind.unlink()
            yield

    def names(self) -> list[str]:
        """The file names of its parts.

        Raises:
            SourceError: it cannot be listed; a glob would take it for empty.
        """
        try:
            return [file.name for file in self.path.iterdir() if PART.fullmatch(file.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SourceError(f"{self}: {error.strerror}") from None

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        write(self.path / name, content)


class Bucket:
    """The same below a prefix in S3, where a file is written only if there is none of that name.

    Every method raises :class:`SourceError` when storage cannot be reached, or not with these
    credentials.
    """

    def __init__(self, uri: str) -> None:
        """
        Raises:
            ScoringError: it names no bucket.
        """
        self.bucket, prefix = s3.place(uri)
        if not uri.startswith(s3.SCHEME) or not self.bucket:
            raise ScoringError(f"{uri}: an output in S3 is written s3://bucket/prefix")
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"{s3.SCHEME}{self.bucket}/{self.prefix}"

    def __str__(self) -> str:
        return self.uri.rstrip("/")

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()  # S3 has no locks: see `write`

    def names(self) -> list[str]:
        return [
            name
            for key in s3.keys(f"{self.uri}part-", SourceError)
            if PART.fullmatch(name := key.removeprefix(self.prefix))
        ]

    def read(self, name: str) -> bytes | None:
        """
        Raises:
            SourceError: it is archived, or as of all methods.
        """
        try:
            return s3.get(f"{self.uri}{name}", SourceError)
        except PermissionError as error:
            raise SourceError(f"{self.uri}{name}: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        """
        Raises:
            SourceError: there is such a file, or as of all methods.
        """
        where = {"Bucket": self.bucket, "Key": f"{self.prefix}{name}"}
        try:
            with s3.explained(str(self), SourceError):
                put = s3.shared_client().put_object
                s3.settled(lambda: put(**where, Body=content, IfNoneMatch="*"))
        except s3.Conflict:
            if self.read(name) != content:  # else boto3 has sent it twice: an answer was lost
                raise SourceError(f"{self}: another process writes there") from None


class Done:
    """The paths that have a row, in 8 bytes each."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.digests = np.sort(np.fromiter(map(_digest, paths), np.uint64))

    def __contains__(self, path: str) -> bool:
        wanted = np.uint64(_digest(path))
        where = int(np.searchsorted(self.digests, wanted))
        return where < len(self.digests) and bool(self.digests[where] == wanted)


def _digest(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


Place = Folder | Bucket


class Answers:
    """The parts of one place: those that it had when this was made, and those added since."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.parts = sorted(place.names())

    def done(self) -> Done:
        """
        Raises:
            ScoringError: a part cannot be read.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            return Done(chain.from_iterable(mapped(pool, self._paths, self.parts, 2 * THREADS)))

    def _paths(self, part: str) -> list[str]:
        content = pa.BufferReader(self.place.read(part) or b"")
        try:
            table = pq.read_table(content, columns=["path"], page_checksum_verification=True)
            return list(table["path"].to_pylist())
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ScoringError(f"{self.place}/{part}: damaged: {reason}") from None

    def add(self, rows: Sequence[Row]) -> None:
        """Writes a part after the last one that is known here."""
        numbers = (int(found[1]) for name in self.parts if (found := PART.fullmatch(name)))
        name = f"part-{max(numbers, default=-1) + 1:05}.parquet"
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), file, write_page_checksum=True)
        self.place.write(name, file.getvalue())
        self.parts.append(name)


def at(target: Path | str) -> Place:
    """
    Raises:
        ScoringError: it is to be in S3, and names no bucket.
    """
    uri = str(target)
    return Bucket(uri) if uri.startswith("s3:") or "://" in uri else Folder(Path(target))


@contextmanager
def opened(target: Path | str, about: dict[str, str]) -> Iterator[Answers]:
    """Holds a place for one process, one model and one source of pictures.

    Args:
        about: what all its rows have in common.

    Raises:
        ScoringError: it has other answers, or as `held` and :func:`at`.
        SourceError: storage fails.
    """
    place = at(target)
    with place.held():
        try:
            said = json.loads(place.read(ABOUT) or b"{}")
            other = [f"{k} {said[k]}" for k in about if said.get(k, about[k]) != about[k]]
        except (ValueError, AttributeError):
            raise ScoringError(f"{place}/{ABOUT}: damaged") from None
        if other:
            raise ScoringError(
                f"{place}: holds other answers ({', '.join(other)}); take another folder"
            )
        if about.keys() - said.keys():  # a new place, or an older version's, which says less
            place.write(ABOUT, (json.dumps(about) + "\n").encode())
        yield Answers(place)
