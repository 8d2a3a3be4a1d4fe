"""The dispatcher. Owns: every request of this gateway from submission to settlement, and who may join it.

Must not know: Redis, gRPC, tokens of identity or APIs. Its rounds compare what it knows with the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from services.common.clock import Clock
from services.common.errors import (
    Draining,
    InterlockError,
    RequestCancelled,
    RequestUnknown,
    StoreUnavailable,
)
from services.gateway.core.log import Notice, NoticeKind
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import JobQueue, Meter, WorkerPool
from services.gateway.core.queue_errors import WorkersBarred, exists_with_other_body, in_use
from services.gateway.dispatcher import farewell
from services.gateway.dispatcher.direct_stream import DirectStream
from services.gateway.dispatcher.farewell import RETRY_WHEN_DRAINING_S
from services.gateway.dispatcher.follower import Follower
from services.gateway.dispatcher.generation import Generation
from services.gateway.dispatcher.limits import GenerationLimits
from services.gateway.dispatcher.resumption import Claimed, Resumption
from services.gateway.dispatcher.room import Room
from services.gateway.dispatcher.rounds import Register, Rounds, cancelled
from services.gateway.dispatcher.search import search
from services.gateway.dispatcher.streams import AnswerStream, see_off

# Grants whose message was lost are found within this time, and it is the gateway's sign of life.
RENEW_S = 1.0
# Ids whose end is remembered: cancelling one that has just ended is no error, and the attempts of another
# request by it have other numbers.
ENDED_MAX = 4_096
# A renewal takes milliseconds; without Redis nobody would hear it.
TELL_LEAVING_S = 1.0
# Withdrawn requests need a moment to give their slots back; leases free them otherwise.
SETTLE_GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherLimits:
    """Bounds of the dispatcher; the settings of the same names say why."""

    requests_max: int = 4_096
    worker_wait_s: float = 15.0
    renew_s: float = RENEW_S


class Dispatcher:
    """Submits requests and looks after them.

    Attributes:
        room: How many requests this process may carry; those under way here are counted.

    Args:
        queue: Where slots come from.
        workers: Who generates.
        clock: Measures.
        resumption: Logs, and who follows them.
        meter: Counts what becomes of requests.
        models: The models that are served now; their queues are looked after even when nobody waits here.
        jitter: Draws a number from 0 to 1, so that gateways do not reap in step.
        limits: Bounds of the dispatcher.
        generation_limits: Bounds of each request.
        is_replaced: Whether a rollout replaces a model's revision.
        is_own: Whether a model is one of this mesh; of others nothing here depends.
    """

    def __init__(  # noqa: PLR0913 - one is made, and each is given by name
        self,
        queue: JobQueue,
        workers: WorkerPool,
        clock: Clock,
        resumption: Resumption,
        *,
        meter: Meter,
        models: Callable[[], Iterable[str]],
        jitter: Callable[[], float],
        limits: DispatcherLimits,
        generation_limits: GenerationLimits,
        is_replaced: Callable[[str], bool] = lambda _: False,
        is_own: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._clock = clock
        self._resumption = resumption
        self._meter = meter
        self._generation_limits = generation_limits
        self._live: dict[str, Generation] = {}
        self.room = Room(limits.requests_max, lambda: len(self._live))
        # With the number of the last attempt.
        self._ended: OrderedDict[str, int] = OrderedDict()
        # Live submissions, not resumable, whose ids are theirs: claimed for them, or accepted by the queue.
        self._claims: set[str] = set()
        self._emptied = asyncio.Event()
        self._draining = False
        self._chores: set[asyncio.Task[None]] = set()
        self._rounds = Rounds(
            queue,
            Register(
                self._live, self._create, resumption.welcome, resumption.words, lambda: not self._draining
            ),
            clock,
            models=models,
            jitter=jitter,
            renew_s=limits.renew_s,
            worker_wait_s=limits.worker_wait_s,
            is_replaced=is_replaced,
            is_own=is_own,
        )
        queue.on_grant(self._rounds.deliver)
        queue.on_notice(self._hear)

    @property
    def store_reachable(self) -> bool:
        """Whether the queue answered when it was last asked about this mesh's own models."""
        return self._rounds.store_reachable

    @property
    def live(self) -> int:
        """Requests that have not ended, or still owe something to the queue."""
        return len(self._live)

    @property
    def following(self) -> int:
        """Clients that follow a resumable request here, wherever it runs."""
        return self._resumption.following

    async def submit(self, job: GenerationJob) -> AnswerStream:
        """Accepts a job; iterate over what is returned, and close it.

        A resumable one that was accepted before is followed from its beginning, wherever it runs. Its client
        may be cut off at any moment and come back: what was begun for it goes on to its end.

        Raises:
            QueueFull: The queue, or this process, is at its bound.
            WorkersBarred: No worker of the model may be asked; the id stands for nothing again.
            RequestExists: The id is in use.
            StoreUnavailable: The queue cannot be reached.
            Draining: This gateway shuts down.
        """
        self._check_room(job)
        if not job.resumable:
            return await self._submit(job)
        begun = asyncio.get_running_loop().create_task(self._submit(job), name="dispatcher-submission")
        try:
            await asyncio.wait((begun,))
        except asyncio.CancelledError:
            self._do(see_off(begun))
            raise
        return begun.result()

    async def _submit(self, job: GenerationJob) -> AnswerStream:
        if (known := self._live.get(job.job_id)) is not None:
            return self._join(known, job)
        claimed, model = await self._resumption.claim(job)
        if claimed is Claimed.BEFORE and job.resumable:
            if (follower := await self._resumption.follow_known(job, model)) is not None:
                return follower
            if model != job.model and job.job_id not in self._live:
                # Nothing is left of what the other one answered.
                claimed, model = await self._resumption.claim_instead(job, model)
        if (known := self._live.get(job.job_id)) is not None:
            return self._join(known, job)
        if model != job.model:
            # Another gateway has another model answer it, whose queue alone knows whether it has ended.
            raise in_use()
        if claimed is Claimed.NOT and job.digest:
            job = replace(job, unclaimed=True)
        if job.resumable:
            return await self._begin_resumable(job, claimed)
        return await self._begin_direct(job, claimed)

    async def _begin_direct(self, job: GenerationJob, claimed: Claimed) -> AnswerStream:
        """Admits a request whose events its client alone gets."""
        generation = self._create(job)
        if claimed is Claimed.NOW:
            self._claims.add(job.submission)
        try:
            await self._open(generation)
        except asyncio.CancelledError:
            generation.withdraw(RequestCancelled("The client ended the call."))
            raise
        except WorkersBarred:
            if claimed is Claimed.NOW:
                # At once: another model may be asked by this id.
                await self._resumption.release(job)
            raise
        if job.digest and self._live.get(job.job_id) is generation:
            # The queue knows of no other, whoever claimed the id before.
            self._claims.add(job.submission)
        return DirectStream(
            generation, generation.outbox, self._clock, self._generation_limits.client_stall_s
        )

    async def _begin_resumable(self, job: GenerationJob, claimed: Claimed) -> AnswerStream:
        """Admits a request once there is room for its client: without one it would run on for nobody."""
        try:
            # Its id took a moment to claim, in which this gateway may have filled up, or begun to leave.
            self._check_room(job)
            self._resumption.check_room(job.tenant)
            generation = self._create(job)
            follower = await self._open_resumable(generation)
        except InterlockError as error:
            # Where the store did not answer, it may have taken the request in all the same.
            if claimed is Claimed.NOW and not isinstance(error, StoreUnavailable):
                # Its id stands for nothing, and its client may ask something else by it.
                await self._resumption.release(job)
            raise
        if follower is None:
            # Where it was left to another one, so is its client.
            self._check_open()
            return await self._resumption.follow(job.tenant, job.model, job.job_id, 0, job.digest)
        follower.allowance = generation.allowance
        return follower

    async def _open_resumable(self, generation: Generation) -> Follower | None:
        """Enqueues a request with a client that follows it; None: another gateway has it already."""
        follower = self._resumption.follow_here(generation, 0)
        try:
            await self._open(generation)
        except BaseException as error:
            await follower.aclose()
            if generation.moved and isinstance(error, InterlockError):
                return None
            raise
        return follower

    async def resume(self, tenant: str, job_id: str, cursor: int) -> AnswerStream:
        """Follows a tenant's resumable request behind `cursor`, wherever it runs or ran.

        Raises:
            RequestUnknown: There is none of that id.
            ArgumentInvalid: The cursor lies behind its log.
            QueueFull: As many clients follow here as may, of all tenants or of this one.
            StoreUnavailable: The logs cannot be reached, or may lack for a moment what they have lost.
            Draining: This gateway shuts down.
        """
        self._check_open()
        generation = self._live.get(job_id)
        if generation is not None and generation.chronicle is not None and not generation.moved:
            return self._resumption.follow_here(generation, cursor)
        return await search(self._resumption, self._rounds, generation, tenant, job_id, cursor)

    async def cancel(self, job_id: str) -> bool:
        """Ends a request, whichever gateway has it; returns False when it had ended before.

        Raises:
            RequestUnknown: No request of that id is, or was lately, under way.
            StoreUnavailable: It is not here, and others cannot be asked.
        """
        generation = self._live.get(job_id)
        if generation is not None and not generation.moved:
            if generation.ended:
                return False
            generation.withdraw(cancelled())
            return True
        try:
            return await self._cancel_elsewhere(job_id)
        except (RequestUnknown, StoreUnavailable):
            # One that ended here says nothing of another one by its id, which may be under way elsewhere.
            if generation is None and job_id in self._ended:
                return False
            raise

    async def _cancel_elsewhere(self, job_id: str) -> bool:
        claim = await self._resumption.find(job_id)
        # Ids that a gateway drew are not in the directory: each model's queue is asked.
        models = self._rounds.known_models() if claim is None else (claim.model,)
        for model in models:
            with contextlib.suppress(RequestUnknown):
                return await self._queue.stop(model, job_id)
        raise RequestUnknown("No request of that id is under way for this subject.")

    async def run(self) -> None:
        """Renews and reaps until it is cancelled."""
        await self._rounds.run()

    async def renew(self) -> None:
        """Compares notes with the queue once, for every model."""
        await self._rounds.renew()

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, lets the running ones end within `grace_s`, and parts with the rest."""
        self._draining = True
        # Once that is told nobody hands anything over to this gateway, though it may end at once.
        await self._rounds.leave(min(grace_s, TELL_LEAVING_S))
        await self._wait_briefly(grace_s)
        live = tuple(self._live.values())
        await asyncio.gather(*(farewell.part_with(one, self._queue, self._resumption) for one in live))
        self._resumption.end_all(farewell.draining())
        await self._wait_briefly(SETTLE_GRACE_S)
        for chore in tuple(self._chores):
            chore.cancel()
        left = tuple(self._live.values())
        await asyncio.gather(*(farewell.close(generation, self._resumption) for generation in left))

    async def wait_empty(self) -> None:
        """Returns once no request is under way and nothing is owed to the queue."""
        while self._live:
            self._emptied.clear()
            await self._emptied.wait()

    def _create(self, job: GenerationJob) -> Generation:
        generation = Generation(
            job,
            self._queue,
            self._workers,
            self._resumption.log,
            self._clock,
            self._generation_limits,
            self._meter,
            self._forget,
        )
        generation.start_behind(self._ended.get(job.job_id, 0))
        self._live[job.job_id] = generation
        return generation

    async def _open(self, generation: Generation) -> None:
        """Enqueues a request; raises what the queue says against it."""
        try:
            await generation.open()
        except StoreUnavailable:
            self._rounds.note_lost(generation.job.model)
            raise

    def _join(self, known: Generation, job: GenerationJob) -> AnswerStream:
        """Another client of a request that is under way here."""
        if known.chronicle is None or not job.resumable:
            raise in_use()
        if known.job.digest != job.digest:
            raise exists_with_other_body()
        return self._resumption.follow_here(known, 0)

    def _check_open(self) -> None:
        if self._draining:
            raise Draining.at_the_door(retry_after_s=RETRY_WHEN_DRAINING_S)

    def _check_room(self, job: GenerationJob) -> None:
        self._check_open()
        if job.job_id not in self._live:
            self.room.check()

    def _forget(self, generation: Generation) -> None:
        if self._live.get(generation.job.job_id) is not generation:
            return
        del self._live[generation.job.job_id]
        if generation.moved:
            self._resumption.note_moved(generation)
        else:
            self._ended[generation.job.job_id] = generation.starts
            self._ended.move_to_end(generation.job.job_id)
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        if generation.job.submission in self._claims:
            # A claim that was made before may be of the living request whose twin the queue has refused.
            self._claims.discard(generation.job.submission)
            self._do(self._resumption.release(generation.job))
        if not self._live:
            self._emptied.set()

    def _do(self, chore: Coroutine[Any, Any, None]) -> None:
        """Does something in the background; there are no more chores than requests and notices of them."""
        task = asyncio.get_running_loop().create_task(chore, name="dispatcher-chore")
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _hear(self, notice: Notice) -> None:
        """Hears what another gateway tells. What is lost is found by the next renewal, or the next look."""
        match notice.kind:
            case NoticeKind.LOG:
                self._resumption.notice(notice.job_id)
            case NoticeKind.STOP:
                self._rounds.stop(notice.job_id)
            case NoticeKind.TAKE:
                self._do(self._rounds.take_up(notice.model, notice.job_id))

    async def _wait_briefly(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_empty()
