"""Decodes picture files to pixels; training and serving share this code."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of files, where their names have to do
MAX_PIXELS = 25_000_000


class ImageError(ValueError):
    """The bytes are not a picture that this service or job reads; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes JPEG, PNG or WebP to an upright 8-bit RGB picture.

    EXIF rotation is applied, transparency laid over white, an animation gives its first frame,
    and grey, palette, CMYK and 16-bit pictures are converted. The size in the header is checked
    before any pixel is decoded.

    Raises:
        ImageError: empty, not a picture, another format, damaged, or more than `max_pixels`.
    """
    if not data:
        raise ImageError("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise ImageError(f"{picture.width}×{picture.height} is over {max_pixels:,} pixels")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise ImageError(f"not a picture in one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"damaged: {error}") from None


def to_pixels(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [3, H, W] of an RGB picture, scaled to `size` (H, W) unless it has it already."""
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: Pillow's own conversion would clip it
        return picture.point(lambda value: value / 257).convert("L").convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def to_png(image_CHW: NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
