"""Images of a split, and batches of them made on the device.

Images keep their stored size until a batch of them is on the device; there it is shifted,
mirrored, scaled and normalised.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from jobs import config
from jobs.data.index import Held
from jobs.seeds import generator
from serving.ahead import mapped

RESIDENT_SHARE = 0.25  # of the free device memory that the pixels of all splits may take
MOVED = 1000  # images at once, on their way to where they stay
AHEAD = 2  # batches of other pixels that are on their way to the device while one is used


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


@dataclass(frozen=True)
class Images:
    """Images of one split: rows of an array that splits share without copies."""

    pixels: Tensor  # uint8 [M, 3, H, W], possibly a memory map
    rows: Tensor  # int64 [N], into pixels
    labels: Tensor  # int64 [N]
    settings: config.Data
    file_digests: NDArray[np.uint8] | None = None  # [N, 32], SHA-256 of pictures' files
    file: Held | None = None  # of a store, whose memory map the pixels are

    @staticmethod
    def all(pixels: Tensor, labels: Tensor, settings: config.Data) -> "Images":
        """A row for every label."""
        return Images(pixels, torch.arange(len(labels)), labels, settings)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device, *, resident: bool = True) -> "Images":
        """Moves labels, and to a GPU the pixels too if they are to stay there; otherwise batches
        move one by one."""
        pixels, rows = self.pixels, self.rows
        if device.type == "cuda" and resident:
            pixels, rows = self._moved(device), torch.arange(len(rows), device=device)
        return replace(self, pixels=pixels, rows=rows, labels=self.labels.to(device))

    def _moved(self, device: torch.device) -> Tensor:
        """The pixels of this split alone, uint8 [N, 3, H, W]."""
        moved = torch.empty(len(self), *self.pixels.shape[1:], dtype=torch.uint8, device=device)
        for part, rows in zip(moved.split(MOVED), self.rows.split(MOVED), strict=True):
            part.copy_(self.pixels.index_select(0, rows))
        return moved

    def take(self, positions: Tensor) -> "Images":
        """The images at int64 `positions`; no pixel is copied."""
        digests = self.file_digests
        if digests is not None:
            digests = digests[positions.cpu().numpy()]
        rows, labels = self.rows[positions], self.labels[positions]
        return replace(self, rows=rows, labels=labels, file_digests=digests)

    def digests(self) -> NDArray[np.uint8]:
        """uint8 [N, 32]: SHA-256 of each picture, of its file if it has one, else of its pixels."""
        if self.file_digests is not None:
            return self.file_digests
        parts = (self.pixels[rows].cpu().numpy() for rows in self.rows.split(MOVED))
        found = b"".join(sha256(image.tobytes()).digest() for part in parts for image in part)
        return np.frombuffer(found, np.uint8).reshape(-1, 32)

    def raw(self, batch: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], as stored, on the device of the labels."""
        rows = self.rows[batch.to(self.rows.device)]
        return self.pixels[rows].to(self.labels.device)

    def batches(
        self, parts: Sequence[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [B, 3, S, S], augmented by `draws` if given, and labels int64 [B], one
        part at a time.

        Args:
            parts: positions, int64 [B] each, on the device.
        """
        if self.pixels.device == self.labels.device:
            pictures: Iterable[Tensor] = map(self.raw, parts)
        else:
            rows = [self.rows[part.cpu()] for part in parts]
            pictures = prefetched(self.pixels, rows, self.labels.device)
        for part, x_NCHW in zip(parts, pictures, strict=True):
            yield self.prepare(x_NCHW, part, draws), self.labels[part]

    def prepare(self, x_NCHW: Tensor, batch: Tensor, draws: Draws | None = None) -> Tensor:
        """Network inputs of the images of `batch`: float32 [B, 3, S, S], channels last."""
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
        down, right = (round(self.settings.shift * side) for side in self.pixels.shape[-2:])
        halves = torch.rand(count, generator=generator(seed)) < 0.5
        flip = (halves ^ bool(epoch % 2)) & self.settings.flip
        drawing = generator(seed, epoch)
        if down == right:
            shift = torch.randint(-down, down + 1, (count, 2), generator=drawing)
        else:
            each = (torch.randint(-r, r + 1, (count,), generator=drawing) for r in (down, right))
            shift = torch.stack([*each], dim=1)
        return Draws(epoch, flip, shift).to(self.labels.device)


def fit_on(device: torch.device, splits: Iterable[Images]) -> bool:
    """Whether a GPU has room for all pixels beside what training takes."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(len(images) * images.pixels[:1].nbytes for images in splits)
    return needed <= RESIDENT_SHARE * free


def prefetched(pixels: Tensor, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Rows of `pixels` on the device, a batch at a time, with prefetching of the next ones.

    A thread gathers them into pinned memory and copies on a stream of its own, so that neither the
    host nor the computing stream waits.

    Args:
        pixels: uint8 [M, 3, H, W] on the CPU.
        batches: int64 [B] each, on the CPU.
    """
    copying = _copying(device) if device.type == "cuda" else None

    def load(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        shape, pinned = (len(rows), *pixels.shape[1:]), copying is not None
        pictures = torch.empty(shape, dtype=pixels.dtype, pin_memory=pinned)
        torch.index_select(pixels, 0, rows, out=pictures)  # ten times as fast as pixels[rows]
        if copying is None:
            return pictures, None
        with torch.cuda.stream(copying):
            return pictures.to(device, non_blocking=True), copying.record_event()

    # A new thread's own device is the first one, where each process would then take some memory.
    own = () if copying is None else (torch.cuda.set_device, (device,))
    with ThreadPoolExecutor(1, "copying", *own) as thread:
        for pictures, copied in mapped(thread, load, batches, AHEAD + 1):
            if copied is not None:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(copied)
                pictures.record_stream(computing)  # or its memory might be reused too early
            yield pictures


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps the memory of each stream for itself."""
    return torch.cuda.Stream(device)


def augment(x_NCHW: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """Mirrors and translates each image in one gather; what a shift uncovers repeats the edge.

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


def to_input(images: Tensor, size: int, normalization: str = "inception") -> Tensor:
    """Scales images to the network's input.

    Args:
        images: uint8 or float [N, 3, H, W] with values 0 to 255.
        size: side of the result in pixels.
        normalization: `inception` for values in [-1, 1], which is what Inception-v3's published
            weights were trained with; `unit` for [0, 1].

    Returns:
        float32 [N, 3, size, size], bilinear, antialiased when it shrinks.
    """
    x_NCHW = images.float()
    height, width = x_NCHW.shape[-2:]
    if (height, width) != (size, size):
        shrinks = height > size or width > size
        x_NCHW = F.interpolate(
            x_NCHW, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
        )
    if normalization == "unit":
        return x_NCHW / 255
    return x_NCHW / 127.5 - 1


def stratified(
    labels: Tensor, count: int, seed: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Splits positions of `labels` into `count` drawn by class, and the rest; both sorted.

    Every class gives its share to within one image (Hamilton's method of largest remainders).

    Args:
        order: int64 [N], in which positions are drawn; by the seed when absent.
    """
    products = labels.bincount() * count
    quotas = products // max(1, len(labels))
    largest = (products % max(1, len(labels))).argsort(descending=True, stable=True)
    quotas[largest[: count - int(quotas.sum())]] += 1

    if order is None:
        order = torch.randperm(len(labels), generator=generator(seed, count))
    order = order[labels[order].argsort(stable=True)]  # by class, and as drawn within each
    by_class = labels[order]
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[by_class]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[order[place < quotas[by_class]]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)
