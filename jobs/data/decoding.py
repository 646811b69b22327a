"""Picture files decoded once, into memory maps that stay in the cache."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs import config, interruption
from jobs.data.images import Images
from jobs.errors import UnavailableError
from serving import files
from serving.images import ImageError, decode, to_pixels
from serving.progress import task

CACHE_VERSION = 1  # to be raised when decoding gives other pixels than before
DECODING_AHEAD = 64  # pictures that wait decoded for the disk; 268 KB each at 299 pixels

T = TypeVar("T")


def decoded(
    listing: list[tuple[Path, os.stat_result]], classes: Sequence[str], settings: config.Data
) -> tuple[Images, list[str]]:
    """The pictures of a listing and the skipped files, from the cache where it has them."""
    versions = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in listing]
    key = json.dumps([CACHE_VERSION, versions, list(classes), settings.input_size])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = Path(settings.cache).expanduser()
    pixels_file, notes_file = cache / f"folder-{digest}.npy", cache / f"folder-{digest}.json"
    if not notes_file.is_file():
        paths = [path for path, _ in listing]
        with files.replacing(pixels_file) as part:
            notes = _decode_all(paths, classes, settings.input_size, part)
        files.write(notes_file, json.dumps(notes))
    notes = json.loads(notes_file.read_text())
    array = np.load(pixels_file, mmap_mode="c")[: len(notes["labels"])]
    pixels, labels = torch.from_numpy(array), torch.tensor(notes["labels"])
    names = np.array(_kept([path for path, _ in listing], notes["skipped"]), dtype=object)
    return Images.all(pixels, labels, settings, pixels_file, names), notes["skipped"]


def _kept(paths: Sequence[Path], skipped: Sequence[str]) -> list[str]:
    """Names, as split/class/file, of the pictures that were decoded, in their order."""
    damaged = deque(skipped)
    names = []
    for path in paths:
        if damaged and damaged[0].startswith(f"{path}: "):
            damaged.popleft()
        else:
            names.append("/".join(path.parts[-3:]))
    return names


def _decode_all(
    paths: Sequence[Path], classes: Sequence[str], input_size: int, target: Path
) -> dict[str, Any]:
    """Writes the pixels of all readable pictures to `target`, rows of skipped ones left last."""
    with ThreadPoolExecutor() as pool:
        sizes = {size for size in _mapped(pool, _header_size, paths) if size is not None}
        width, height = sizes.pop() if len(sizes) == 1 else (input_size, input_size)
        if max(width, height) > input_size:
            width = height = input_size
        shape = (len(paths), 3, height, width)
        array = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
        labels: list[int] = []
        skipped: list[str] = []
        decoded = _mapped(pool, lambda path: _read(path, (height, width)), paths)
        for path, result in zip(paths, _watched(decoded, len(paths)), strict=True):
            if isinstance(result, ImageError):
                skipped.append(f"{path}: {result}")
            else:
                array[len(labels)] = result
                labels.append(classes.index(path.parent.name))
        array.flush()
    present = {paths[0].parent.parent / classes[label] for label in set(labels)}
    if empty := sorted({path.parent for path in paths} - present):
        raise UnavailableError(f"{empty[0]}: not one readable picture, {skipped[0]}")
    return {"labels": labels, "skipped": skipped}


def _mapped(
    pool: ThreadPoolExecutor, work: Callable[[Path], T], paths: Sequence[Path]
) -> Iterator[T]:
    """As `pool.map`, which would go through all paths whether or not the results are taken."""
    waiting = deque(pool.submit(work, path) for path in paths[:DECODING_AHEAD])
    for path in paths[DECODING_AHEAD:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(work, path))
    while waiting:
        yield waiting.popleft().result()


def _watched(
    results: Iterator[NDArray[np.uint8] | ImageError], total: int
) -> Iterator[NDArray[np.uint8] | ImageError]:
    with task("decoding", total) as advance:
        for result in results:
            interruption.check()
            advance(1)
            yield result


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # _read says what is wrong with it


def _read(path: Path, size: tuple[int, int]) -> NDArray[np.uint8] | ImageError:
    """uint8 [3, H, W], or why there are none."""
    try:
        return to_pixels(decode(path.read_bytes()), size)
    except ImageError as error:
        return error
