"""The dispatcher. Owns: every request of this gateway from submission to settlement, and its renewal.

Must not know: Redis, gRPC, tokens of identity or APIs. It compares, once a second, what it knows with what
the queue knows, both ways: that is how lost messages and a restarted store are made good.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from services.common import logs
from services.common.clock import Clock
from services.common.errors import (
    Draining,
    InterlockError,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestExists,
    RequestUnknown,
    StoreUnavailable,
)
from services.gateway.core.jobs import Grant, Outcome, Renewal
from services.gateway.core.log import Notice, NoticeKind
from services.gateway.core.params import Decode, GenerationJob
from services.gateway.core.payload import read_payload
from services.gateway.core.ports import JobQueue, WorkerPool
from services.gateway.core.queue_errors import exists_with_other_body
from services.gateway.dispatcher.direct_stream import DirectStream
from services.gateway.dispatcher.generation import Generation, GenerationLimits
from services.gateway.dispatcher.resumption import Resumption
from services.gateway.dispatcher.streams import AnswerStream

# Grants whose message was lost are found within this time, and it is the gateway's sign of life.
RENEW_S = 1.0
# Ids whose end is remembered, so that cancelling one that has just ended is no error.
ENDED_MAX = 4_096
# Another gateway may have room now; this one has within seconds, as requests end all the time.
RETRY_WHEN_FULL_S = 1.0
RETRY_WHEN_DRAINING_S = 1.0
# A worker that did not come back within its time is being mended by somebody.
RETRY_WITHOUT_WORKER_S = 5.0
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

    Args:
        queue: Where slots come from.
        workers: Who generates.
        clock: Measures.
        resumption: Logs, and who follows them.
        models: The models that are served now; their queues are looked after even when nobody waits here.
        jitter: Draws a number from 0 to 1, so that gateways do not reap in step.
        limits: Bounds of the dispatcher.
        generation_limits: Bounds of each request.
    """

    def __init__(
        self,
        queue: JobQueue,
        workers: WorkerPool,
        clock: Clock,
        resumption: Resumption,
        *,
        models: Callable[[], Iterable[str]],
        jitter: Callable[[], float],
        limits: DispatcherLimits,
        generation_limits: GenerationLimits,
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._clock = clock
        self._resumption = resumption
        self._models = models
        self._jitter = jitter
        self._limits = limits
        self._generation_limits = generation_limits
        self._live: dict[str, Generation] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._workerless_since: dict[str, float] = {}
        self._emptied = asyncio.Event()
        self._draining = False
        self._store_reachable = False
        self._chores: set[asyncio.Task[None]] = set()
        self._taking: set[str] = set()
        queue.on_grant(self._deliver)
        queue.on_notice(self._hear)

    @property
    def store_reachable(self) -> bool:
        """Whether the queue answered when it was last asked."""
        return self._store_reachable

    @property
    def live(self) -> int:
        """Requests that have not ended, or still owe something to the queue."""
        return len(self._live)

    async def submit(self, job: GenerationJob) -> AnswerStream:
        """Accepts a job; iterate over what is returned, and close it.

        A resumable one that was accepted before is followed from its beginning, wherever it runs.

        Raises:
            QueueFull: The queue, or this process, is at its bound.
            RequestExists: The id is in use.
            StoreUnavailable: The queue cannot be reached.
            Draining: This gateway shuts down.
        """
        self._check_room(job)
        if (known := self._live.get(job.job_id)) is not None:
            return self._join(known, job)
        if await self._resumption.claim(job) and job.resumable:
            with contextlib.suppress(RequestUnknown):
                return await self._resumption.follow(job.model, job.job_id, 0, job.digest)
        if (known := self._live.get(job.job_id)) is not None:
            return self._join(known, job)
        generation = self._create(job)
        try:
            await generation.open()
        except InterlockError as error:
            if generation.moved:
                return await self._resumption.follow(job.model, job.job_id, 0, job.digest)
            self._store_reachable = self._store_reachable and not isinstance(error, StoreUnavailable)
            raise
        except asyncio.CancelledError:
            generation.withdraw(RequestCancelled("The client ended the call."))
            raise
        return self._stream_of(generation)

    async def resume(self, job_id: str, cursor: int) -> AnswerStream:
        """Follows a resumable request behind `cursor`, wherever it runs or ran.

        Raises:
            RequestUnknown: There is none of that id.
            ArgumentInvalid: The cursor lies behind its log.
            StoreUnavailable: The logs cannot be reached.
            Draining: This gateway shuts down.
        """
        self._check_open()
        generation = self._live.get(job_id)
        if generation is not None and generation.chronicle is not None and not generation.moved:
            return self._resumption.follow_here(generation, cursor)
        claim = None if generation is not None else await self._resumption.find(job_id)
        if generation is not None and generation.moved:
            return await self._resumption.follow(generation.job.model, job_id, cursor)
        if claim is None:
            raise RequestUnknown("No resumable request of that id is known for this subject.")
        return await self._resumption.follow(claim.model, job_id, cursor)

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
            generation.withdraw(_cancelled())
            return True
        if generation is None and job_id in self._ended:
            return False
        return await self._cancel_elsewhere(job_id)

    async def _cancel_elsewhere(self, job_id: str) -> bool:
        claim = await self._resumption.find(job_id)
        # Ids that a gateway drew are not in the directory: each model's queue is asked.
        models = self._known_models() if claim is None else (claim.model,)
        for model in models:
            with contextlib.suppress(RequestUnknown):
                return await self._queue.stop(model, job_id)
        raise RequestUnknown("No request of that id is under way for this subject.")

    async def run(self) -> None:
        """Renews and reaps until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_forever())
            tasks.create_task(self._reap_forever())

    async def renew(self) -> None:
        """Compares notes with the queue once, for every model."""
        try:
            for model in self._known_models():
                await self._renew(model)
                self._note_store(reachable=True)
        except StoreUnavailable:
            self._note_store(reachable=False)

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, lets the running ones end within `grace_s`, hands over or ends the rest."""
        self._draining = True
        await self._wait_briefly(grace_s)
        await asyncio.gather(*(self._part_with(generation) for generation in tuple(self._live.values())))
        self._resumption.end_all(_draining())
        await self._wait_briefly(SETTLE_GRACE_S)
        for chore in tuple(self._chores):
            chore.cancel()
        await asyncio.gather(*(generation.close() for generation in tuple(self._live.values())))

    async def _part_with(self, generation: Generation) -> None:
        """Hands a resumable request to another gateway, and ends any other one in-band."""
        if generation.chronicle is not None and not generation.ended:
            job = generation.job
            try:
                if await self._queue.release(job.model, job.job_id, job.submission):
                    generation.leave()
            except StoreUnavailable:
                logs.get_logger().warning("request.kept", request_id=job.request_id)
        generation.withdraw(_draining())

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
            self._forget,
        )
        self._live[job.job_id] = generation
        return generation

    def _stream_of(self, generation: Generation) -> AnswerStream:
        if generation.chronicle is not None:
            return self._resumption.follow_here(generation, 0)
        stall_s = self._generation_limits.client_stall_s
        return DirectStream(generation, generation.outbox, self._clock, stall_s)

    def _join(self, known: Generation, job: GenerationJob) -> AnswerStream:
        """Another client of a request that is under way here."""
        if known.chronicle is None or not job.resumable:
            raise RequestExists("request_id: is in use by a request of this subject that has not ended.")
        if known.job.digest != job.digest:
            raise exists_with_other_body()
        return self._resumption.follow_here(known, 0)

    def _check_open(self) -> None:
        if self._draining:
            raise _draining()

    def _check_room(self, job: GenerationJob) -> None:
        self._check_open()
        if job.job_id not in self._live and len(self._live) >= self._limits.requests_max:
            raise QueueFull(
                f"This gateway carries {self._limits.requests_max} requests already.",
                retry_after_s=RETRY_WHEN_FULL_S,
            )

    def _forget(self, generation: Generation) -> None:
        if self._live.get(generation.job.job_id) is not generation:
            return
        del self._live[generation.job.job_id]
        self._ended[generation.job.job_id] = None
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        if not generation.job.resumable:
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
                self._stop(notice.job_id)
            case NoticeKind.TAKE:
                self._do(self._guarded(lambda: self._take_up(notice.model, notice.job_id)))

    def _stop(self, job_id: str) -> None:
        if (generation := self._live.get(job_id)) is not None:
            generation.withdraw(_cancelled())

    async def _take_up(self, model: str, job_id: str) -> None:
        """Goes on with a resumable request that another process began and that is this gateway's now."""
        known, decode = self._live.get(job_id), self._resumption.decoder(model)
        if self._draining or decode is None or (known is not None and not known.moved):
            return
        if job_id in self._taking:
            # Reaping, renewing and a notice may all find it at once; taken up twice it would fence itself off
            # from its own worker.
            return
        self._taking.add(job_id)
        try:
            await self._go_on(model, job_id, decode)
        finally:
            self._taking.discard(job_id)

    async def _go_on(self, model: str, job_id: str, decode: Decode) -> None:
        taken = await self._queue.take_up(model, job_id)
        if taken is None:
            # Of an earlier process of this name, and not resumable. The queue ends it with its lease.
            logs.get_logger().debug("job.unknown", job_id=job_id, model=model)
            return
        if taken.entries and taken.entries[-1].is_last:
            # Only its record was left to write.
            await self._queue.cancel(model, job_id, taken.submission)
            return
        job = read_payload(taken, decode)
        logs.get_logger().info(
            "request.taken_up", request_id=job.request_id, model=model, events=len(taken.entries)
        )
        self._create(job).carry_on(taken)

    async def _wait_briefly(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_empty()

    def _deliver(self, grant: Grant) -> None:
        """Hands a grant on. One for nobody is found again, with its model, by the next renewal."""
        generation = self._live.get(grant.job_id)
        if generation is not None:
            generation.granted(grant)

    async def _renew_forever(self) -> None:
        while True:
            await self._guarded(self.renew)
            await asyncio.sleep(self._limits.renew_s)

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.renew_s * (0.5 + self._jitter()))
            await self._guarded(self._reap)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Keeps a defect in one round from ending all later ones."""
        try:
            await work()
        except StoreUnavailable:
            self._note_store(reachable=False)
        except Exception:  # noqa: BLE001 - logged with its traceback; the loop must go on
            logs.get_logger().error("dispatcher.crashed", exc_info=True)

    async def _reap(self) -> None:
        for model in self._known_models():
            for job_id in await self._queue.reap(model):
                await self._take_up(model, job_id)

    def _known_models(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys((*self._models(), *(generation.job.model for generation in self._live.values())))
        )

    def _note_store(self, *, reachable: bool) -> None:
        if reachable != self._store_reachable:
            self._store_reachable = reachable
            logs.get_logger().info("store.reached" if reachable else "store.lost")

    async def _renew(self, model: str) -> None:
        # Requests that owe the queue a call are left out: it could only answer about the past.
        named = {
            job_id: generation.grant
            for job_id, generation in self._live.items()
            if generation.job.model == model and generation.in_step
        }
        running = {job_id: grant.nonce for job_id, grant in named.items() if grant is not None}
        waiting = frozenset(job_id for job_id, grant in named.items() if grant is None)
        renewal = await self._queue.renew(model, running, waiting)
        self._place(renewal)
        self._judge_workers(model, renewal)
        for grant in renewal.granted:
            await self._deliver_found(model, grant)
        for job_id in renewal.lost & named.keys():
            await self._reclaim(job_id, named[job_id])
        for job_id in renewal.cancelled:
            self._stop(job_id)
        for job_id in renewal.unknown:
            await self._take_up(model, job_id)

    def _place(self, renewal: Renewal) -> None:
        for job_id, place in renewal.waiting.items():
            generation = self._live.get(job_id)
            if generation is not None:
                generation.placed(place)

    def _judge_workers(self, model: str, renewal: Renewal) -> None:
        """Ends the wait of those for whom no worker has come back in time, and says so."""
        if renewal.workers != 0:
            self._workerless_since.pop(model, None)
            return
        since = self._workerless_since.setdefault(model, self._clock.monotonic())
        if self._clock.monotonic() - since < self._limits.worker_wait_s:
            return
        for job_id in renewal.waiting:
            if (generation := self._live.get(job_id)) is not None:
                generation.withdraw(
                    NoWorker(
                        "No worker can take the request at present.", retry_after_s=RETRY_WITHOUT_WORKER_S
                    )
                )

    async def _deliver_found(self, model: str, grant: Grant) -> None:
        if grant.job_id in self._live:
            self._deliver(grant)
        else:
            await self._queue.settle(model, grant.job_id, grant.nonce, Outcome.CANCELLED, 0)

    async def _reclaim(self, job_id: str, grant: Grant | None) -> None:
        """Tells a queue that was emptied what is still under way here."""
        generation = self._live.get(job_id)
        if generation is None or not generation.in_step or generation.grant != grant:
            return
        if grant is None:
            generation.forgotten()
        elif not await self._queue.register(generation.queued_job(), grant):
            generation.lease_lost(grant.nonce)


def _draining() -> Draining:
    return Draining("The gateway is shutting down.", retry_after_s=RETRY_WHEN_DRAINING_S)


def _cancelled() -> RequestCancelled:
    return RequestCancelled("The request was cancelled by its owner.")
