"""One controller among several. Owns: when this process leads, and what exists only while it does.

Each time of leading begins afresh, from what is on disk, in the store, and what members report: what another
controller did meanwhile is in there, and nothing that this one remembers of an earlier time contradicts it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from services.common import logs
from services.common.clock import Clock
from services.common.errors import InterlockError, NotLeader, StoreUnavailable
from services.controller.coordinator import rounds
from services.controller.coordinator.coordinator import TICK_S, Coordinator
from services.controller.coordinator.tenure import Tenure
from services.controller.core.election import Election
from services.controller.core.ports import Lead

# How often one that does not lead looks whether it may.
LOOK_S = 0.5


class Term(Protocol):
    """What exists while a controller leads."""

    @property
    def coordinator(self) -> Coordinator:
        """Leads the members."""
        ...


T = TypeVar("T", bound=Term)


class Leadership(Generic[T]):
    """Leads whenever it may.

    Args:
        lead: The lease.
        begin: Makes what exists while we lead.
        clock: The time.
        ttl_s: How long the lease holds without renewal.
        on_change: Is told whether members and operators are welcome.
    """

    def __init__(
        self,
        lead: Lead,
        begin: Callable[[Tenure], Awaitable[T]],
        clock: Clock,
        *,
        ttl_s: float,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._lead = lead
        self._begin = begin
        self._clock = clock
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._election = Election(ttl_s)
        self._term: T | None = None
        self._refusal: InterlockError = StoreUnavailable(
            "The controller has not reached its store yet.", retry_after_s=TICK_S
        )

    @property
    def term(self) -> T:
        """What exists while we lead.

        Raises:
            NotLeader: Another controller leads, or nobody does yet.
            StoreUnavailable: The store was never reached.
        """
        if self._term is None:
            raise self._refusal
        return self._term

    async def run(self) -> None:
        """Asks for the lead and leads, again and again, until it is cancelled."""
        while True:
            fence = await self._elected()
            self._refuse("The controller begins to lead; ask again.")
            tenure = Tenure(self._lead, fence, self._clock, ttl_s=self._ttl_s)
            term = await self._begin(tenure)
            try:
                self._term = term
                await self._serve(term.coordinator)
            finally:
                self._term = None
                self._refuse("The controller does not lead any more; another one does.")
                term.coordinator.close("The controller is shutting down.")

    async def leave(self) -> None:
        """Lets the lead go, so that the next controller need not wait for the lease to end.

        Call it once `run` has ended.
        """
        with contextlib.suppress(StoreUnavailable):
            await self._lead.leave()

    async def _elected(self) -> int:
        """Waits until we may lead; returns the fencing number."""
        told: str | None = None
        while True:
            now_s, election = self._clock.monotonic(), self._election
            try:
                standing = await self._lead.take(
                    may_found=election.may_found(now_s), may_replace=election.may_replace()
                )
            except StoreUnavailable as error:
                self._refusal = error if not election.answered else self._refusal
                standing = None
            if standing is not None:
                self._election = election.after(standing, now_s)
                if standing.fence:
                    logs.get_logger().info("controller.elected", fence=standing.fence)
                    return standing.fence
                self._refuse(_leader_of(standing.leader_id))
                if told != standing.leader_id:
                    told = standing.leader_id
                    logs.get_logger().info("controller.standing_by", leader=told or "nobody")
            await asyncio.sleep(LOOK_S)

    async def _serve(self, coordinator: Coordinator) -> None:
        """Leads until we are deposed."""
        leading = asyncio.create_task(rounds.run(coordinator, self._clock), name="controller.coordinator")
        telling = asyncio.create_task(self._welcome(coordinator), name="controller.welcome")
        deposed = asyncio.create_task(coordinator.deposed.wait(), name="controller.deposed")
        try:
            ended, _ = await asyncio.wait({leading, deposed}, return_when=asyncio.FIRST_COMPLETED)
            if leading in ended:
                # It ends by itself only by a defect.
                leading.result()
        finally:
            for task in (leading, telling, deposed):
                task.cancel()
            await asyncio.gather(leading, telling, deposed, return_exceptions=True)
            await self._on_change(False)

    async def _welcome(self, coordinator: Coordinator) -> None:
        await coordinator.led.wait()
        await self._on_change(True)

    def _refuse(self, why: str) -> None:
        self._refusal = NotLeader(why, retry_after_s=TICK_S)


def _leader_of(leader_id: str) -> str:
    if not leader_id:
        return "No controller leads yet; ask again."
    return f"The controller {leader_id} leads; this one stands by."
