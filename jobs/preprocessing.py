"""From stored pixels to the network's input, on the device; a part of what is exported."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom


def to_input(images: Tensor, size: int, normalization: str = "inception") -> Tensor:
    """Scales pictures to the network's input.

    Args:
        images: uint8 or float [N, 3, H, W] with values 0 to 255.
        size: side of the result in pixels.
        normalization: `inception` for values in [-1, 1], which is what Inception-v3's published
            weights were trained with; `unit` for [0, 1].

    Returns:
        float32 [N, 3, size, size], bilinear, antialiased when it shrinks.
    """
    x_NCHW = images.float()
    height, width = x_NCHW.shape[-2:]
    if (height, width) != (size, size):
        shrinks = height > size or width > size
        x_NCHW = F.interpolate(
            x_NCHW, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
        )
    if normalization == "unit":
        return x_NCHW / 255
    return x_NCHW / 127.5 - 1
