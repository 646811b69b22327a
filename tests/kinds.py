"""Every kind of picture file that people have, and what is made of it."""

import io
import struct
from typing import Any, NamedTuple

import numpy as np
from drawings import bomb
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

Pixels = NDArray[Any]
JPEG = {"quality": 100, "subsampling": 0}
ORIENTATION = 0x0112


class Kind(NamedTuple):
    file: bytes
    shows: Pixels | str
    """uint8 [H, W, 3] that a viewer shows, or why it is refused."""
    within: int = 0
    """How far from these the pixels may be."""


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def drawing() -> Image.Image:
    """Four colours that are no one's mirror image, 64×48."""
    colours = np.array([[(200, 30, 40), (20, 160, 60)], [(30, 50, 210), (250, 240, 200)]], np.uint8)
    return Image.fromarray(colours.repeat(24, 0).repeat(32, 1))


def kinds() -> dict[str, Kind]:
    """By name."""
    rgb = drawing()
    other = ImageOps.invert(rgb)
    shown, grey = np.asarray(rgb), np.asarray(rgb.convert("L"))
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    in_greys = grey[..., None].repeat(3, 2)
    lossless: dict[str, Any] = {"format": "WEBP", "lossless": True}
    colour_key = tuple(shown[0, 0].tolist())
    palette = rgb.quantize(4)
    index = int(np.asarray(palette)[0, 0])
    half_clear = bytes(128 if i == index else 255 for i in range(4))
    ramp = (257 * np.arange(256)).astype(np.uint16)[None]
    found = {
        "PNG": Kind(encoded(rgb), shown),
        "WebP": Kind(encoded(rgb, **lossless), shown),
        "JPEG": Kind(encoded(rgb, "JPEG", **JPEG), shown, 3),
        "progressive JPEG": Kind(encoded(rgb, "JPEG", progressive=True, **JPEG), shown, 3),
        "JPEG with a film behind it": Kind(encoded(rgb, "JPEG", **JPEG) + film(), shown, 3),
        "one pixel": Kind(encoded(Image.new("RGB", (1, 1), (9, 8, 7))), np.array([[(9, 8, 7)]])),
        "grey": Kind(encoded(rgb.convert("L")), in_greys),
        "grey JPEG": Kind(encoded(rgb.convert("L"), "JPEG", **JPEG), in_greys, 3),
        "black and white": Kind(encoded(Image.new("1", (5, 5), 1)), white((5, 5))),
        "16-bit grey": Kind(encoded(Image.fromarray(ramp)), (ramp // 257)[..., None].repeat(3, 2)),
        "palette": Kind(encoded(palette), shown),
        "palette with a clear colour": Kind(encoded(palette, transparency=index), on_white(255)),
        "palette with a veil": Kind(encoded(palette, transparency=half_clear), on_white(127), 1),
        "RGB with a clear colour": Kind(encoded(rgb, transparency=colour_key), on_white(255)),
        "RGBA": Kind(encoded(with_alpha(rgb, 128)), on_white(127), 1),
        "RGBA WebP": Kind(encoded(with_alpha(rgb, 0), **lossless, exact=True), on_white(255)),
        "LA": Kind(encoded(with_alpha(rgb.convert("L"), 0)), np.where(corner(), 255, in_greys)),
        "CMYK": Kind(encoded(rgb.convert("CMYK"), "JPEG", **JPEG), shown, 4),
        "CMYK with a profile": Kind(
            encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", icc_profile=ink()),
            np.full((16, 16, 3), 119),  # L* 50
            2,
        ),
        "animated WebP": Kind(encoded(rgb, **lossless, **frames), shown),
        "animated PNG": Kind(encoded(rgb, **frames), shown),
        "MPO": Kind(encoded(rgb, "MPO", **frames, **JPEG), shown, 3),
        "sRGB profile": Kind(encoded(rgb, icc_profile=srgb()), shown),
        "wide gamut": Kind(encoded(rgb, icc_profile=display_p3()), from_display_p3(shown), 2),
        "wide gamut, clear": Kind(
            encoded(with_alpha(rgb, 0), icc_profile=display_p3()),
            np.where(corner(), 255, from_display_p3(shown)),
            2,
        ),
        "grey, wide gamut": Kind(
            encoded(rgb.convert("L"), "JPEG", icc_profile=display_p3(), **JPEG), in_greys, 3
        ),
        "damaged profile": Kind(encoded(rgb, icc_profile=display_p3()[:200]), shown),
        "profile of another kind": Kind(encoded(rgb, icc_profile=ink()), shown),
        "damaged EXIF": Kind(encoded(rgb, exif=b"Exif\0\0II*\0"), shown),
        "no EXIF in EXIF": Kind(encoded(rgb, **lossless, exif=b"Exif\0\0no such thing"), shown),
        "truncated JPEG": Kind(encoded(noise(), "JPEG")[:700], "damaged: "),
        "truncated PNG": Kind(encoded(noise())[:700], "damaged: "),
        "truncated WebP": Kind(encoded(noise(), "WEBP")[:200], "not a picture|damaged: "),
        "no pixels": Kind(bomb(100), "damaged: "),
        "JPEG of 5,000 scans": Kind(scans(5_000), "over 100 scans$"),
        "100 megapixels": Kind(bomb(10_000), "over 25,000,000 pixels"),
        "400 megapixels": Kind(bomb(20_000), "over 25,000,000 pixels"),
        "GIF": Kind(encoded(rgb, "GIF"), "not a picture in one of JPEG, PNG, WEBP"),
        "animated GIF": Kind(encoded(rgb, "GIF", **frames), "not a picture in one of"),
        "TIFF": Kind(encoded(rgb, "TIFF"), "not a picture in one of"),
        "text": Kind(b"hello", "not a picture in one of"),
        "nothing": Kind(b"", "empty"),
    }
    for orientation in range(1, 10):  # 9 means nothing
        found[f"EXIF {orientation}"] = Kind(turned(rgb, orientation), shown)
    return found


def turned(picture: Image.Image, orientation: int) -> bytes:
    """A file that is upright once EXIF is applied: what `exif_transpose` makes of the picture is
    undone by the same turn, or by the opposite one."""
    exif = Image.Exif()
    exif[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
    stored = Image.open(io.BytesIO(encoded(picture, exif=exif)))
    exif[ORIENTATION] = orientation
    return encoded(ImageOps.exif_transpose(stored), exif=exif)


def film() -> bytes:
    """What telephones put behind a photo that moves: compressed, so any two bytes occur in it."""
    return 200 * (b"\xff\xda" + np.random.default_rng(0).bytes(50))


def scans(count: int) -> bytes:
    """A progressive JPEG of many scans, all but a few of which are its last one again."""
    file = encoded(drawing(), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:last] + count * file[last:-2] + file[-2:]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def white(shape: tuple[int, int]) -> Pixels:
    return np.full((*shape, 3), 255, np.uint8)


def corner() -> Pixels:
    """bool [48, 64, 1]: the red quarter."""
    there = np.zeros((48, 64, 1), bool)
    there[:24, :32] = True
    return there


def with_alpha(picture: Image.Image, alpha: int) -> Image.Image:
    """With that much of the red quarter left."""
    layer = np.where(corner()[..., 0], alpha, 255).astype(np.uint8)
    picture = picture.copy()
    picture.putalpha(Image.fromarray(layer))
    return picture


def on_white(how_much: int) -> Pixels:
    """The drawing with so much of 255 of white in its red quarter."""
    shown = np.asarray(drawing()).astype(float)
    mixed = shown + (255 - shown) * how_much / 255
    return np.where(corner(), mixed, shown).round().astype(np.uint8)


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))  # XYZ, D50
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def display_p3() -> bytes:
    """The profile of a telephone's photos: that of sRGB with other primary colours."""
    profile = bytearray(srgb())
    (count,) = struct.unpack_from(">I", profile, 128)
    for number in range(count):
        tag, offset = struct.unpack_from(">4sI", profile, 132 + 12 * number)
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            colour = P3[b"rgb".index(tag[0])]
            struct.pack_into(">3i", profile, offset + 8, *(round(v * 65_536) for v in colour))
    return bytes(profile)


def from_display_p3(shown: Pixels) -> Pixels:
    """The same in sRGB, by the book (IEC 61966-2-1)."""
    value = shown / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    mixed = np.clip(linear @ np.array(P3) @ np.linalg.inv(np.array(SRGB)), 0, 1)
    back = np.where(mixed <= 0.0031308, mixed * 12.92, 1.055 * mixed ** (1 / 2.4) - 0.055)
    return np.asarray((back * 255).round().astype(np.uint8))


def ink() -> bytes:
    """A profile of CMYK where cyan is a grey of L* 50, black is black, and all else white."""
    lightness = [0 if i & 1 else 128 if i & 8 else 255 for i in range(16)]  # of every corner
    table = bytes(np.array([(value, 128, 128) for value in lightness], np.uint8))
    one = struct.pack(">9i", *(65_536 * (i % 4 == 0) for i in range(9)))
    same = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + one + 4 * same + table + 3 * same
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(tags), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63_190, 65_536, 54_061)
    return header.ljust(128, b"\0") + tags
