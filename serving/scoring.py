"""Many pictures at once, without a service: their answers go to Parquet files.

A picture that has a row is not scored again, so the same command resumes after a kill, and scores
only what has been added since.

What is in memory is bounded whatever the number of pictures: some batches of them, the rows of one
part, and 8 bytes for each picture that is done.
"""

import hashlib
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, ENXIO
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from serving import s3
from serving.ahead import mapped
from serving.answers import SCHEMA, Row, ScoringError, SourceError, opened
from serving.archive import Description
from serving.files import text
from serving.images import SUFFIXES, ImageError, decode, to_pixels
from serving.messages import Request
from serving.predictor import Predictor
from serving.progress import log, task
from serving.tar import opened as opened_tar

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # whatever is left in them
# Errors of one file alone. Others are of the disk or the share as a whole, and may pass.
OF_THE_FILE = (None, ENOENT, ENOTDIR, EISDIR, EACCES, ENAMETOOLONG, ELOOP, ENXIO)
ROWS = 5000  # in a part, at most
SECONDS = 60.0  # of work in a part, at most: what a kill may cost
BATCH = 4  # pictures that a thread takes at once
AHEAD = 2  # batches for each thread that wait for it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """A picture to be scored, wherever that is done."""

    path: str
    """What its row calls it."""
    place: str = ""
    """Of its file, absolute or `s3://…`."""
    content: bytes | None = None
    """Of what has no file of its own."""

    def read(self) -> bytes:
        """
        Raises:
            OSError: it cannot be read.
            SourceError: storage, the disk or the share fails, which no row should hide.
        """
        if self.content is not None:
            return self.content
        if self.place.startswith(s3.SCHEME):
            content = s3.get(self.place, SourceError)
            if content is None:
                raise FileNotFoundError("vanished")  # since it was listed
            return content
        try:
            return Path(self.place).read_bytes()
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise SourceError(f"{text(self.place)}: {error.strerror}") from None
            raise


@dataclass
class Summary:
    """What one call has done."""

    done: int = 0
    skipped: int = 0
    """Pictures that the output had already."""
    seconds: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[Row]) -> None:
        self.done += len(rows)
        self.labels.update(row["label"] for row in rows if row["error"] is None)
        self.errors.update(row["error"] for row in rows if row["error"] is not None)

    def text(self) -> str:
        """A few lines for a person."""
        rate = f"{self.done / self.seconds:.1f} images/s" if self.done else "nothing new"
        lines = [f"{self.done:,} scored, {rate}; {self.skipped:,} were there already"]
        lines += [f"  {count:,} {label}" for label, count in self.labels.most_common()]
        refused = [f"  {count:,} refused: {error}" for error, count in self.errors.most_common()]
        return "\n".join(lines + refused)


def pictures(source: str) -> Iterator[Item]:
    """The pictures of a folder (and those below it), a tar file, an S3 prefix, or a list: a text
    file with a path a line, relative to its folder; or one picture. In the same order each time.

    Raises:
        ScoringError: there is no such source, or it is damaged.
    """
    return _found(source)[1]


def _found(source: str, say: Say = log) -> tuple[str, Iterator[Item]]:
    """The origin, which the names of a source's pictures are relative to, and these pictures."""
    path = Path(source).absolute()
    if source.startswith(s3.SCHEME):
        return s3.SCHEME, _in_s3(source)
    if path.is_dir():
        return str(path), _in_folder(path, say)
    if not path.is_file():
        raise ScoringError(f"{source}: no such folder or file")
    if path.name.lower().endswith(SUFFIXES):
        return str(path.parent), iter([Item(text(path.name), str(path))])
    if path.name.lower().endswith(TARS) or tarfile.is_tarfile(path):
        return str(path), _in_tar(path, say)
    return str(path.parent), _in_list(path)


