"""Decodes picture files to pixels; training and serving share this code.

What becomes of each kind of picture is a table in docs/pictures.md.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of files, where their names have to do
MAX_PIXELS = 25_000_000
JPEG = b"\xff\xd8"  # at the beginning of a file
# … of a scan, up to how many components it has: a video behind a photo has two bytes by chance.
SCANS = (b"\xff\xda\0\x08\x01", b"\xff\xda\0\x0a\x02", b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x0e\x04")
MAX_SCANS = 100  # of a progressive JPEG, which has ten or so; each takes as long as a picture
STRIP = 256  # rows
SRGB = ImageCms.createProfile("sRGB")
SAME = 3  # of 255: a profile that changes no colour by more is one of sRGB, but for rounding
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `opened` refuses them


class ImageError(ValueError):
    """The bytes are not a picture that this service or job reads; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG or WebP to an upright 8-bit RGB picture.

    EXIF rotation is applied, transparency laid over white, an animation gives its first frame,
    and grey, palette, CMYK and 16-bit pictures are converted. Colours are still those of the
    profile that the file has, which :func:`in_srgb` converts.

    Raises:
        ImageError: empty, not a picture, another format, damaged, or more than `MAX_PIXELS`.
    """
    if not data:
        raise ImageError("empty")
    if data.startswith(JPEG) and sum(map(data.count, SCANS)) > MAX_SCANS:
        raise ImageError(f"over {MAX_SCANS} scans")
    with opened(io.BytesIO(data)) as picture:
        picture.load()
        with suppress(Exception):  # whatever damaged metadata lead Pillow to: they cost no picture
            ImageOps.exif_transpose(picture, in_place=True)
        upright = _to_rgb(picture)
        upright.info = {"icc_profile": picture.info.get("icc_profile")}
        return upright


@contextmanager
def opened(file: BinaryIO | str) -> Iterator[Image.Image]:
    """A picture of which the header is read; the block may read the rest.

    Raises:
        ImageError: as :func:`decode`, in the block, too.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ImageError(f"{picture.width}×{picture.height} is over {MAX_PIXELS:,} pixels")
            yield picture
    except UnidentifiedImageError:
        raise ImageError(f"not a picture in one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"over {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, LookupError, EOFError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"damaged: {error}") from None


def pixels_of(data: bytes) -> int:
    """How many a file has, by its header.

    Raises:
        ImageError: as :func:`decode`.
    """
    with opened(io.BytesIO(data)) as picture:
        return picture.width * picture.height


def to_pixels(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [3, H, W] in sRGB of an RGB picture, scaled to `size` (H, W) unless it has it already.

    Colours come last, when the picture is small: of 12 megapixels they take longer than decoding.
    """
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(in_srgb(picture)).transpose(2, 0, 1)


def in_srgb(picture: Image.Image) -> Image.Image:
    """The picture with its colours converted from those of its ICC profile. Without one, or with
    one that is damaged or for another kind of picture, they are taken as they are."""
    transform = _transform(picture.info.get("icc_profile"), picture.mode)
    return transform.apply(picture) if transform else picture


@lru_cache(maxsize=4)  # of a profile, which may have megabytes
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To RGB in sRGB; None where there is nothing to convert."""
    if not profile:
        return None
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), SRGB, mode, "RGB")
    except ImageCms.PyCMSError:
        return None
    if mode == "RGB":
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        converted = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(converted.astype(int) - colours).max() <= SAME:
            return None
    return transform


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: Pillow's own conversion would clip it
        return picture.point(lambda value: value / 257).convert("L").convert("RGB")
    if picture.has_transparency_data:
        return _over_white(picture)
    if picture.mode == "CMYK":
        picture = in_srgb(picture)
    return picture.convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    """In strips: three copies with four channels of the largest picture would take 300 MB."""
    flat = Image.new("RGB", picture.size)
    for top in range(0, picture.height, STRIP):
        box = (0, top, picture.width, min(top + STRIP, picture.height))
        strip = picture.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return flat


def to_png(image_CHW: NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
