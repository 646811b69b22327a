"""Pictures drawn from a seed: ten classes of coloured textures, five hues × two patterns.

Two tasks that share nothing but their nature: the *source* task (rings and checks) is what
stand-in weights are trained on, the *target* task (stripes and dots, in the hues between) is what
the variants learn. A network that has learned to see hues and textures on the first needs few
pictures of the second, and that is transfer learning.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grid = NDArray[np.float32]
HUES = ("red", "yellow", "green", "blue", "violet")


def _stripes(u: Grid, v: Grid) -> Grid:
    return np.sin(u)


def _dots(u: Grid, v: Grid) -> Grid:
    return (np.cos(u) + np.cos(v) - 0.7).astype(np.float32)


def _rings(u: Grid, v: Grid) -> Grid:
    return np.sin(np.hypot(u, v))


def _checks(u: Grid, v: Grid) -> Grid:
    return np.sin(u) * np.sin(v)


@dataclass(frozen=True)
class Task:
    """Ten classes: each of five hues, turned by `hue_offset` of a circle, in each pattern."""

    name: str
    hue_offset: float
    patterns: dict[str, Callable[[Grid, Grid], Grid]]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{hue}-{pattern}" for hue in HUES for pattern in self.patterns)

    def draw(self, count: int, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [count, 3, size, size] and int64 [count], as many of each class as of any other."""
        rng = np.random.default_rng([seed, int(self.hue_offset * 1000)])
        labels = np.arange(count) % len(self.classes)
        pictures = np.stack([self._picture(int(label), size, rng) for label in labels])
        return torch.from_numpy(pictures), torch.from_numpy(labels)

    def _picture(self, label: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        hue_number, pattern_number = divmod(label, len(self.patterns))
        pattern = list(self.patterns.values())[pattern_number]
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


SOURCE = Task("rings and checks", 0.1, {"rings": _rings, "checks": _checks})
TARGET = Task("stripes and dots", 0.0, {"stripes": _stripes, "dots": _dots})
