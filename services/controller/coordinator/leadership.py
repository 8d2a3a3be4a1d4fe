"""One controller among several. Owns: when this process leads, and what exists only while it does.

Each time of leading begins afresh, from what is on disk, in the store, and what members report: what another
controller did meanwhile is in there, and nothing that this one remembers of an earlier time contradicts it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from services.common import logs
from services.common.clock import Clock
from services.common.errors import InterlockError, NotLeader, StoreUnavailable
from services.controller.coordinator import rounds
from services.controller.coordinator.coordinator import TICK_S, Coordinator
from services.controller.coordinator.tenure import Tenure
from services.controller.core.election import Election
from services.controller.core.ports import Lead
from services.controller.core.records import Standing

# How often one that does not lead looks whether it may.
LOOK_S = 0.5
# Whoever has the lead and cannot use it for so long, for want of its disk perhaps, lets another one try.
BEGIN_S = 15.0


class Term(Protocol):
    """What exists while a controller leads."""

    @property
    def coordinator(self) -> Coordinator:
        """Leads the members."""
        ...

    def close(self) -> None:
        """Ends what runs for operators."""
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
            tenure = Tenure(self._lead, await self._elected(), self._clock, ttl_s=self._ttl_s)
            self.refuse("The controller begins to lead; ask again.")
            async with _renewed(tenure):
                used = await self._lead_once(tenure)
            if not used and not tenure.lost:
                logs.get_logger().error("lead.unused", fence=tenure.fence)
                await self.leave()
                # Another one may have a disk that answers.
                await asyncio.sleep(2 * self._ttl_s)

    def refuse(self, why: str) -> None:
        """Members and operators hear this from now on, until there is something else to say."""
        self._refusal = NotLeader.at_the_door(why, retry_after_s=TICK_S)

    async def leave(self) -> None:
        """Lets the lead go, so that the next controller need not wait for the lease to end.

        Call it once `run` has ended.
        """
        with contextlib.suppress(StoreUnavailable):
            await self._lead.leave()

    async def _elected(self) -> int:
        """Waits until we may lead; returns the fencing number."""
        told: str | None = None
        task = asyncio.current_task()
        assert task is not None
        # A store's library may swallow a cancellation that meets its answer; the task still knows of it.
        while not task.cancelling():
            standing = await self._asked()
            if standing is not None:
                if standing.fence:
                    logs.get_logger().info("controller.elected", fence=standing.fence)
                    return standing.fence
                self.refuse(_leader_of(standing.leader_id))
                if told != standing.leader_id:
                    told = standing.leader_id
                    logs.get_logger().info("controller.standing_by", leader=told or "nobody")
            await asyncio.sleep(LOOK_S)
        raise asyncio.CancelledError

    async def _asked(self) -> Standing | None:
        """How we stand; None: the store cannot be reached."""
        now_s, election = self._clock.monotonic(), self._election
        try:
            standing = await self._lead.take(
                may_found=election.may_found(now_s), may_replace=election.may_replace()
            )
        except StoreUnavailable as error:
            if not election.answered:
                self._refusal = error
            return None
        self._election = election.after(standing, now_s)
        return standing

    async def _lead_once(self, tenure: Tenure) -> bool:
        """Leads until we are deposed; returns whether it came so far that anybody was led."""
        try:
            term = await self._begin(tenure)
        except OSError as error:
            logs.get_logger().error("lead.unusable", reason=error.strerror, exc_info=error)
            return False
        try:
            return await self._serve(term)
        finally:
            self._term = None
            self.refuse("This controller does not lead any more; ask another one.")
            term.coordinator.close("The controller does not lead any more.")
            term.close()

    async def _serve(self, term: T) -> bool:
        coordinator = term.coordinator
        leading = asyncio.create_task(rounds.run(coordinator, self._clock), name="controller.coordinator")
        beginning = asyncio.create_task(coordinator.led.wait(), name="controller.beginning")
        deposed = asyncio.create_task(coordinator.deposed.wait(), name="controller.deposed")
        try:
            both = {leading, deposed}
            await asyncio.wait({*both, beginning}, timeout=BEGIN_S, return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                # Before that it knows no rollout, and whoever asks would be told so.
                self._term = term
                await self._on_change(True)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if leading.done():
                # It ends by itself only by a defect.
                leading.result()
            return beginning.done()
        finally:
            for task in (leading, beginning, deposed):
                task.cancel()
            await asyncio.gather(leading, beginning, deposed, return_exceptions=True)
            await self._on_change(False)


@contextlib.asynccontextmanager
async def _renewed(tenure: Tenure) -> AsyncIterator[None]:
    """Keeps the lease while the block runs."""
    renewing = asyncio.create_task(tenure.run(), name="controller.tenure")
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


def _leader_of(leader_id: str) -> str:
    if not leader_id:
        return "No controller leads yet; ask again."
    return f"The controller {leader_id} leads; this one stands by."
