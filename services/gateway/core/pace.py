"""The pace of events. Owns: how long tokens wait for later ones, so that events cost a bounded time. Pure.

An event costs the gateway, Envoy and the client the same, however many tokens it carries; on one machine they
take that time from the workers. Few streams hear of every token as it comes. Of many each hears less often.
"""

from __future__ import annotations

# Six times a second is fluent for who reads along.
HOLD_S_MAX = 0.16
# Steps take longer on most machines: so short a hold would join nothing.
HOLD_S_MIN = 0.005
# Streams come and go all the time; a hold that differs by less is as good.
CHANGE = 1.25


class Pace:
    """What workers are asked for.

    Attributes:
        hold_ms: How long they are to hold tokens back, in milliseconds; 0: not at all.

    Args:
        events_per_s: What all streams together hear in a second; 0: no bound.
    """

    def __init__(self, events_per_s: float) -> None:
        self._events_per_s = events_per_s
        self._streams = 0
        self.hold_ms = 0

    def follow(self, change: int) -> bool:
        """So many more streams run, or fewer; returns whether workers are to be asked for another hold."""
        self._streams += change
        if not self._events_per_s:
            return False
        hold_s = min(self._streams / self._events_per_s, HOLD_S_MAX)
        hold_ms = round(hold_s * 1_000) if hold_s >= HOLD_S_MIN else 0
        low, high = sorted((hold_ms, self.hold_ms))
        if low == high or (low and high < CHANGE * low and hold_ms < HOLD_S_MAX * 1_000):
            return False
        self.hold_ms = hold_ms
        return True
