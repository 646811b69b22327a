"""Pictures that the data has twice: exactly, or recompressed, shifted, lighter or darker.

Candidates are a picture's nearest neighbours by the amplitudes of its spectrum, which a shift
leaves as they are. Each is then laid over the picture where the two correlate best, and the
correlation of what they share decides. Perceptual hashes (dHash, pHash) were measured and lose
half of the shifted ones (docs/inspection.md).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from jobs import interruption
from jobs.data import findings
from jobs.data.dataset import Dataset
from jobs.data.findings import Finding, Kind

SIDE = 32  # pixels of the small pictures that are compared
FREQUENCIES = 6  # of the spectrum, in each direction
CANDIDATES = 4  # nearest neighbours that are looked at
REACH = SIDE // 8  # pixels of a shift, in each direction
SIMILAR = 0.93  # correlation from which two pictures are one; measured: docs/inspection.md
# … and they have to be so many times closer than unrelated neighbours in this data are: all eights
# of eight pixels look alike, and so do all X-rays of a chest.
CLOSER = 12
SAMPLE = 1000  # pictures by which that distance of neighbours is measured
FAR = 8  # … to their 8th neighbour, which is no copy, even if a picture was augmented several times
AT_ONCE = 1024  # pictures
ON_CPU = 5000  # pictures, at most, that a CPU compares: that takes it seconds
COSINES = 2**26  # that are in memory at once, however many pictures there are: 268 MB


@dataclass(frozen=True)
class Pair:
    first: int
    second: int
    """Positions, the first one smaller."""
    similarity: float
    """1 for equal small pictures, else the correlation of the two at their best shift."""


@dataclass(frozen=True)
class Doubles:
    findings: list[Finding]
    leaked: tuple[int, ...]
    """Test images, by their positions, that are also training or validation images."""


def among(dataset: Dataset, small: Tensor, device: torch.device) -> Doubles:
    """The doubles of a data set.

    Args:
        small: uint8 [N, 3, S, S], of all its images.
    """
    # Smaller pictures show too little to tell the same one from a likeness: two digits of 8×8 by
    # one hand, say.
    near = min(dataset.description.image_size) >= SIDE
    pairs, tests = find(small, device, near=near), len(dataset.test)
    found = named(pairs, dataset.paths, dataset.labels.tolist(), tests)
    return Doubles(findings.worst_first(found), tuple(leaked(pairs, len(small), tests)))


def thumbnails(dataset: Dataset) -> Tensor:
    """uint8 [N, 3, SIDE, SIDE] on the CPU: all images, scaled by the mean of areas."""
    parts = []
    for images in dataset.splits.values():
        for batch in torch.arange(len(images), device=images.labels.device).split(AT_ONCE):
            interruption.check()
            pixels = images.raw(batch)
            if pixels.shape[-2:] != (SIDE, SIDE):
                pixels = F.adaptive_avg_pool2d(pixels.float(), SIDE).round().to(torch.uint8)
            parts.append(pixels.cpu())
    return torch.cat(parts)


def find(small: Tensor, device: torch.device, *, near: bool = True) -> list[Pair]:
    """Pairs that are the same picture. Of several copies not all pairs are given, but each copy
    except the first is the second of a pair.

    Args:
        small: uint8 [N, 3, S, S], as :func:`thumbnails` makes them.
        near: whether pictures that are not equal may be the same.
    """
    kept: dict[bytes, int] = {}
    digests = (hashlib.sha256(picture.tobytes()).digest() for picture in small.numpy())
    firsts = [kept.setdefault(digest, i) for i, digest in enumerate(digests)]
    pairs = [Pair(first, i, 1.0) for i, first in enumerate(firsts) if first != i]
    different = torch.tensor(list(kept.values()))
    if near and len(different) > 1:
        chosen = device if len(different) > ON_CPU else torch.device("cpu")
        first, second, similarity = _near(small[different].to(chosen))
        found = zip(different[first].tolist(), different[second].tolist(), similarity, strict=True)
        pairs += [Pair(*pair) for pair in found]
    return pairs


def named(
    pairs: Sequence[Pair], paths: Sequence[str], labels: Sequence[int], tests: int
) -> list[Finding]:
    """What is wrong with each second picture of a pair, its best pair for each kind.

    Args:
        paths: of all images, the first `tests` of them test images.
        labels: of the same.
    """
    best: dict[tuple[Kind, int], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.similarity):
        best |= {(kind, pair.second): pair for kind in _kinds(pair, labels, tests)}
    return [
        Finding(kind, paths[pair.second], paths[pair.first], pair.similarity)
        for (kind, _), pair in best.items()
    ]


def _kinds(pair: Pair, labels: Sequence[int], tests: int) -> Iterator[Kind]:
    leaks, differ = pair.first < tests <= pair.second, labels[pair.first] != labels[pair.second]
    if leaks:
        yield "leak"
    if differ:
        yield "conflict"
    if not leaks and not differ:
        yield "duplicate"


def leaked(pairs: Sequence[Pair], count: int, tests: int) -> list[int]:
    """Of `count` images, the first `tests` of them test images, those test images that a chain of
    pairs connects with a training image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = [pair.first for pair in pairs], [pair.second for pair in pairs]
    graph = coo_array(([1] * len(pairs), ends), shape=(count, count))
    groups = connected_components(graph, directed=False)[1]
    of_training = set(groups[tests:].tolist())
    return [i for i, group in enumerate(groups[:tests].tolist()) if group in of_training]


