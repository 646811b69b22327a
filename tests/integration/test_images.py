"""The one path from bytes to tensor reads what people send, and refuses the rest clearly."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from drawings import bomb
from PIL import Image

from jobs.data.images import to_input
from serving.images import ImageError, decode

RED = (200, 30, 40)


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (6, 4), colour)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(solid("RGB", RED)), RED),
        (encoded(solid("RGB", RED), "WEBP", lossless=True), RED),
        (encoded(solid("L", 90)), (90, 90, 90)),
        (encoded(solid("P", 3).convert("RGB").quantize()), (9, 9, 9)),
        (encoded(solid("RGBA", (*RED, 0))), (255, 255, 255)),
        (encoded(solid("RGBA", (*RED, 255))), RED),
        (encoded(solid("LA", (90, 255))), (90, 90, 90)),
        (encoded(solid("1", 1)), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((4, 6), 257 * 90, np.uint16))), (90, 90, 90)),
    ],
    ids=["rgb", "webp", "grey", "palette", "clear", "opaque", "grey+alpha", "bits", "16-bit"],
)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(
    data: bytes, expected: tuple[int, int, int]
) -> None:
    picture = decode(data)
    assert picture.mode == "RGB" and picture.size == (6, 4)
    if expected != (9, 9, 9):
        assert picture.getpixel((2, 2)) == expected


@pytest.mark.parametrize("height", [512, 513, 769])
def test_a_tall_picture_lies_on_white_as_one_whole(height: int) -> None:
    """It is laid there in strips."""
    noise = np.random.default_rng(0).integers(0, 256, (height, 5, 4), np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    for data in (
        encoded(rgba),
        encoded(rgba.convert("LA")),
        encoded(rgb.quantize(256), transparency=bytes(range(256))),
        encoded(rgb, transparency=rgb.getpixel((2, height - 1))),
        encoded(grey, transparency=grey.getpixel((2, height - 1))),
    ):
        with Image.open(io.BytesIO(data)) as picture:
            whole = picture.convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        expected = Image.alpha_composite(white, whole).convert("RGB")
        assert decode(data).tobytes() == expected.tobytes()
        assert expected.tobytes() != whole.convert("RGB").tobytes(), "some of it is clear"


def test_cmyk_and_one_pixel_are_read() -> None:
    cmyk = decode(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = np.asarray(cmyk)[2, 2]
    assert red > 240 and green < 20 and blue < 20
    assert decode(encoded(Image.new("RGB", (1, 1), RED))).size == (1, 1)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    assert decode(encoded(solid("RGB", RED), "JPEG", exif=exif)).size == (4, 6)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [solid("RGB", RED), solid("RGB", (0, 0, 255))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data).getpixel((2, 2)) == RED


def pixel_and_empty_profile() -> bytes:
    """A PNG file whose last chunk is a colour profile of no bytes, at which Pillow stumbles."""
    whole = encoded(solid("RGB", RED), "PNG")
    end = whole.index(b"IEND") - 4
    return whole[:end] + struct.pack(">I4sI", 0, b"iCCP", zlib.crc32(b"iCCP")) + whole[end:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (encoded(solid("RGB", RED), "GIF"), "not a picture in one of"),
        (encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:700], "damaged"),
        (pixel_and_empty_profile(), "damaged"),
        (bomb(8_000), "over 25,000,000 pixels"),
        (bomb(20_000), "pixels"),
        (bomb(100), "damaged"),
    ],
    ids=["empty", "text", "gif", "truncated", "profile", "large", "bomb", "hollow"],
)
def test_what_is_no_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_inputs_are_scaled_and_normalised() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)
    inputs = to_input(images, 20)
    assert inputs.shape == (2, 3, 20, 20) and inputs.dtype == torch.float32
    black, white = torch.full((3, 20, 20), -1.0), torch.ones(3, 20, 20)
    torch.testing.assert_close(inputs, torch.stack([black, white]))
    torch.testing.assert_close(to_input(images, 20, "unit"), torch.stack([black + 1, white]))


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    lines = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    lines[..., ::2] = 255
    assert to_input(lines, 8)[..., 2:-2].abs().max() < 0.05
