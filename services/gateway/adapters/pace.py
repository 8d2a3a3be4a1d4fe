"""The pace of events. Owns: when streams have their turns, so that all their events cost a bounded time.

An event costs the gateway, Envoy and the client the same, however many tokens it carries; on one machine they
take that time from the workers. Few streams hear of every token as it comes. Many have turns, in which each
hears of all that came since the last one. All have the same turns: what happens together costs less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Ten times a second is fluent for who reads along.
PAUSE_MAX_S = 0.1
# The tokens of one step arrive together: so long after its beginning it is still the same turn.
TURN_S = 0.002


class Pace:
    """Counts the streams that run here, and gives them turns.

    Args:
        events_per_s: What all streams together hear in a second; 0: no bound.
    """

    def __init__(self, events_per_s: float) -> None:
        self._events_per_s = events_per_s
        self._streams = 0
        self._began_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        # In the order in which they came.
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def pause_s(self) -> float:
        """How long it is from one turn to the next, in seconds."""
        if not self._events_per_s:
            return 0.0
        return min(self._streams / self._events_per_s, PAUSE_MAX_S)

    def begin(self, streams: int) -> None:
        """So many more run."""
        self._streams += streams

    def end(self, streams: int) -> None:
        """So many have ended."""
        self._streams -= streams

    def await_turn(self, told_s: float, come: Callable[[], None]) -> bool:
        """Returns whether a stream may be told now; otherwise `come` is called at the next turn.

        Args:
            told_s: When it was told last, on the loop's clock: one that was told nothing for a whole pause
                need not wait, for its worker is slow, or stood still.
            come: Is called in a turn, once.
        """
        pause_s = self.pause_s
        if pause_s <= TURN_S:
            return True
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        since_s = now_s - self._began_s
        if since_s >= pause_s and self._timer is None:
            self._began_s = now_s
            return True
        if since_s <= TURN_S or now_s - told_s >= pause_s:
            return True
        self._waiting[come] = None
        if self._timer is None:
            self._timer = loop.call_later(pause_s - since_s, self._turn)
        return False

    def forgo(self, come: Callable[[], None]) -> None:
        """Whoever waits does not wait any more."""
        self._waiting.pop(come, None)

    def _turn(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        self._began_s = loop.time()
        waiting, self._waiting = self._waiting, {}
        for come in waiting:
            # A call of its own: what one of them raises is no other one's.
            loop.call_soon(come)
