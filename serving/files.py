"""Atomic file writes, folders for a while, and digests of files."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

PARTIAL = ".*.part*"  # what a process was writing that was killed; boto3 adds a suffix of its own
MARK = ".inception-transfer"  # in a temporary folder, which is of no more use once nobody holds it


def text(name: str) -> str:
    """A file's name as Parquet, JSON and SQLite take it, though it may not be in UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A disk that is full in this block says of which file, as the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place once the block is through and its
    content is on the disk; if the block fails, nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, content: bytes | str) -> None:
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def temporary(place: Path | None = None) -> Iterator[Path]:
    """A folder for the block. Those that killed processes left there are removed: a container that
    starts again finds the /tmp of the one before, and with it the unpacked archive.

    Args:
        place: the folder to make it in; by default the system's for such.
    """
    place = place and place.absolute()  # before Python 3.12 the folder would be relative, too
    with TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as name, ExitStack() as held:
        folder = Path(name)
        for mark in folder.parent.glob(f"*/{MARK}"):
            with suppress(OSError), _locked(mark.parent):  # BlockingIOError: its process lives
                shutil.rmtree(mark.parent)
        with suppress(OSError):  # NFS locks no folder: without a mark, others leave it alone
            held.enter_context(_locked(folder))
            (folder / MARK).touch()
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder for the block, or until this process is killed.

    Raises:
        OSError: another process has locked it, or others than this user may have written to it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
