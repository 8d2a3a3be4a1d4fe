"""The timers of one request. Owns: when its deadline has passed, and when a wait for a worker is over.

Must not know: what follows from that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.gateway.core.request_events import DeadlinePassed, WaitedOut

# The wait for a worker begins again while it is in vain: where none is allowed, it is still no busy loop.
AWAIT_LEAST_S = 0.05


class Timers:
    """The deadline runs from the beginning, the wait whenever it is asked for.

    Args:
        left_s: Time until the deadline.
        failover_wait_s: How long a wait for a worker is.
        apply: Hears that one is over.
    """

    def __init__(
        self, left_s: float, failover_wait_s: float, apply: Callable[[DeadlinePassed | WaitedOut], None]
    ) -> None:
        self._failover_wait_s = max(failover_wait_s, AWAIT_LEAST_S)
        self._apply = apply
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.call_later(max(left_s, 0.0), apply, DeadlinePassed())
        self._failover: asyncio.TimerHandle | None = None

    def await_worker(self) -> None:
        """Begins a wait; an earlier one is forgotten."""
        self._stop_waiting()
        self._failover = self._loop.call_later(self._failover_wait_s, self._apply, WaitedOut())

    def close(self) -> None:
        """The request has ended."""
        self._deadline.cancel()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._failover is not None:
            self._failover.cancel()
