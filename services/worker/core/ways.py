"""Several ways to do the same work. Owns: which one is the fastest lately, by what they took; pure.

Which way is the fastest depends on the machine, and on who else wants it at the moment: on two idle cores all
threads may well work on one thing together, while beside other processes each waits for whichever of them has
just lost its core. So every way is tried now and then, the worse it was the less often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# The share of the latest time in the mean of the way that is taken, and how often the mean it counts at most:
# a thread that lost its core for once says nothing of the way.
LATEST = 0.1
LATEST_MAX = 2.0
# Of a way that is not taken the best of so many tries counts, for the same reason.
TRIES = 2
# A way that was not chosen is tried again after so many pieces of work, twice as many each time that it was
# slower by more than a quarter.
TRY_AGAIN = 32
TRY_AGAIN_MAX = 512
MUCH_SLOWER = 1.25


@dataclass(slots=True)
class _Way:
    """What is known of one way.

    Attributes:
        mean_s: The time of a unit of work: the mean lately, or the best of the last tries; None: never tried.
        tries: The times of the last tries, since it was taken last.
        pause: So many pieces of work go by until it is tried again.
        left: How many of them are left.
    """

    mean_s: float | None = None
    tries: tuple[float, ...] = ()
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
            way.tries = (*way.tries, unit_s)[-TRIES:]
            way.mean_s = min(way.tries)
        else:
            way.tries = ()
            way.mean_s += LATEST * (min(unit_s, LATEST_MAX * way.mean_s) - way.mean_s)
        best_s = self._ways[self._best()].mean_s or 0.0
        way.pause = min(2 * way.pause, TRY_AGAIN_MAX) if way.mean_s > MUCH_SLOWER * best_s else TRY_AGAIN
        way.left = way.pause

    def fail(self, index: int) -> None:
        """A piece of work failed in one of the ways: another one is taken for a while."""
        way = self._ways[index]
        way.mean_s, way.tries, way.pause, way.left = math.inf, (), TRY_AGAIN_MAX, TRY_AGAIN_MAX

    def _best(self) -> int:
        tried = [(way.mean_s, index) for index, way in enumerate(self._ways) if way.mean_s is not None]
        return min(tried)[1]