def _near(pictures: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Pairs of positions int64 [P] on the CPU, and their correlation."""
    neighbours = nearest(spectra(pictures), min(FAR, len(pictures) - 1))
    own = torch.arange(len(pictures), device=pictures.device)
    some = own[:: -(-len(own) // SAMPLE)]
    typical = 1 - _correlations(pictures, some, neighbours[some, -1]).median()
    neighbours = neighbours[:, :CANDIDATES]

    both = torch.stack([own[:, None].expand_as(neighbours), neighbours], 2).flatten(0, 1)
    first, second = both.sort(1).values.unique(dim=0).unbind(1)
    similarity = _correlations(pictures, first, second)
    alike = similarity >= 1 - min(1 - SIMILAR, float(typical) / CLOSER)
    return first[alike].cpu(), second[alike].cpu(), similarity[alike].tolist()


def _correlations(pictures: Tensor, first: Tensor, second: Tensor) -> Tensor:
    parts = []
    for one, other in zip(first.split(AT_ONCE), second.split(AT_ONCE), strict=True):
        interruption.check()
        parts.append(correlation(pictures[one], pictures[other]))
    return torch.cat(parts)


def spectra(pictures: Tensor) -> Tensor:
    """Square roots of the low frequencies' amplitudes, standardised, of length 1.

    Args:
        pictures: uint8 [N, 3, S, S].

    Returns:
        float32 [N, D].
    """
    low = [*range(FREQUENCIES + 1), *range(-FREQUENCIES, 0)]
    parts = (_spectrum(part)[:, :, low, : FREQUENCIES + 1] for part in pictures.split(AT_ONCE))
    roots = torch.cat([part.abs().sqrt().flatten(1) for part in parts])
    return F.normalize((roots - roots.mean(0)) / roots.std(0).clamp(min=1e-6))


def _spectrum(pictures: Tensor) -> Tensor:
    """complex64 [N, 3, S, S // 2 + 1], of windowed pictures: what a shift brings in at an edge
    counts little."""
    centred = pictures.float()
    centred = centred - centred.mean((1, 2, 3), keepdim=True)
    window = torch.hann_window(pictures.shape[-1] + 2, periodic=False, device=pictures.device)
    window = window[1:-1]
    spectrum: Tensor = torch.fft.rfft2(centred * window[:, None] * window)
    return spectrum


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Of each vector the others that are nearest by cosine, int64 [N, count], nearest first.

    Args:
        vectors: float32 [N, D], of length 1.
    """
    found = []
    rows = max(1, COSINES // len(vectors))
    for start in range(0, len(vectors), rows):
        interruption.check()
        cosines = vectors[start : start + rows] @ vectors.T
        cosines.diagonal(start).fill_(-2)
        found.append(cosines.topk(count).indices)
    return torch.cat(found)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of all channels together, of what two pictures share when the second is shifted
    by up to `REACH` pixels so that they correlate best.

    Args:
        a, b: uint8 [N, 3, S, S].

    Returns:
        float32 [N], 0 where either is of a single colour.
    """
    count, side = len(a), a.shape[-1]
    shifted = torch.fft.irfft2((_spectrum(a) * _spectrum(b).conj()).sum(1), s=(side, side))
    shifts = torch.arange(-REACH, REACH + 1, device=a.device)
    best = shifted[:, shifts][:, :, shifts].flatten(1).argmax(1)
    down, right = shifts[best // len(shifts)], shifts[best % len(shifts)]

    places = torch.arange(side, device=a.device)
    ys, xs = places - down[:, None], places - right[:, None]
    shared = ((ys >= 0) & (ys < side))[:, :, None] & ((xs >= 0) & (xs < side))[:, None]
    ys, xs = ys.clamp(0, side - 1), xs.clamp(0, side - 1)
    rows = torch.arange(count, device=a.device)[:, None, None]
    moved = b[rows, :, ys[:, :, None], xs[:, None]].permute(0, 3, 1, 2)

    weight = shared[:, None].float().expand(-1, a.shape[1], -1, -1)
    x, y = _centred(a, weight), _centred(moved, weight)
    norms = (x.square().sum((1, 2, 3)) * y.square().sum((1, 2, 3))).sqrt()
    return (x * y).sum((1, 2, 3)) / norms.clamp(min=1e-6)


def _centred(pictures: Tensor, weight: Tensor) -> Tensor:
    """Deviations from the mean where `weight` is 1, and 0 where it is 0."""
    total = (pictures * weight).sum((1, 2, 3), keepdim=True)
    return (pictures - total / weight.sum((1, 2, 3), keepdim=True)) * weight
