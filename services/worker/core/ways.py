"""Several ways to do the same work. Owns: which one is the fastest lately, by what they took; pure.

Which way is the fastest depends on the machine, and on who else wants it at the moment: on two idle cores all
threads may well work on one thing together, while beside other processes each waits for whichever of them has
just lost its core. So every way is tried now and then, the worse it was the less often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# The share of the latest time in the mean of the way that is taken. The last try of another says it all.
LATEST = 0.25
# A way that was not chosen is tried again after so many pieces of work, twice as many each time that it was
# slower by more than a quarter.
TRY_AGAIN = 32
TRY_AGAIN_MAX = 512
MUCH_SLOWER = 1.25


@dataclass(slots=True)
class _Way:
    """What is known of one way.

    Attributes:
        mean_s: The time of a unit of work: the mean lately, or the last one; None: never tried.
        pause: So many pieces of work go by until it is tried again.
        left: How many of them are left.
    """

    mean_s: float | None = None
    pause: int = TRY_AGAIN
    left: int = TRY_AGAIN


@dataclass(slots=True)
class Ways:
    """Ways to do work of about one size.

    Attributes:
        count: How many ways there are.
    """

    count: int
    _ways: Sequence[_Way] = field(init=False)

    def __post_init__(self) -> None:
        self._ways = tuple(_Way() for _ in range(self.count))

    def choose(self) -> int:
        """Says which way is taken this time."""
        for index, way in enumerate(self._ways):
            if way.mean_s is None:
                return index
        best = self._best()
        for index, way in enumerate(self._ways):
            if index == best:
                continue
            way.left -= 1
            if way.left <= 0:
                return index
        return best

    def note(self, index: int, units: float, took_s: float) -> None:
        """Takes in how long a piece of work of so many units took in one of the ways."""
        way, unit_s = self._ways[index], took_s / units
        if way.mean_s is None or index != self._best():
            way.mean_s = unit_s
        else:
            way.mean_s += LATEST * (unit_s - way.mean_s)
        best_s = self._ways[self._best()].mean_s or 0.0
        way.pause = min(2 * way.pause, TRY_AGAIN_MAX) if way.mean_s > MUCH_SLOWER * best_s else TRY_AGAIN
        way.left = way.pause

    def _best(self) -> int:
        tried = [(way.mean_s, index) for index, way in enumerate(self._ways) if way.mean_s is not None]
        return min(tried)[1]
