"""Feature caching for the frozen variant: the head is trained on stored outputs of the trunk.

A trunk whose weights and batch-norm statistics do not change is a fixed function, so training
`fc` on its outputs for exactly the images that an epoch draws gives what training it through the
trunk would give (a test proves it). Outputs are stored for the draws of the first epochs, and
later epochs use these versions of the images in rotation. Without shifts that changes nothing:
mirrors alternate, so every second epoch draws the same. With shifts, which are new in every epoch,
four epochs' draws are stored (`config.STORED_EPOCHS`): up to there it is training through the
trunk, and from there on the head sees fewer different shifts than a trained trunk does.

Each version takes a pass of the trunk over the training images, and 8 KiB an image: 1.6 GB for
four versions of 50,000.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import Inception3

from jobs import distributed
from jobs.data.images import Draws, Images
from jobs.devices import Device


@dataclass(frozen=True)
class Features:
    """Pooled trunk outputs, standing in for :class:`~jobs.data.Images`."""

    values: Tensor  # float32 [V, N, 2048], V versions of the images, on the device
    images: Images

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the device."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, parts: Sequence[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [B, 2048], of the version that `draws` made, or else of the first."""
        version = self.values[0 if draws is None else draws.epoch]
        for part in parts:
            yield version[part], self.labels[part]

    def draws(self, seed: int, epoch: int) -> Draws:
        """Draws of the epoch whose stored version is due; `seed` has to be that of the versions."""
        return self.images.draws(seed, epoch % len(self.values))


Examples = Images | Features
"""What the training loop and the evaluation take."""


@torch.no_grad()
def extract(
    network: Inception3,
    images: Images,
    batch_size: int,
    device: Device,
    *,
    versions: Sequence[Draws],
    advance: Callable[[int], None],
) -> Features:
    """Runs the trunk in eval mode over every version of all images.

    Args:
        versions: the draws of epochs 0, 1, …, each of which makes one.
    """
    network.eval()
    count, place = len(images), images.labels.device
    values = torch.empty(len(versions), count, network.fc.in_features, device=place)
    parts = distributed.batches(count, batch_size, place)
    with _headless(network):
        for draws, outputs in zip(versions, values, strict=True):
            batches = images.batches(parts, draws.to(place))
            for part, (inputs, _) in zip(parts, batches, strict=True):
                distributed.check()
                with device.autocast():
                    outputs[part] = network(inputs).float()
                advance(len(part) * distributed.size())
            distributed.complete(outputs)
    return Features(values, images)


@contextmanager
def _headless(network: Inception3) -> Iterator[None]:
    """In eval mode dropout does nothing, so without `fc` the network ends at its features."""
    head = network.fc
    network.fc = nn.Identity()
    try:
        yield
    finally:
        network.fc = head