def _in_list(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in filter(None, map(str.strip, lines)):
            if "\0" in line:
                raise ScoringError(f"{path}: neither a picture, a tar file nor a list of files")
            yield Item(text(line), line if line.startswith(s3.SCHEME) else str(path.parent / line))


def _in_folder(folder: Path, say: Say) -> Iterator[Item]:
    links = 0
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders.sort()
        links += sum((Path(parent) / name).is_symlink() for name in folders)
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                file = Path(parent) / name
                yield Item(text(file.relative_to(folder).as_posix()), str(file))
    if links:  # one may lead back to where it is
        say(f"{folder}: passed over {links:,} links to folders")


def _refuse(error: OSError) -> None:
    """A folder that cannot be read would be passed over in silence."""
    raise SourceError(f"{text(error.filename)}: {error.strerror}")


def _in_tar(path: Path, say: Say) -> Iterator[Item]:
    links = 0
    try:
        with opened_tar(path) as tar:
            for member in tar:
                if not member.name.lower().endswith(SUFFIXES):
                    continue
                if member.isreg() and (content := tar.extractfile(member)):
                    yield Item(text(member.name), content=content.read())
                links += member.issym() or member.islnk()
    except tarfile.TarError as error:
        raise ScoringError(f"{path}: damaged: {error}") from None
    if links:  # one may lead anywhere in a file that is read from its start to its end
        say(f"{path}: passed over {links:,} links")


def _in_s3(source: str) -> Iterator[Item]:
    bucket, _ = s3.place(source)
    for key in s3.keys(source, SourceError):
        if key.lower().endswith(SUFFIXES):
            address = f"{s3.SCHEME}{bucket}/{key}"
            yield Item(address, address)


def score(predictor: Predictor, source: str, target: Path | str, threads: int) -> Summary:
    """:func:`collect` of what this process answers."""
    work = partial(in_order, predictor=predictor, threads=threads)
    return collect(predictor.description, source, target, work)


def collect(
    model: Description,
    source: str,
    target: Path | str,
    work: Callable[[Iterator[Item]], Iterator[list[Row]]],
) -> Summary:
    """Writes a row for every picture of the source that the target does not have yet.

    Args:
        model: what answers.
        target: a folder, or `s3://bucket/prefix`.
        work: gives each picture's row, some at a time, in any order.

    Raises:
        ScoringError: see :func:`pictures` and :func:`opened`; or the work's own.
    """
    summary, start = Summary(), time.monotonic()
    origin, items = _found(source)
    with opened(target, about(model, origin)) as kept:
        done = kept.done()
        to_do = 0
        with suppress(ScoringError):  # it comes again, after the pictures that can be read
            for item in _found(source, say=lambda line: None)[1]:
                to_do += item.path not in done

        def missing() -> Iterator[Item]:
            for item in items:
                if item.path in done:
                    summary.skipped += 1
                else:
                    yield item

        rows: list[Row] = []
        written = time.monotonic()
        try:
            with task("score", to_do) as advance:
                for batch in work(missing()):
                    rows += batch
                    summary.add(batch)
                    advance(len(batch))
                    if len(rows) >= ROWS or time.monotonic() > written + SECONDS:
                        kept.add(rows)
                        rows, written = [], time.monotonic()
        finally:  # what was answered before the source failed, too
            if rows:
                kept.add(rows)
    summary.seconds = time.monotonic() - start
    return summary


def in_order(items: Iterable[Item], predictor: Predictor, threads: int) -> Iterator[list[Row]]:
    """Rows of all items, a batch at a time; no more are read than the threads soon take."""
    items = iter(items)
    batches = iter(lambda: list(islice(items, BATCH)), [])
    with ThreadPoolExecutor(threads) as pool:
        yield from mapped(pool, partial(answers, predictor), batches, AHEAD * threads + 1)


def answers(predictor: Predictor, items: Sequence[Item]) -> list[Row]:
    """A row for every item, be it an error; the pictures go through the network together."""
    rows, pixels = [], []
    about = {"model": predictor.model["name"], "version": predictor.model["version"]}
    for item in items:
        row: Row = dict.fromkeys(SCHEMA.names)
        row |= {"path": item.path, **about}
        try:
            data = item.read()
            row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            picture = decode(data)
            row |= {"width": picture.width, "height": picture.height}
            pixels.append(to_pixels(picture, predictor.size))
        except ImageError as error:
            row["error"] = str(error)
        except OSError as error:
            row["error"] = f"not readable: {error.strerror or error}"
        rows.append(row)
    if pixels:
        found = predictor.find(np.stack(pixels))
        good = [row for row in rows if row["error"] is None]
        for index, row in enumerate(good):
            answer = predictor.answer(Request([]), found.part(index, index + 1))
            row |= {key: answer[key] for key in ("label", "probability", "familiarity", "top")}
    return rows


def about(model: Description, origin: str) -> dict[str, str]:
    """What all rows of a folder have in common. The digest is there because the name of a version
    is that of a run, which may be used again; the origin, because the names in rows are relative to
    it. Fields that later versions of this program add to descriptions do not change the digest."""
    digest = hashlib.sha256(model.model_dump_json(exclude_unset=True).encode()).hexdigest()
    return {"name": model.name, "version": model.version, "model": digest, "pictures": origin}
