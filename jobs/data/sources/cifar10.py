"""torchvision's CIFAR-10, downloaded once and checked against its published digest."""

from pathlib import Path

import torch

from jobs import config
from jobs.data.images import Images
from jobs.data.sources import Source
from jobs.errors import UnavailableError
from jobs.network import reachable

PUBLISHED = True
ARCHIVE = "cifar-10-python.tar.gz"


def load(settings: config.Data) -> Source:
    """50,000 training and 10,000 test images, uint8 [N, 3, 32, 32]; downloads what is missing.

    Raises:
        UnavailableError: the download failed, or the files are damaged.
    """
    from torchvision.datasets import CIFAR10

    root = Path(settings.root or settings.cache).expanduser()
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"CIFAR-10 download failed ({error}); put {ARCHIVE} into {root}, or use "
            "--set data.source=generated"
        ) from None
    train, test = (
        Images.all(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            settings,
        )
        for part in parts
    )
    return Source(train, test, tuple(parts[0].classes), "CIFAR-10")


def check(settings: config.Data) -> tuple[bool, str]:
    from torchvision.datasets import CIFAR10

    root = Path(settings.root or settings.cache).expanduser()
    if (root / ARCHIVE).is_file():
        return True, f"CIFAR-10 is in {root}"
    return reachable(CIFAR10.url)
