"""The frozen variant without its waste: the trunk runs once per image, the head learns from that.

A trunk whose weights and batch-norm statistics do not change is a fixed function, so training
`fc` on its stored outputs gives what training it through the trunk would give (a test proves it).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import Inception3

from jobs import distributed
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

    def batches(
        self, parts: Sequence[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [B, 2048]; of the draws only the mirror counts, as a shift has no stored
        output."""
        for part in parts:
            side = 0 if draws is None else draws.flip[part].long()
            yield self.values[side, part], self.labels[part]

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
    count, place = len(images), images.labels.device
    values = torch.empty(1 + mirrored, count, network.fc.in_features, device=place)
    parts = distributed.batches(count, batch_size, place)
    with _headless(network):
        for flip, outputs in zip((False, True), values, strict=False):
            draws = _constant_draws(count, flip).to(place)
            for part, (inputs, _) in zip(parts, images.batches(parts, draws), strict=True):
                distributed.check()
                with device.autocast():
                    outputs[part] = network(inputs).float()
                advance(len(part) * distributed.size())
            distributed.complete(outputs)
    return Features(values, images)


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
