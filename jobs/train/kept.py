"""The few pictures that a run keeps for its report, small."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from jobs.data.dataset import Dataset
from jobs.data.findings import Finding

SIDE = 192  # pixels, at most

Array = NDArray[Any]


def surest(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the wrong answers and of the right ones, int64, the most confident first.

    Args:
        logits: float32 [N, C].
        labels: int64 [N].
    """
    confidence, predicted = logits.softmax(1).max(1)
    order = confidence.argsort(descending=True)
    wrong = (predicted != labels)[order]
    return order[wrong], order[~wrong]


def pairs(dataset: Dataset, worst: Sequence[Finding]) -> dict[str, Array]:
    """The arrays of doubles.npz: `pixels` uint8 [2n, 3, h, w] of n pairs, their `labels` [n, 2],
    `kinds` and `scores` [n]."""
    places = {path: place for place, path in enumerate(dataset.paths)}
    rows = torch.tensor([[places[f.path], places[f.other]] for f in worst])
    return {
        "pixels": shrunk(torch.stack([dataset.raw(i) for i in rows.flatten().tolist()])),
        "labels": dataset.labels[rows].numpy(),
        "kinds": np.array([finding.kind for finding in worst]),
        "scores": np.array([finding.score for finding in worst]),
    }


def shrunk(pixels: Tensor) -> NDArray[np.uint8]:
    """Pictures uint8 [n, 3, h, w], scaled to `SIDE` if they are larger."""
    shown = pixels.float()
    if max(shown.shape[-2:]) > SIDE:
        shown = F.interpolate(shown, (SIDE, SIDE), mode="bilinear", antialias=True)
    return shown.round().to(torch.uint8).cpu().numpy()
