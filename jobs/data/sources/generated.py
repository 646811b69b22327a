"""Pictures drawn from a seed: ten classes of coloured textures, five hues × {stripes, dots}.

Two tasks that share their patterns and no hue: stand-in weights are trained on the *source* task,
the variants learn the *target* task, in the hues between. What a network has learnt of textures on
the first it need not learn again on the second: that is transfer learning.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs import config
from jobs.data.images import Images
from jobs.data.sources import Source

PUBLISHED = True
Grid = NDArray[np.float32]
HUES = ("red", "yellow", "green", "blue", "violet")


def _stripes(u: Grid, v: Grid) -> Grid:
    return np.sin(u)


def _dots(u: Grid, v: Grid) -> Grid:
    return (np.cos(u) + np.cos(v) - 0.7).astype(np.float32)


PATTERNS: dict[str, Callable[[Grid, Grid], Grid]] = {"stripes": _stripes, "dots": _dots}
CLASSES = tuple(f"{hue}-{pattern}" for hue in HUES for pattern in PATTERNS)


@dataclass(frozen=True)
class Task:
    """Ten classes: each of five hues, turned by `hue_offset` of a circle, in each pattern."""

    hue_offset: float

    def draw(self, count: int, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [count, 3, size, size] and int64 [count], as many of each class as of any other."""
        rng = np.random.default_rng([seed, int(self.hue_offset * 1000)])
        labels = np.arange(count) % len(CLASSES)
        pictures = np.stack([self._picture(int(label), size, rng) for label in labels])
        return torch.from_numpy(pictures), torch.from_numpy(labels)

    def _picture(self, label: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        hue_number, pattern_number = divmod(label, len(PATTERNS))
        pattern = list(PATTERNS.values())[pattern_number]
        hue = hue_number / len(HUES) + self.hue_offset + rng.uniform(-0.03, 0.03)
        ink = _rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.6, 1.0))
        paper = _rgb(rng.uniform(), rng.uniform(0.0, 0.15), rng.uniform(0.3, 1.0))

        angle, waves = rng.uniform(0, np.pi), rng.uniform(5, 10)
        axis = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(waves * np.pi)
        x, y = axis[None, :], axis[:, None]
        u = (x * np.cos(angle) + y * np.sin(angle) + rng.uniform(-9, 9)).astype(np.float32)
        v = (y * np.cos(angle) - x * np.sin(angle) + rng.uniform(-9, 9)).astype(np.float32)
        cover = 1 / (1 + np.exp(-4 * pattern(u, v)))

        picture = ink[:, None, None] * cover + paper[:, None, None] * (1 - cover)
        noise = rng.normal(0, 0.06, picture.shape)
        return ((picture + noise).clip(0, 1) * 255).astype(np.uint8)


def _rgb(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


SOURCE = Task(0.1)  # the hues between those of the target task
TARGET = Task(0.0)


def load(settings: config.Data) -> Source:
    """The generated target task; see :mod:`jobs.data.sources.generated`."""
    train_count, test_count = settings.train_images or 240, settings.test_images or 200
    size, seed = settings.input_size, settings.seed
    train = Images.all(*TARGET.draw(train_count, size, seed=seed), settings)
    test = Images.all(*TARGET.draw(test_count, size, seed=seed + 1), settings)
    return Source(train, test, CLASSES, "generated (stripes and dots in five hues)")


def check(settings: config.Data) -> tuple[bool, str]:
    return True, "generated, needs nothing"
