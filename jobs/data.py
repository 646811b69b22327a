"""Sources of pictures, their splits, and batches made on the device.

Every source ends as `uint8 [N, 3, H, W]` pixels, `int64 [N]` labels and class names. Pictures
stay as small as they came until a batch of them is on the device; there it is shifted, mirrored,
scaled and normalised.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jobs import config, digits, generated, interruption
from jobs.errors import ConfigurationError, UnavailableError
from jobs.preprocessing import to_input
from jobs.progress import log, task
from jobs.results import Facts
from serving.archive import Counts
from serving.images import ImageError, decode, to_pixels

TEST_SHARE = 0.2  # of a folder that has no test/
CACHE_VERSION = 1  # to be raised when decoding gives other pixels than before
RESIDENT_SHARE = 0.4  # of the free device memory that pixels may take
AHEAD = 2  # batches of other pixels that are on their way to the device
DECODING_AHEAD = 64  # pictures that wait decoded for the disk; 268 KB each at 299 pixels

T = TypeVar("T")


@dataclass(frozen=True)
class Draws:
    """One epoch's random choices, an entry an image, the same however the epoch is batched."""

    epoch: int
    flip: Tensor  # bool [N]
    shift: Tensor  # int64 [N, 2], pixels down and right

    @staticmethod
    def none(count: int) -> "Draws":
        """Leaves `count` images as they are."""
        flip, shift = torch.zeros(count, dtype=torch.bool), torch.zeros(count, 2, dtype=torch.int64)
        return Draws(0, flip, shift)

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.epoch, self.flip.to(device), self.shift.to(device))


class Examples(Protocol):
    """What the training loop and the evaluation need of data."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the device."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self, parts: Sequence[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the network, augmented by `draws` if given, and labels, one part at a time.

        Args:
            parts: positions, int64 [B] each, on the device.
        """
        ...

    def draws(self, seed: int, epoch: int) -> Draws: ...


