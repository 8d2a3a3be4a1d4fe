"""Ids, claimed beside the calls of their jobs. Owns: when a job's claim is made, and who waits for it.

In a cluster the key of an id is another node's than its job's: that the claim alone fails nobody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine

from services.common.errors import StoreUnavailable
from services.gateway.core.jobs import QueuedJob
from services.gateway.core.log import Claim
from services.gateway.core.ports import RequestDirectory
from services.gateway.core.queue_limits import QueueLimits

# A node that is there has answered by then; for one that is not, each of many jobs would be held up.
CLAIM_WAIT_S = 0.2
# Claims that are made up for at a time; what a node that is away makes more of is left.
BEHIND_MAX = 4_096


class JobClaims:
    """Lets the ids that clients gave to jobs stand for them.

    Args:
        directory: What ids stand for.
        limits: How long they do so after the job's end.
    """

    def __init__(self, directory: RequestDirectory, limits: QueueLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._under_way: set[asyncio.Task[None]] = set()
        # One call after another: those to a node that is away shall not keep the others from the store.
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def beside(self, job: QueuedJob) -> AsyncIterator[None]:
        """Claims the job's id beside the one call of it that the block makes.

        That call goes first, so that none that comes later overtakes it, and the claim travels with it. A
        claim that is not answered goes on by itself.
        """
        if not job.digest:
            yield
            return
        claiming = self._begin(self._claim(job))
        try:
            yield
        except BaseException:
            claiming.cancel()
            raise
        await asyncio.wait((claiming,), timeout=CLAIM_WAIT_S)

    def behind(self, job: QueuedJob) -> None:
        """Claims the id of a job that is taken in by now, when it has its turn; nobody waits for it.

        Of a resumable one alone: others may have ended by then, and their ids be free.
        """
        if job.digest and job.payload and len(self._under_way) < BEHIND_MAX:
            self._begin(self._claim_in_turn(job))

    async def close(self) -> None:
        """Gives up what is under way."""
        under_way = tuple(self._under_way)
        for one in under_way:
            one.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def _begin(self, claim: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(claim, name="id-claim")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _claim_in_turn(self, job: QueuedJob) -> None:
        async with self._turn:
            await self._claim(job)

    async def _claim(self, job: QueuedJob) -> None:
        kept_s = self._limits.resume_ttl_s if job.payload else self._limits.record_ttl_s
        with contextlib.suppress(StoreUnavailable):
            await self._directory.claim(job.job_id, Claim(job.model, job.digest), job.timeout_s + kept_s)
