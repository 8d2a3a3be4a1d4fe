"""The time in which one controller leads. Owns: the lease's renewal, and what follows where it fails.

A lease that lapses is first only doubted: the store may be away for everybody. Then silence of members proves
nothing, for they may speak to another controller by now. Later it is given up, so that they look for one.
Renewal waits for nothing else that a controller does: a slow disk must not cost the lead.
"""

from __future__ import annotations

import asyncio
import contextlib

from services.common import logs
from services.common.clock import Clock
from services.common.errors import StoreUnavailable
from services.controller.core.ports import FenceStale, Lead

# A lease holds for several of these.
RENEW_S = 1.0
# Members of a controller that has lost its store must find the one that has it long before the records of
# the workers end; the store's restart, on the other hand, shall not send everybody about.
STEP_DOWN_S = 7.0


class Tenure:
    """Keeps the lead.

    Args:
        lead: The lease.
        fence: The fencing number that came with it.
        clock: The time.
        ttl_s: How long the lease holds without renewal.

    Attributes:
        lost: Whether another controller leads.
    """

    def __init__(self, lead: Lead, fence: int, clock: Clock, *, ttl_s: float) -> None:
        self._lead = lead
        self._fence = fence
        self._clock = clock
        self._ttl_s = ttl_s
        self._kept_s = clock.monotonic()
        # Of the first renewal that failed since; a process that slept has not tried yet.
        self._failing_s: float | None = None
        # Two calls that cross would let the lease bear the lower number.
        self._one_at_a_time = asyncio.Lock()
        self.lost = False

    @property
    def fence(self) -> int:
        """The fencing number that the lease bears."""
        return self._fence

    @property
    def doubtful(self) -> bool:
        """Whether another controller may lead by now."""
        return self._clock.monotonic() - self._kept_s >= self._ttl_s

    @property
    def over(self) -> str:
        """Why it is time to let the members go: another one leads, or renewals fail; else empty."""
        failing_s = self._failing_s
        if self.lost:
            return "Another controller leads."
        if failing_s is not None and self._clock.monotonic() - failing_s >= STEP_DOWN_S:
            return "The controller has lost its store."
        return ""

    async def keep(self, fence: int = 0) -> None:
        """Renews the lease; it bears `fence` from now on, where that is above what it bore.

        Raises:
            FenceStale: Another controller leads.
            StoreUnavailable: The store cannot be reached.
        """
        async with self._one_at_a_time:
            asked_s, wanted = self._clock.monotonic(), max(fence, self._fence)
            try:
                await self._lead.keep(wanted)
            except StoreUnavailable:
                if self._failing_s is None:
                    self._failing_s = asked_s
                raise
            except FenceStale:
                self.lost = True
                raise
            self._fence, self._kept_s, self._failing_s = wanted, asked_s, None

    async def run(self) -> None:
        """Renews until another controller leads, or it is cancelled."""
        with contextlib.suppress(FenceStale):
            while True:
                try:
                    await self.keep()
                except StoreUnavailable as error:
                    logs.get_logger().debug("lease.unrenewed", reason=error.message)
                await asyncio.sleep(RENEW_S)