@dataclass(frozen=True)
class Images:
    """Pictures of one split: rows of an array that splits share and nothing copies."""

    pixels: Tensor  # uint8 [M, 3, H, W], possibly a memory map
    rows: Tensor  # int64 [N], into pixels
    labels: Tensor  # int64 [N]
    settings: config.Data
    file: Path | None = None  # in the cache, whose memory map the pixels are

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Images":
        """Moves labels, and the pixels too where they fit; otherwise batches move one by one."""
        pixels, rows = self.pixels, self.rows
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if pixels.nbytes <= RESIDENT_SHARE * free:
                pixels, rows = pixels.to(device), rows.to(device)
        return replace(self, pixels=pixels, rows=rows, labels=self.labels.to(device))

    def take(self, positions: Tensor) -> "Images":
        """The images at int64 `positions`; no pixel is copied."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    @property
    def resident(self) -> bool:
        """Whether the pixels are where the labels are."""
        return self.pixels.device == self.labels.device

    def raw(self, batch: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], as they came, on the device of the labels."""
        rows = self.rows[batch.to(self.rows.device)]
        return self.pixels[rows].to(self.labels.device)

    def batches(
        self, parts: Sequence[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [B, 3, S, S] and labels int64 [B], one part at a time."""
        if self.resident:
            pictures: Iterable[Tensor] = map(self.raw, parts)
        else:
            rows = [self.rows[part.cpu()] for part in parts]
            pictures = prefetched(self.pixels, rows, self.labels.device)
        for part, x_NCHW in zip(parts, pictures, strict=True):
            yield self.prepare(x_NCHW, part, draws), self.labels[part]

    def prepare(self, x_NCHW: Tensor, batch: Tensor, draws: Draws | None = None) -> Tensor:
        """Network inputs of the pictures of `batch`: float32 [B, 3, S, S], channels last."""
        if draws is not None:
            x_NCHW = augment(x_NCHW, draws.flip[batch], draws.shift[batch])
        x_NCHW = to_input(x_NCHW, self.settings.input_size, self.settings.normalization)
        return x_NCHW.contiguous(memory_format=torch.channels_last)

    def draws(self, seed: int, epoch: int) -> Draws:
        """Mirrors alternate: a random half in epoch 0, the other half in epoch 1, and so on.

        The alternation is Keller Jordan's (airbench, arXiv 2404.00498): every image is seen
        both ways in any two epochs.
        """
        count = len(self)
        side = self.pixels.shape[-1]
        reach = round(self.settings.shift * side)
        halves = torch.rand(count, generator=generator(seed)) < 0.5
        flip = (halves ^ bool(epoch % 2)) & self.settings.flip
        shift = torch.randint(-reach, reach + 1, (count, 2), generator=generator(seed, epoch))
        return Draws(epoch, flip, shift).to(self.labels.device)


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no picture, and what to tell about them."""

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    description: Facts

    def to(self, device: torch.device) -> "Dataset":
        train, test = self.train.to(device), self.test.to(device)
        labels = self.validation.labels.to(device)
        validation = replace(self.validation, pixels=train.pixels, labels=labels)
        validation = replace(validation, rows=validation.rows.to(train.rows.device))
        return replace(self, train=train, validation=validation, test=test)


@dataclass(frozen=True)
class Source:
    """A data set as it was found, before subsets and splits."""

    train: Images
    test: Images
    classes: tuple[str, ...]
    name: str
    skipped: list[str] = field(default_factory=list)


def generator(*seeds: int | str) -> torch.Generator:
    """A random generator of its own for every combination of `seeds`."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def prefetched(pixels: Tensor, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Rows of `pixels` on the device, a batch at a time, the next ones on their way meanwhile.

    A thread gathers them into pinned memory and copies on a stream of its own, so that neither the
    host nor the computing stream waits.

    Args:
        pixels: uint8 [M, 3, H, W] on the CPU.
        batches: int64 [B] each, on the CPU.
    """
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        pictures = pixels[rows]
        if copying is None:
            return pictures, None
        with torch.cuda.stream(copying):
            pictures = pictures.pin_memory().to(device, non_blocking=True)
            return pictures, copying.record_event()

    with ThreadPoolExecutor(1) as thread:
        loading = deque(thread.submit(load, rows) for rows in batches[:AHEAD])
        for following in [*batches[AHEAD:], *[None] * len(loading)]:
            pictures, copied = loading.popleft().result()
            if following is not None:
                loading.append(thread.submit(load, following))
            if copied is not None:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(copied)
                pictures.record_stream(computing)  # or its memory might be reused too early
            yield pictures


def augment(x_NCHW: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """Mirrors and translates each picture in one gather; what a shift uncovers repeats the edge.

    Args:
        x_NCHW: [B, 3, H, W], any dtype.
        flip: bool [B].
        shift: int64 [B, 2], pixels down and right.
    """
    count, _, height, width = x_NCHW.shape
    device = x_NCHW.device
    ys = (torch.arange(height, device=device) - shift[:, :1]).clamp(0, height - 1)
    xs = (torch.arange(width, device=device) - shift[:, 1:]).clamp(0, width - 1)
    xs = torch.where(flip[:, None], width - 1 - xs, xs)
    picture = torch.arange(count, device=device)[:, None, None]
    x_NHWC = x_NCHW[picture, :, ys[:, :, None], xs[:, None, :]]
    return x_NHWC.permute(0, 3, 1, 2)


def load(settings: config.Data) -> Dataset:
    """Loads the configured source, draws its subsets and takes validation out of training.

    Raises:
        UnavailableError: the data cannot be reached or read.
        ConfigurationError: it does not have as many images as were asked for.
    """
    sources = {"cifar10": cifar10, "folder": folder, "digits": handwritten, "generated": draw}
    source = sources[settings.source](settings)
    train = _subset(source.train, settings.train_images, "train_images")
    test = _subset(source.test, settings.test_images, "test_images")
    share = round(settings.validation * len(train))
    held_out, kept = stratified(train.labels, share, settings.seed)
    validation, train = train.take(held_out), train.take(kept)
    height, width = train.pixels.shape[-2:]
    description = Facts(
        source=source.name,
        classes=tuple(source.classes),
        images=Counts(train=len(train), validation=len(validation), test=len(test)),
        image_size=(height, width),
        test_digest=_digest(test),
        skipped=tuple(source.skipped),
    )
    return Dataset(train, validation, test, source.classes, description)


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions of `labels` into `count` drawn by class, and the rest; both sorted.

    Every class gives its share to within one image (Hamilton's method of largest remainders).
    """
    products = labels.bincount() * count
    quotas = products // max(1, len(labels))
    largest = (products % max(1, len(labels))).argsort(descending=True, stable=True)
    quotas[largest[: count - int(quotas.sum())]] += 1

    order = torch.randperm(len(labels), generator=generator(seed, count))
    by_class = [order[labels[order] == label][:quota] for label, quota in enumerate(quotas)]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[torch.cat(by_class)] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)


def _subset(images: Images, count: int | None, key: str) -> Images:
    if count is None:
        return images
    if count > len(images):
        raise ConfigurationError(f"data.{key}: {count} asked for, the data has {len(images)}")
    return images.take(stratified(images.labels, count, images.settings.seed)[0])


def _all(pixels: Tensor, labels: Tensor, settings: config.Data) -> Images:
    return Images(pixels, torch.arange(len(labels)), labels, settings)


def _digest(images: Images) -> str:
    """SHA-256 of labels and pixels, kept beside pixels that are kept, which may be many."""
    if images.file is None:
        return _computed_digest(images)
    chosen = hashlib.sha256(images.rows.numpy().tobytes() + images.labels.numpy().tobytes())
    note = images.file.with_suffix(f".{chosen.hexdigest()[:16]}.sha256")
    if not note.is_file():
        part = note.with_suffix(f".{os.getpid()}.part")
        part.write_text(_computed_digest(images))
        part.replace(note)
    return note.read_text()


def _computed_digest(images: Images) -> str:
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    for rows in images.rows.split(1000):
        digest.update(images.pixels[rows].numpy().tobytes())
    return digest.hexdigest()


def draw(settings: config.Data) -> Source:
    """The generated target task; see :mod:`jobs.generated`."""
    train_count, test_count = settings.train_images or 240, settings.test_images or 200
    target = generated.TARGET
    train = _all(*target.draw(train_count, settings.input_size, seed=settings.seed), settings)
    test = _all(*target.draw(test_count, settings.input_size, seed=settings.seed + 1), settings)
    return Source(train, test, target.classes, f"generated ({target.name})")


def handwritten(settings: config.Data) -> Source:
    """Handwritten digits; see :mod:`jobs.digits`. A third of them are the test set."""
    whole = _all(*digits.handwritten(), settings)
    picked, rest = stratified(whole.labels, len(whole) // 3, settings.seed)
    train, test = whole.take(rest), whole.take(picked)
    return Source(train, test, tuple("0123456789"), "handwritten digits (scikit-learn)")


def draw_source_task(stand_in: config.StandIn, settings: config.Data) -> Images:
    """The pictures that stand-in weights are trained on."""
    if stand_in.task == "characters":
        drawn = digits.printed(stand_in.images, seed=settings.seed)
    else:
        drawn = generated.SOURCE.draw(stand_in.images, settings.input_size, seed=settings.seed)
    return _all(*drawn, settings)


def cifar10(settings: config.Data) -> Source:
    """torchvision's CIFAR-10, downloaded once and checked against its published digest."""
    from torchvision.datasets import CIFAR10

    root = Path(settings.root or settings.cache).expanduser()
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"CIFAR-10 could not be had ({error}); put cifar-10-python.tar.gz into {root}, or use "
            "--set data.source=generated"
        ) from None
    train, test = (
        _all(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            settings,
        )
        for part in parts
    )
    return Source(train, test, tuple(parts[0].classes), "CIFAR-10")


def folder(settings: config.Data) -> Source:
    """`train/<class>/*` and `test/<class>/*`; without `test/` a fifth of train, by class.

    Pictures that are all of one size no larger than the network's input keep it; others are
    scaled to the input once. Decoded pixels are kept as memory maps in `data.cache`, under a
    digest of every file's name, size and time. Damaged pictures are skipped, counted and listed.
    """
    root = Path(settings.root or "").expanduser()
    files, classes = _list_images(root / "train")
    train, skipped = _decoded(files, classes, settings)
    if (root / "test").is_dir():
        files, test_classes = _list_images(root / "test")
        if strangers := sorted(set(test_classes) - set(classes)):
            raise UnavailableError(f"{root}/test has classes that train has not: {strangers}")
        test, skipped_in_test = _decoded(files, classes, settings)
        skipped += skipped_in_test
    else:
        share = round(TEST_SHARE * len(train))
        picked, rest = stratified(train.labels, share, settings.seed)
        test, train = train.take(picked), train.take(rest)
    if skipped:
        log(f"skipped {len(skipped)} damaged pictures, the first: {skipped[0]}")
    return Source(train, test, classes, f"folder {root.name}", skipped)


def _list_images(split: Path) -> tuple[list[tuple[Path, os.stat_result]], tuple[str, ...]]:
    if not split.is_dir():
        raise UnavailableError(f"{split}: no such folder; pictures go to {split}/<class>/")
    classes = tuple(sorted(d.name for d in split.iterdir() if d.is_dir() and d.name[0] != "."))
    files: list[tuple[Path, os.stat_result]] = []
    for name in classes:
        with os.scandir(split / name) as entries:
            found = [(Path(e.path), e.stat()) for e in entries if e.is_file() and e.name[0] != "."]
        if not found:
            raise UnavailableError(f"{split / name}: the class has no pictures")
        files += sorted(found)
    if len(classes) < 2:
        raise UnavailableError(f"{split}: two classes at least are needed, found {list(classes)}")
    return files, classes


def _decoded(
    files: list[tuple[Path, os.stat_result]], classes: Sequence[str], settings: config.Data
) -> tuple[Images, list[str]]:
    """The pictures of a listing and the skipped files, from the cache where it has them."""
    listing = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]
    key = json.dumps([CACHE_VERSION, listing, list(classes), settings.input_size])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = Path(settings.cache).expanduser()
    pixels_file, notes_file = cache / f"folder-{digest}.npy", cache / f"folder-{digest}.json"
    if not notes_file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        paths = [path for path, _ in files]
        part = cache / f"folder-{digest}.{os.getpid()}.part"
        try:
            notes = _decode_all(paths, classes, settings.input_size, part)
            part.replace(pixels_file)
            part.write_text(json.dumps(notes))
            part.replace(notes_file)
        finally:
            part.unlink(missing_ok=True)
    notes = json.loads(notes_file.read_text())
    array = np.load(pixels_file, mmap_mode="c")[: len(notes["labels"])]
    images = _all(torch.from_numpy(array), torch.tensor(notes["labels"]), settings)
    return replace(images, file=pixels_file), notes["skipped"]


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
