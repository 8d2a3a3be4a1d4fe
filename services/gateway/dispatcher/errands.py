"""Errands. Owns: what one request still owes the queue, done in order and tried again while it is away.

Must not know: what the errands do. A client is answered before its slot is settled; this is where the
settling waits, bounded, when the store cannot be reached.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from services.common import logs
from services.common.clock import Clock
from services.common.errors import StoreUnavailable

Errand = Callable[[], Awaitable[None]]

# The store's leases end after seconds by themselves; trying longer than this serves nobody.
ERRAND_LIMIT_S = 30.0
# Once a restarted store answers again, slots should be free within a second.
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0


class Errands:
    """Runs errands one after the other in a task that lives while there are any.

    Args:
        clock: Measures how long an errand has been tried.
        on_idle: Is called whenever the last errand is done.
    """

    def __init__(self, clock: Clock, on_idle: Callable[[], None]) -> None:
        self._clock = clock
        self._on_idle = on_idle
        self._waiting: deque[Errand] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is owed."""
        return self._task is None

    def add(self, errand: Errand) -> None:
        """Puts an errand behind those that wait."""
        self._waiting.append(errand)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Gives up what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._do(self._waiting.popleft())
        finally:
            self._waiting.clear()
            self._task = None
            self._on_idle()

    async def _do(self, errand: Errand) -> None:
        began_s, pause_s, crashed = self._clock.monotonic(), RETRY_FIRST_S, False
        while True:
            try:
                await errand()
            except StoreUnavailable:
                if self._clock.monotonic() - began_s > ERRAND_LIMIT_S:
                    logs.get_logger().warning("errand.dropped", reason=StoreUnavailable.reason)
                    return
            except Exception:  # noqa: BLE001 - a defect in one errand must not keep the others from the slot
                logs.get_logger().error("errand.crashed", exc_info=True)
                if crashed:
                    return
                # What is owed is a slot: it is tried once more.
                crashed = True
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_LAST_S)
