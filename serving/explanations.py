"""A class map laid over the picture that it is about."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.images import in_srgb

SIDE = 640  # pixels, at most
DIM = 4  # what speaks least for the class has so many times less light, and no colour


def overlay(picture: Image.Image, class_map: NDArray[np.float32]) -> Image.Image:
    """The picture, made smaller where it is large, lit where the map is high.

    Light goes from the map's lowest place to its highest, whatever their values; all is lit where
    there is one place, or all say the same.

    Args:
        picture: RGB, upright.
        class_map: float32 [h, w], what each place of the whole picture says for a class.
    """
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    picture = in_srgb(picture)
    low, high = class_map.min(), class_map.max()
    light = (class_map - low) / (high - low) if high > low else np.ones_like(class_map)
    mask = Image.fromarray((255 * light).round().astype(np.uint8))
    dark = picture.convert("L").point(lambda value: value // DIM).convert("RGB")
    return Image.composite(picture, dark, mask.resize(picture.size, Image.Resampling.BICUBIC))
