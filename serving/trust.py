"""How far an answer can be trusted, by what the job kept of pictures that training never saw.

*Familiarity* is a conformal p-value (Vovk, Gammerman and Shafer 2005): the share of held-out
pictures that are at least as strange as this one, itself counted. A picture of their kind gets α or
less with a probability of α at most, for every α. How strange a picture is, is the distance of its
features to those of the k-th nearest training picture (Sun et al. 2022), all scaled to unit length
along the training pictures' principal directions.

The *set* of classes that holds the right one with a given probability is split conformal, with
1 − p as the score of a class (Sadinle, Lei and Wasserman 2019).

Both promises are about an average over pictures like the held-out ones, and over draws of these.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Trust:
    centre: Array
    """[F], of the training pictures' features."""
    directions: Array
    """[F, D], their principal ones, orthonormal."""
    known: Array
    """[M, D], training pictures along these, of unit length."""
    nearest: NDArray[np.int64]
    """[], k: which of the nearest training pictures counts."""
    strangeness: Array
    """[n], of the held-out pictures, ascending."""
    right: Array
    """[n], probabilities that these gave to their true class, ascending."""

    @classmethod
    def load(cls, file: Path) -> Self:
        """Raises:
        OSError, KeyError, ValueError: the file is not what :meth:`save` writes.
        """
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def save(self, file: Path) -> None:
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    def familiarity(self, features: Array) -> NDArray[np.float64]:
        """p-values [N] in (0, 1] of pictures by their features, float32 [N, F]."""
        strange = distances(
            project(features, self.centre, self.directions), self.known, int(self.nearest)
        )
        count = len(self.strangeness)
        as_strange = count - np.searchsorted(self.strangeness, strange, side="left")
        return (1 + as_strange) / (count + 1)

    def least_probability(self, confidence: float) -> float:
        """What a class needs to be in the set that holds the right one so often; 0, which all
        have, where there are too few held-out pictures for that promise."""
        count = len(self.right)
        rank = max(1, math.ceil((count + 1) * confidence))
        return float(self.right[count - rank]) if rank <= count else 0.0


def project(features: Array, centre: Array, directions: Array) -> Array:
    """[N, D] of unit length, of features [N, F]."""
    along = (features - centre) @ directions
    unit: Array = along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-12)
    return unit


def distances(pictures: Array, known: Array, nearest: int) -> Array:
    """Squared, less 2 and halved, [N]: of pictures [N, D] to the `nearest`-th of known [M, D], all
    of unit length."""
    found: Array = -np.partition(pictures @ known.T, -nearest, axis=1)[:, -nearest]
    return found
