"""A clock that a test turns by hand."""

from __future__ import annotations


class TurnedClock:
    """Time stands still until `turn`."""

    def __init__(self, now_s: float = 1_000.0) -> None:
        self._now_s = now_s

    def turn(self, seconds: float) -> None:
        """Lets time pass."""
        self._now_s += seconds

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self._now_s

    def now(self) -> float:
        """See `Clock.now`."""
        return self._now_s
