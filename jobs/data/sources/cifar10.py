"""torchvision's CIFAR-10, downloaded once and checked against its published digest."""

from pathlib import Path
from typing import Any

import torch

from jobs import config, locks
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
    root = Path(settings.root or settings.cache).expanduser()
    try:
        try:
            parts = _both(root, download=False)
        except RuntimeError:  # they are not there, or not whole
            with locks.held(root / ".lock", f"{root}: waiting for another download"):
                parts = _both(root, download=True)
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


def _both(root: Path, *, download: bool) -> list[Any]:
    from torchvision.datasets import CIFAR10

    return [CIFAR10(root, train=train, download=download) for train in (True, False)]


def check(settings: config.Data) -> tuple[bool, str]:
    from torchvision.datasets import CIFAR10

    root = Path(settings.root or settings.cache).expanduser()
    if (root / ARCHIVE).is_file():
        return True, f"CIFAR-10 is in {root}"
    return reachable(CIFAR10.url)
