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
        entries: Number of the bucket, its calls and its failures, oldest first.
    """

    length_s: float
    buckets: int
    entries: tuple[tuple[int, int, int], ...] = ()

    def counted(self, now_s: float, *, failed: bool) -> RollingWindow:
        """The window with one call more."""
        number = self._bucket(now_s)
        kept = self._kept(number)
        calls = failures = 0
        if kept and kept[-1][0] == number:
            _, calls, failures = kept[-1]
            kept = kept[:-1]
        entry = number, calls + 1, failures + failed
        return RollingWindow(self.length_s, self.buckets, (*kept, entry))

    def tally(self, now_s: float) -> Tally:
        """All calls that the window still holds."""
        calls = failures = 0
        for _, ended, failed in self._kept(self._bucket(now_s)):
            calls += ended
            failures += failed
        return Tally(calls, failures)

    def cleared(self) -> RollingWindow:
        """The window without any call."""
        return RollingWindow(self.length_s, self.buckets)

    def _bucket(self, now_s: float) -> int:
        return int(now_s * self.buckets / self.length_s)

    def _kept(self, number: int) -> tuple[tuple[int, int, int], ...]:
        last_gone = number - self.buckets
        # They are in order, so mostly there is nothing to leave out.
        if not self.entries or self.entries[0][0] > last_gone:
            return self.entries
        return tuple(entry for entry in self.entries if entry[0] > last_gone)
