"""Tar files that are read once, from their start to their end."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class _Header(tarfile.TarInfo):
    """Python's reader takes a header that is damaged, or is not there, for the file's end: what
    follows would be missing, and nobody would know."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, compressed or not, whose members come in their order.

    Raises:
        tarfile.TarError: it is none, or cut short or damaged.
    """
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as tar:
            yield tar
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(str(error)) from None
