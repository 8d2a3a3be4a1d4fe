"""The client's side of a stream. Owns: when a client that does not read counts as stalled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.common.clock import Clock
from services.common.errors import ClientStalled
from services.common.standstill import OWN_PAUSE_S, stood_still
from services.gateway.dispatcher.streams import HangUp


class ReaderWatch:
    """Watches how long a reader is away between two events.

    One timer serves many events: it looks when the first of them would be too old, and sets itself again.

    Attributes:
        stalled: What the reader is told once it was away for too long; None before.

    Args:
        clock: Measures.
        stall_s: How long a reader may be away.
        on_stall: Is called, once, when it is away longer, with what it is told if it comes back.
    """

    def __init__(self, clock: Clock, stall_s: float, on_stall: Callable[[ClientStalled], None]) -> None:
        self._clock = clock
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._hang_up: HangUp | None = None
        self.stalled: ClientStalled | None = None
        self._left_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        # When the timer is due, of the loop's clock.
        self._due_s = 0.0

    def watched(self, hang_up: HangUp) -> None:
        """See `AnswerStream.watched`."""
        self._hang_up = hang_up

    def returned(self) -> None:
        """The reader asks for an event."""
        self._left_s = None

    def left(self) -> None:
        """The reader goes away with an event."""
        self._left_s = self._clock.monotonic()
        if self._timer is None and self.stalled is None:
            self._arm(self._stall_s)

    def took(self) -> None:
        """The reader has taken a part of its event."""
        if self._left_s is not None:
            self._left_s = self._clock.monotonic()

    def close(self) -> None:
        """Stops watching."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._due_s = loop.time() + delay_s
        self._timer = loop.call_at(self._due_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._left_s is None:
            return
        if stood_still(self._due_s, asyncio.get_running_loop().time()):
            # The reader too. A write that has ended meanwhile is told about in the loop's next rounds.
            self._arm(OWN_PAUSE_S)
            return
        left_s = self._stall_s - (self._clock.monotonic() - self._left_s)
        if left_s > 0:
            self._arm(left_s)
        else:
            self._stall()

    def _stall(self) -> None:
        self.stalled = ClientStalled(f"The client read nothing for {self._stall_s:g} s.")
        self._on_stall(self.stalled)
        if self._hang_up is not None:
            self._hang_up(self.stalled)
