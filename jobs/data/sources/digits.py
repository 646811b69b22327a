"""Small real pictures that need no download: handwritten digits, and printed characters as
the pretraining task.

The *target* is scikit-learn's copy of the digits of Alpaydin and Kaynak (1998, UCI), which comes
inside its wheel: 1,797 of them, 8×8 pixels with 17 shades. The *source task* that stand-in weights
are trained on is made in the same way from the fonts that matplotlib brings: a character on a
32×32 grid of ink or no ink, then how many points of each 4×4 block have ink.
"""

import string
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jobs import config
from jobs.data.images import Images, stratified
from jobs.data.sources import Source

PUBLISHED = True
SIDE = 8  # pixels of a picture
BLOCK = 4  # points of the grid in a pixel, across and down
FONT_SIZE = 64
CANVAS = 128
CHARACTERS = string.digits + string.ascii_uppercase
FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "SansMono-Oblique", "Serif", "Serif-Bold")


def load(settings: config.Data) -> Source:
    """Handwritten digits; see :mod:`jobs.data.sources.digits`. A third of them are the test set."""
    whole = Images.all(*handwritten(), settings)
    picked, rest = stratified(whole.labels, len(whole) // 3, settings.seed)
    train, test = whole.take(rest), whole.take(picked)
    return Source(train, test, tuple("0123456789"), "handwritten digits (scikit-learn)")


def check(settings: config.Data) -> tuple[bool, str]:
    return True, "digits, needs nothing"


def handwritten() -> tuple[Tensor, Tensor]:
    """Pictures uint8 [1797, 3, 8, 8], dark on light, and labels int64 [1797], the digits."""
    from sklearn.datasets import load_digits  # takes a second

    found = load_digits()
    return _pixels(found.images.astype(np.uint8)), torch.from_numpy(found.target).long()


def printed(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [count, 3, 8, 8] of printed digits and capitals, and their int64 labels, as
    many of each character as of any other."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CHARACTERS)
    shades = np.stack([_shades(CHARACTERS[label], rng) for label in labels])
    return _pixels(shades), torch.from_numpy(labels)


def _pixels(shades: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, 3, H, W] of uint8 [N, H, W], points with ink out of 16."""
    grey = 255 - np.round(shades * (255 / BLOCK**2)).astype(np.uint8)
    return torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)


def _shades(character: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 [8, 8], from 0 to 16: one character, turned, sheared and drawn in a random stroke."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    font, stroke = _font(str(rng.choice(FONTS))), int(rng.integers(1, 6))
    centre = (CANVAS // 2, CANVAS // 2)
    ImageDraw.Draw(canvas).text(
        centre, character, 255, font, anchor="mm", stroke_width=stroke, stroke_fill=255
    )
    turn, shear = np.radians(rng.uniform(-15, 15)), rng.uniform(-0.4, 0.4)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    matrix = matrix @ np.array([[1, shear], [0, 1]])
    offset = centre - matrix @ centre
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    canvas = canvas.transform(
        canvas.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    grid = SIDE * BLOCK
    width = int(rng.integers(grid // 2, grid + 1))
    glyph = canvas.crop(canvas.getbbox()).resize((width, grid))
    ink = np.zeros((grid, grid), dtype=np.uint8)
    left = (grid - width) // 2
    ink[:, left : left + width] = np.asarray(glyph) > 127
    shades: NDArray[np.uint8] = ink.reshape(SIDE, BLOCK, SIDE, BLOCK).sum((1, 3), dtype=np.uint8)
    return shades


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"DejaVu{name}.ttf", FONT_SIZE)
