"""Who listens to a resumable request. Owns: when one that nobody follows any more is given up.

Must not know: what is followed. Clients may follow at other gateways too; the log knows of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.common.errors import StoreUnavailable

# Others look every second; whoever was there this long ago may be between two looks.
LOOK_AGAIN_S = 1.0


class Attendance:
    """Counts the clients that follow a request here.

    Args:
        grace_s: How long it goes on by itself.
        unattended_s: Asks how long ago a client followed it at another gateway; None: never.
        give_up: Is called once nobody has come back in time.
    """

    def __init__(
        self,
        grace_s: float,
        unattended_s: Callable[[], Awaitable[float | None]],
        give_up: Callable[[], None],
    ) -> None:
        self._grace_s = grace_s
        self._unattended_s = unattended_s
        self._give_up = give_up
        self._present = 0
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    def leave_alone(self) -> None:
        """Nobody is there yet; the time runs."""
        if self._watch is None and not self._closed:
            self._watch = asyncio.get_running_loop().create_task(self._watch_over(), name="attendance")

    def come(self) -> None:
        """A client follows."""
        self._present += 1
        self._stop()

    def go(self) -> None:
        """A client has gone."""
        self._present -= 1
        if self._present == 0:
            self.leave_alone()

    def close(self) -> None:
        """The request has ended."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _watch_over(self) -> None:
        wait_s = self._grace_s
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = await self._left_s()
        self._watch = None
        self._give_up()

    async def _left_s(self) -> float:
        """How much longer to wait, by what other gateways' clients do."""
        try:
            ago_s = await self._unattended_s()
        except StoreUnavailable:
            return LOOK_AGAIN_S
        return 0.0 if ago_s is None else self._grace_s - ago_s
