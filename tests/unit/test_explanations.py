"""A class map over its picture: light where the map is high."""

import numpy as np
import pytest
from PIL import Image

from serving.explanations import SIDE, overlay

RED = (200, 40, 40)


def test_the_high_side_of_a_map_is_lit_and_the_low_one_dark_and_grey() -> None:
    lit = overlay(Image.new("RGB", (60, 30), RED), np.array([[-7.0, 5.0]], np.float32))
    assert lit.size == (60, 30) and lit.getpixel((59, 15)) == RED
    dark = lit.getpixel((0, 15))
    assert isinstance(dark, tuple) and len(set(dark)) == 1 and max(dark) < 40


@pytest.mark.parametrize("value", [-3.0, 0.0, 8.0])
def test_a_map_that_says_the_same_everywhere_leaves_the_picture_as_it_is(value: float) -> None:
    picture = Image.new("RGB", (5, 7), RED)
    assert overlay(picture, np.full((1, 1), value, np.float32)).tobytes() == picture.tobytes()


def test_a_large_picture_is_made_smaller_and_the_given_one_stays() -> None:
    picture = Image.new("RGB", (4 * SIDE, 2 * SIDE), RED)
    assert overlay(picture, np.eye(8, dtype=np.float32)).size == (SIDE, SIDE // 2)
    assert picture.size == (4 * SIDE, 2 * SIDE)
