"""Whether the pictures that are sent are still like those that the model was tested on.

A conformal test martingale (Vovk, Nouretdinov and Gammerman 2003). The strangeness of each picture
is ranked among those of the held-out pictures and of the ones served since, the picture itself
included, ties broken at random. As long as all of them come from one source, each in its turn,
these ranks are independent and uniform, and no bet against that wins in the long run. The
*evidence* is the capital of a gambler who bets all the same, and began with 1: whatever the source
is, it ever reaches 1/α with a probability of α at most, however often one looks (Ville 1939).

The bets are ε·p^(ε−1) and ε·(1−p)^(ε−1) on a rank p, for some ε each: on stranger pictures than
before, and on less strange ones. As nobody knows when a change comes, the gambler starts them
little by little, with 1/(t(t+1)) of the first capital at picture t, and keeps the rest, 1/(t+1).
So evidence never falls below that, and what has long been as it was does not hide a change.

Memory is limited: of LIMIT + 1 pictures one is forgotten, drawn at random from all of them. Which
picture came last is then as unknown as ever, to what comes later too, so ranks stay independent
and uniform, exactly. What is lost is the distant past: what changes over many more pictures than
the limit is not noticed.
"""

import math
from bisect import bisect_left, bisect_right, insort
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 10_000  # pictures that are remembered
POWERS = np.array([0.25, 0.5, 0.75, 0.9])
LEAST = 1e-12  # of ranks, which are positive and below 1


class Drift:
    """The evidence of a change, from one picture to the next; for one thread."""

    def __init__(
        self, held_out: NDArray[np.floating[Any]], limit: int = LIMIT, seed: int | None = None
    ) -> None:
        """
        Args:
            held_out: strangeness of pictures that the model was not trained on, [n].
            limit: how many pictures are remembered, these included.
            seed: of the draws; by default another one each time.
        """
        self.rng, self.limit = np.random.default_rng(seed), limit
        kept = self.rng.permutation(held_out)[:limit]
        self.remembered: list[float] = np.sort(kept).tolist()
        self.pictures = 0
        self.bets = np.full(2 * len(POWERS), -np.inf)
        """Natural logarithms of the capital in each."""

    @property
    def evidence(self) -> float:
        """Its decimal logarithm: 0 at the start, 2 where chance would get so far once in 100."""
        kept = -math.log(self.pictures + 1)
        return float(np.logaddexp.reduce([kept, *self.bets])) / math.log(10)

    def add(self, strangeness: float) -> None:
        """Takes in one picture; some 20 µs."""
        rank = min(max(self._rank(strangeness), LEAST), 1 - LEAST)
        self.pictures += 1
        begun = -math.log(self.pictures * (self.pictures + 1) * len(self.bets))
        logs = np.log([[rank], [1 - rank]])
        gains = np.log(POWERS) + (POWERS - 1) * logs
        self.bets = np.logaddexp(self.bets, begun) + gains.ravel()

    def _rank(self, strangeness: float) -> float:
        """The share of what is remembered that is stranger, and of ties a random part."""
        remembered = self.remembered
        insort(remembered, strangeness)
        count = len(remembered)
        low, high = bisect_left(remembered, strangeness), bisect_right(remembered, strangeness)
        rank = (count - high + self.rng.random() * (high - low)) / count
        if count > self.limit:
            del remembered[self.rng.integers(count)]
        return rank
