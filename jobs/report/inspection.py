"""The page of `python -m jobs inspect`: what there is, and what may be wrong with it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jobs.data.dataset import Dataset
from jobs.data.findings import Finding
from jobs.report import html

SHOWN = 60  # findings of a kind; findings.csv has the others
SIDE = 96  # pixels of a picture on the page, at most
SIZES = 8  # most frequent ones that are listed


def render(
    dataset: Dataset,
    small: Tensor,
    findings: Sequence[Finding],
    files: Mapping[str, Counter[str]],
    agreement: float,
) -> str:
    """The page as HTML.

    Args:
        small: uint8 [N, 3, S, S], of all images, for the mean of each class.
        findings: the worst first.
        files: how many files have each size, mode and format; may be empty.
        agreement: share of the labels that the classifier agrees with which suspects others.
    """
    kinds = {kind: list(group) for kind, group in groupby(findings, lambda found: found.kind)}
    return html.render(
        "inspection.html",
        data=dataset.description,
        agreement=agreement,
        classes=_classes(dataset, small),
        files={kind: counts.most_common(SIZES) for kind, counts in files.items()},
        different={kind: len(counts) for kind, counts in files.items()},
        counts={kind: len(group) for kind, group in kinds.items()},
        cards={kind: _cards(dataset, group[:SHOWN]) for kind, group in kinds.items()},
    )


def _classes(dataset: Dataset, small: Tensor) -> list[dict[str, Any]]:
    """Each class with its mean picture, and how many pictures of it each split has."""
    rows: list[dict[str, Any]] = []
    labels = dataset.labels
    for label, name in enumerate(dataset.classes):
        own = small[labels == label]
        mean = own.float().mean(0) if len(own) else torch.full(small.shape[1:], 255.0)
        counts = {s: int((i.labels == label).sum()) for s, i in dataset.splits.items()}
        picture = _uri(mean.round().to(torch.uint8).numpy())
        rows.append({"name": name, "mean": picture, "counts": counts})
    return rows


def _cards(dataset: Dataset, findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Each finding with the pictures that it is about."""
    places = {path: place for place, path in enumerate(dataset.paths)}
    labels = dataset.labels

    def picture(path: str) -> dict[str, str]:
        place = places[path]
        label = dataset.classes[int(labels[place])]
        return {"uri": _uri(dataset.raw(place).numpy()), "path": path, "label": label}

    return [
        {"finding": f, "pictures": [picture(p) for p in (f.path, f.other) if p in places]}
        for f in findings
    ]


def _uri(pixels: NDArray[np.uint8]) -> str:
    """A data URI of pixels uint8 [3, H, W]."""
    picture = Image.fromarray(pixels.transpose(1, 2, 0))
    picture.thumbnail((SIDE, SIDE))
    return html.picture_uri(picture)
