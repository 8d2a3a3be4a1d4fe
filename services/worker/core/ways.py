"""Two ways to do the same work. Owns: which one is the faster lately, by what they took; pure.

Which way is the faster depends on the machine, and on who else wants it at the moment: on two idle cores all
threads may well work on one thing together, while beside other processes each waits for whichever of them has
just lost its core. What a piece of work takes drifts by more than the ways differ, so only two pieces that
were done one after the other are compared, now and then, and the median of some such pairs decides.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# Pairs whose median decides: a thread that lost its core for once says nothing of a way.
PAIRS = 9
# So many are made at once in the beginning.
FIRST_PAIRS = 5
# Pieces of work until the next pair, twice as many each time that the other way was much slower.
NEXT_PAIR = 24
NEXT_PAIR_MAX = 384
MUCH_SLOWER = 1.25
# The other way is taken from then on where it is faster by more than chance.
FASTER = 0.97


def _pairs(ratios: Iterable[float] = ()) -> deque[float]:
    return deque(ratios, PAIRS)


@dataclass(slots=True)
class Ways:
    """Two ways, 0 and 1, to do work of about one size.

    Attributes:
        best: The one that is taken.
    """

    best: int = 0
    # Of each pair the time of the other way, as a part of that of the best.
    _ratios: deque[float] = field(default_factory=_pairs)
    # What a unit took in the best way the last time, where no pair was made with it.
    _unit_s: float | None = None
    _pause: int = NEXT_PAIR
    _left: int = 0

    def choose(self) -> int:
        """Says which way is taken this time."""
        return 1 - self.best if self._unit_s is not None and self._left <= 0 else self.best

    def note(self, way: int, units: float, took_s: float) -> None:
        """Takes in how long a piece of work of so many units took in one of the ways."""
        if way == self.best:
            self._unit_s, self._left = took_s / units, self._left - 1
        elif self._unit_s is not None:
            self._ratios.append(took_s / units / self._unit_s)
            self._unit_s = None
            self._judge()

    def fail(self, way: int) -> None:
        """A piece of work failed in one of the ways: the other one is taken for a while."""
        self.best, self._unit_s = 1 - way, None
        self._ratios = _pairs([2 * MUCH_SLOWER] * PAIRS)
        self._pause = self._left = NEXT_PAIR_MAX

    def _judge(self) -> None:
        if len(self._ratios) < FIRST_PAIRS:
            return
        median = statistics.median(self._ratios)
        if median < FASTER:
            self.best = 1 - self.best
            self._ratios = _pairs(1 / ratio for ratio in self._ratios)
            median = 1 / median
            self._pause = NEXT_PAIR
        self._pause = min(2 * self._pause, NEXT_PAIR_MAX) if median > MUCH_SLOWER else NEXT_PAIR
        self._left = self._pause
