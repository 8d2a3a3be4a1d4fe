"""A rolling window of calls. Owns: how many there were lately, and how many of them failed.

Pure: the time is an argument, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tally:
    """Calls, and how many of them failed."""

    calls: int = 0
    failures: int = 0

    @property
    def failed_percent(self) -> int:
        """Whole per cent, rounded down; 0 where there were no calls."""
        return 100 * self.failures // self.calls if self.calls else 0


@dataclass(frozen=True, slots=True)
class RollingWindow:
    """Calls by the bucket of time in which they ended; the oldest bucket falls out as a whole.

    Attributes:
        length_s: How far it looks back.
        buckets: Into how many parts that is cut.
        tallies: Number of the bucket and its tally, oldest first.
    """

    length_s: float
    buckets: int
    tallies: tuple[tuple[int, Tally], ...] = ()

    def counted(self, now_s: float, *, failed: bool) -> RollingWindow:
        """The window with one call more."""
        number = self._bucket(now_s)
        kept = self._kept(number)
        last = Tally()
        if kept and kept[-1][0] == number:
            last = kept[-1][1]
            kept = kept[:-1]
        tally = Tally(last.calls + 1, last.failures + int(failed))
        return RollingWindow(self.length_s, self.buckets, (*kept, (number, tally)))

    def tally(self, now_s: float) -> Tally:
        """All calls that the window still holds."""
        calls = failures = 0
        for _, tally in self._kept(self._bucket(now_s)):
            calls += tally.calls
            failures += tally.failures
        return Tally(calls, failures)

    def cleared(self) -> RollingWindow:
        """The window without any call."""
        return RollingWindow(self.length_s, self.buckets)

    def _bucket(self, now_s: float) -> int:
        return int(now_s * self.buckets / self.length_s)

    def _kept(self, number: int) -> tuple[tuple[int, Tally], ...]:
        last_gone = number - self.buckets
        # They are in order, so mostly there is nothing to leave out.
        if not self.tallies or self.tallies[0][0] > last_gone:
            return self.tallies
        return tuple(entry for entry in self.tallies if entry[0] > last_gone)
