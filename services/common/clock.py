"""Time as an argument. Owns: the port through which time is read. Pure: cores may name it."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Where seconds come from."""

    def monotonic(self) -> float:
        """Seconds that never go back, for durations and deadlines."""
        ...

    def now(self) -> float:
        """Seconds since the epoch, for what other machines and people read."""
        ...
