"""Looks that are made later. Owns: when a queue looks again for what is free, as a worker's hold ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# A refusal or failure schedules one look when the worker may be used again; more at once say nothing new.
LOOKS_MAX = 64


class Looks:
    """Looks that are still to be made. Close it when done."""

    def __init__(self) -> None:
        self._timers: set[asyncio.TimerHandle] = set()

    def after(self, delay_s: float, look: Callable[[], None]) -> None:
        """Looks when a held worker may be used; otherwise its slots idle until the next call."""
        if len(self._timers) >= LOOKS_MAX:
            return

        def make() -> None:
            self._timers.discard(timer)
            look()

        timer = asyncio.get_running_loop().call_later(delay_s, make)
        self._timers.add(timer)

    def close(self) -> None:
        """Makes none of them any more."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
