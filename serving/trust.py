"""How far an answer can be trusted, by what the job kept of pictures that training never saw.

*Familiarity* is a conformal p-value (Vovk, Gammerman and Shafer 2005): the share of held-out
pictures that are at least as strange as this one, itself counted. A picture of their kind gets α or
less with a probability of α at most, for every α. How strange a picture is, is how unlikely its
features are under probabilistic principal components of the training pictures' (Tipping and Bishop
1999), the square roots of them, whose tails are lighter.

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
    """[F], of the training pictures' roots of features."""
    directions: Array
    """[F, D], their principal ones, orthonormal."""
    variances: Array
    """[D], along these."""
    rest: Array
    """[], the variance along any other direction."""
    strangeness: Array
    """[n], of the held-out pictures, ascending."""
    right: Array
    """[n], probabilities that these gave to their true class, ascending."""

    @classmethod
    def load(cls, file: Path) -> Self:
        """Raises:
        OSError, KeyError, ValueError, BadZipFile: the file is not what :meth:`save` writes.
        """
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def save(self, file: Path) -> None:
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    def strange(self, features: Array) -> Array:
        """How strange pictures are, [N], by their features, float32 [N, F]: twice the negative
        logarithm of their likelihood, less a constant."""
        off = roots(features) - self.centre
        along = np.square(off @ self.directions)
        across = np.maximum(np.square(off).sum(axis=1) - along.sum(axis=1), 0)
        found: Array = (along / self.variances).sum(axis=1) + across / self.rest
        return found

    def familiarity(self, strangeness: Array) -> NDArray[np.float64]:
        """p-values [N] in (0, 1] of pictures by how strange they are, [N]."""
        count = len(self.strangeness)
        less = np.searchsorted(self.strangeness, strangeness, side="left")
        return (1 + count - less) / (count + 1)

    def least_probability(self, confidence: float) -> float:
        """What a class needs to be in the set that holds the right one so often; 0, which all
        have, where there are too few held-out pictures for that promise."""
        count = len(self.right)
        rank = max(1, math.ceil((count + 1) * confidence))
        return float(self.right[count - rank]) if rank <= count else 0.0


def roots(features: Array) -> Array:
    """Of means over a layer that has no negative outputs; rounding may have made some."""
    return np.sqrt(np.maximum(features, 0))
