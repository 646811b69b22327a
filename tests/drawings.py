"""Picture files that tests draw."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def photo(path: Path, size: tuple[int, int] = (32, 32), mode: str = "RGB", seed: int = 0) -> None:
    """Noise, as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), np.uint8)
    Image.fromarray(noise.squeeze(), mode=None).save(path)


def make_photos(
    root: Path, *, train: int = 10, test: int = 3, size: tuple[int, int] = (90, 60)
) -> None:
    """A folder of two classes, as `data.source: folder` wants it."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                photo(root / split / name / f"{i}.png", size, seed=100 * label + i)


def bomb(side: int) -> bytes:
    """A PNG header that promises `side`² pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
