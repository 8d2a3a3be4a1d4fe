"""The dispatcher. Owns: every request of this gateway from submission to settlement, and its renewal.

Must not know: Redis, gRPC, tokens of identity or APIs. It compares, once a second, what it knows with what
the queue knows, both ways: that is how lost messages and a restarted store are made good.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

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
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import JobQueue, WorkerPool
from services.gateway.dispatcher.generation import Generation, GenerationLimits

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
        *,
        models: Callable[[], Iterable[str]],
        jitter: Callable[[], float],
        limits: DispatcherLimits,
        generation_limits: GenerationLimits,
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._clock = clock
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
        queue.on_grant(self._deliver)

    @property
    def store_reachable(self) -> bool:
        """Whether the queue answered when it was last asked."""
        return self._store_reachable

    @property
    def live(self) -> int:
        """Requests that have not ended, or still owe something to the queue."""
        return len(self._live)

    async def submit(self, job: GenerationJob) -> Generation:
        """Accepts a job; iterate over what is returned, and close it.

        Raises:
            QueueFull: The queue, or this process, is at its bound.
            RequestExists: The id is in use.
            StoreUnavailable: The queue cannot be reached.
            Draining: This gateway shuts down.
        """
        self._check_room(job)
        generation = Generation(
            job, self._queue, self._workers, self._clock, self._generation_limits, self._forget
        )
        self._live[job.job_id] = generation
        try:
            await generation.open()
        except InterlockError as error:
            self._store_reachable = self._store_reachable and not isinstance(error, StoreUnavailable)
            raise
        except asyncio.CancelledError:
            generation.withdraw(RequestCancelled("The client ended the call."))
            raise
        return generation

    def cancel(self, job_id: str) -> bool:
        """Ends a request; returns False when it had ended before.

        Raises:
            RequestUnknown: No request of that id is, or was lately, at this gateway.
        """
        generation = self._live.get(job_id)
        if generation is None and job_id not in self._ended:
            raise RequestUnknown("No request of that id is under way for this subject.")
        if generation is None or generation.ended:
            return False
        generation.withdraw(RequestCancelled("The request was cancelled by its owner."))
        return True

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
        """Refuses new requests, lets the running ones end within `grace_s`, then ends the rest."""
        self._draining = True
        await self._wait_briefly(grace_s)
        for generation in tuple(self._live.values()):
            generation.withdraw(
                Draining("The gateway is shutting down.", retry_after_s=RETRY_WHEN_DRAINING_S)
            )
        await self._wait_briefly(SETTLE_GRACE_S)
        await asyncio.gather(*(generation.close() for generation in tuple(self._live.values())))

    async def wait_empty(self) -> None:
        """Returns once no request is under way and nothing is owed to the queue."""
        while self._live:
            self._emptied.clear()
            await self._emptied.wait()

    def _check_room(self, job: GenerationJob) -> None:
        if self._draining:
            raise Draining("The gateway is shutting down.", retry_after_s=RETRY_WHEN_DRAINING_S)
        if job.job_id in self._live:
            raise RequestExists("request_id: is in use by a request of this subject that has not ended.")
        if len(self._live) >= self._limits.requests_max:
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
        if not self._live:
            self._emptied.set()

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
            await self._queue.reap(model)

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
        for job_id in renewal.unknown - self._live.keys():
            # Of an earlier process of this name. The queue ends it with its lease.
            logs.get_logger().debug("job.unknown", job_id=job_id, model=model)

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
