"""The frozen variant without its waste: the trunk runs once per image, the head learns from that.

A trunk whose weights and batch-norm statistics do not change is a fixed function, so training
`fc` on its stored outputs gives what training it through the trunk would give (a test proves it).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import Inception3

from jobs import interruption
from jobs.data import Draws, Images
from jobs.devices import Device


@dataclass(frozen=True)
class Features:
    """Pooled trunk outputs, standing in for :class:`~jobs.data.Images`."""

    values: Tensor  # float32 [1 or 2, N, 2048], as they are and mirrored, on the device
    images: Images

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, batch: Tensor, draws: Draws | None = None) -> Tensor:
        """float32 [B, 2048]; of the draws only the mirror counts, a shift has no stored output."""
        if draws is None:
            return self.values[0, batch]
        return self.values[draws.flip[batch].long(), batch]

    def draws(self, seed: int, epoch: int) -> Draws:
        return self.images.draws(seed, epoch)


@torch.no_grad()
def extract(
    network: Inception3,
    images: Images,
    batch_size: int,
    device: Device,
    *,
    mirrored: bool,
    advance: Callable[[int], None],
) -> Features:
    """Runs the trunk in eval mode once over all images, and once over their mirrors if asked."""
    network.eval()
    count = len(images)
    everything = torch.arange(count, device=images.labels.device)
    passes = []
    with _headless(network):
        for flip in (False, True)[: 1 + mirrored]:
            draws = _constant_draws(count, flip).to(images.labels.device)
            outputs = []
            for batch in everything.split(batch_size):
                interruption.check()
                with device.autocast():
                    outputs.append(network(images.inputs(batch, draws)).float())
                advance(len(batch))
            passes.append(torch.cat(outputs))
    return Features(torch.stack(passes), images)


def _constant_draws(count: int, flip: bool) -> Draws:
    return Draws(torch.full((count,), flip), torch.zeros(count, 2, dtype=torch.int64))


@contextmanager
def _headless(network: Inception3) -> Iterator[None]:
    """In eval mode dropout does nothing, so without `fc` the network ends at its features."""
    head = network.fc
    network.fc = nn.Identity()
    try:
        yield
    finally:
        network.fc = head
