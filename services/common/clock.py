"""Time as an argument. Owns: the port through which shells read clocks; cores receive plain numbers."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where seconds come from."""

    def monotonic(self) -> float:
        """Seconds that never go back, for durations and deadlines."""
        ...

    def now(self) -> float:
        """Seconds since the epoch, for what other machines and people read."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def now(self) -> float:
        """See `Clock.now`."""
        return time.time()
