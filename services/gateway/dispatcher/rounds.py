"""The dispatcher's rounds. Owns: comparing, once a second, this gateway's notes with the queue's.

That is how lost messages, a restarted store and the deaths of other gateways are made good. Must not know:
clients, Redis or gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from services.common import logs
from services.common.clock import Clock
from services.common.errors import NoWorker, RequestCancelled, StoreUnavailable
from services.gateway.core.events import Finished
from services.gateway.core.jobs import Grant, Outcome, Renewal
from services.gateway.core.log import Entry, used_tokens
from services.gateway.core.params import GenerationJob, Words
from services.gateway.core.payload import read_payload
from services.gateway.core.ports import JobQueue
from services.gateway.dispatcher.barred_waits import BarredWaits
from services.gateway.dispatcher.follower import LOST_LOG_WAIT_S
from services.gateway.dispatcher.generation import Generation

# A worker that did not come back within its time is being mended by somebody.
RETRY_WITHOUT_WORKER_S = 5.0


@dataclass(frozen=True, slots=True)
class Register:
    """The requests that are under way at this gateway.

    Attributes:
        live: All of them, by job.
        create: Adds one.
        welcome: Lets clients that followed one at another gateway read it here.
        words: A model's way back to text; None where it is not served here.
        is_open: Whether more are taken.
    """

    live: Mapping[str, Generation]
    create: Callable[[GenerationJob], Generation]
    welcome: Callable[[Generation], None]
    words: Callable[[str], Words | None]
    is_open: Callable[[], bool]


class Rounds:
    """Looks after the requests of a register.

    Attributes:
        store_reachable: Whether the queue answered when it was last asked about this mesh's own models.

    Args:
        queue: What they are compared with.
        register: The requests.
        clock: Measures.
        models: The models that are served now; their queues are looked after even when nobody waits here.
        jitter: Draws a number from 0 to 1, so that gateways do not reap in step.
        renew_s: How often notes are compared.
        worker_wait_s: How long requests wait while there is no worker that they may go to.
        is_replaced: Whether another revision takes the place of a model's; its only worker is away meanwhile.
        is_own: Whether a model is one of this mesh, which this gateway is there for; others only help.
    """

    def __init__(  # noqa: PLR0913 - one is made, and each is given by name
        self,
        queue: JobQueue,
        register: Register,
        clock: Clock,
        *,
        models: Callable[[], Iterable[str]],
        jitter: Callable[[], float],
        renew_s: float,
        worker_wait_s: float,
        is_replaced: Callable[[str], bool],
        is_own: Callable[[str], bool],
    ) -> None:
        self.store_reachable = False
        self._queue = queue
        self._register = register
        self._clock = clock
        self._models = models
        self._jitter = jitter
        self._renew_s = renew_s
        self._is_replaced = is_replaced
        self._is_own = is_own
        self._barred_waits = BarredWaits(worker_wait_s)
        self._taking: set[str] = set()
        # As the last renewal told it; and when the store was last seen away, or emptied.
        self._returns = 0
        self._shaken_s = -math.inf
        self._hurried = asyncio.Event()
        self._told_leaving = asyncio.Event()

    async def run(self) -> None:
        """Renews and reaps until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_forever())
            tasks.create_task(self._reap_forever())

    async def renew(self) -> None:
        """Compares notes with the queue once, for every model."""
        leaving = not self._register.is_open()
        renewed = {
            model: await self._guarded(model, partial(self._renew, model, leaving=leaving))
            for model in self.known_models()
        }
        own = [done for model, done in renewed.items() if self._is_own(model)]
        if own and all(own):
            self._note_store(reachable=True)
        if leaving and all(renewed.values()):
            self._told_leaving.set()

    async def leave(self, within_s: float) -> None:
        """Has a renewal made at once that says that this gateway leaves; waits for it, at most so long."""
        self._hurried.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._told_leaving.wait()

    def known_models(self) -> tuple[str, ...]:
        """Models that are served, or asked for by a request that is under way."""
        asked = (generation.job.model for generation in self._register.live.values())
        return tuple(dict.fromkeys((*self._models(), *asked)))

    def note_lost(self, model: str) -> None:
        """A model's queue does not answer; whether another mesh's does decides nothing here."""
        if self._is_own(model):
            self._note_store(reachable=False)
            self.note_shaken()

    def note_shaken(self) -> None:
        """The store was away, or is seen to have been emptied."""
        self._shaken_s = self._clock.monotonic()

    @property
    def shaken(self) -> bool:
        """Whether the store may yet be told of requests that it has lost."""
        return self._clock.monotonic() - self._shaken_s < LOST_LOG_WAIT_S

    def deliver(self, grant: Grant) -> None:
        """Hands a grant on. One for nobody is found again, with its model, by the next renewal."""
        if (generation := self._find(grant.job_id)) is not None:
            generation.granted(grant)

    def stop(self, job_id: str) -> None:
        """Ends a request that its owner does not want any more."""
        if (generation := self._register.live.get(job_id)) is not None:
            generation.withdraw(cancelled())

    def _find(self, job_id: str) -> Generation | None:
        """A request of this gateway. One that moved away is none, and may have come back to be taken up."""
        generation = self._register.live.get(job_id)
        return None if generation is None or generation.moved else generation

    async def take_up(self, model: str, job_id: str) -> None:
        """Goes on with a request that was another's, unless the store is away."""
        await self._guarded(model, partial(self._take_up, model, job_id))

    async def _take_up(self, model: str, job_id: str) -> bool:
        """Goes on with a resumable request that another process began and that is this gateway's now.

        Returns False where there is nothing to go on with, here or elsewhere.
        """
        # Reaping, renewing and a notice may all find it at once; taken up twice it would fence itself off
        # from its own worker.
        if self._find(job_id) is not None or job_id in self._taking:
            return True
        if not self._register.is_open():
            await self._hand_on(model, job_id)
            return True
        words = self._register.words(model)
        if words is None:
            return True
        self._taking.add(job_id)
        try:
            return await self._go_on(model, job_id, words)
        except StoreUnavailable:
            raise
        except Exception:  # noqa: BLE001 - logged; what cannot be read keeps nobody behind it from its turn
            logs.get_logger().error("job.not_taken_up", job_id=job_id, model=model, exc_info=True)
            return True
        finally:
            self._taking.discard(job_id)

    async def _hand_on(self, model: str, job_id: str) -> None:
        """Lets another gateway take up what came to this one while it leaves.

        While there is none the request stays this one's, and the next renewal tries again: whoever comes
        later takes it up once this one has gone.
        """
        if await self._queue.release(model, job_id, submission=""):
            logs.get_logger().info("job.handed_on", job_id=job_id, model=model)

    async def _go_on(self, model: str, job_id: str, words: Words) -> bool:
        taken = await self._queue.take_up(model, job_id)
        if taken is None:
            # Of an earlier process of this name, and not resumable. The queue ends it with its lease.
            logs.get_logger().debug("job.unknown", job_id=job_id, model=model)
            return False
        job = read_payload(taken, words)
        if taken.entries and taken.entries[-1].is_last:
            await self._note_end(job, taken.entries)
            return True
        logs.get_logger().info(
            "request.taken_up", request_id=job.request_id, model=model, events=len(taken.entries)
        )
        generation = self._register.create(job)
        generation.carry_on(taken)
        self._register.welcome(generation)
        return True

    async def _note_end(self, job: GenerationJob, entries: Sequence[Entry]) -> None:
        """Tells the queue how a request ended whose log is whole: its gateway went before it could."""
        finished = isinstance(entries[-1].event, Finished)
        await self._queue.cancel(
            job.model,
            job.job_id,
            job.submission,
            used_tokens=used_tokens(entries, len(job.prompt_ids)),
            outcome=Outcome.FINISHED if finished else Outcome.CANCELLED,
        )

    async def _renew_forever(self) -> None:
        while True:
            await self.renew()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._renew_s):
                    await self._hurried.wait()
            self._hurried.clear()

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s * (0.5 + self._jitter()))
            for model in self.known_models():
                await self._guarded(model, partial(self._reap, model))

    async def _guarded(self, model: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Keeps what fails with one model from others and later rounds; returns whether all went well."""
        try:
            await work()
        except StoreUnavailable:
            self.note_lost(model)
        except Exception:  # noqa: BLE001 - logged with its traceback; the loop must go on
            logs.get_logger().error("dispatcher.crashed", exc_info=True)
        else:
            return True
        return False

    async def _reap(self, model: str) -> None:
        for job_id in await self._queue.reap(model):
            await self._take_up(model, job_id)

    def _note_store(self, *, reachable: bool) -> None:
        if reachable != self.store_reachable:
            self.store_reachable = reachable
            logs.get_logger().info("store.reached" if reachable else "store.lost")

    async def _renew(self, model: str, *, leaving: bool) -> None:
        # Requests that owe the queue a call are left out: it could only answer about the past.
        named = {
            job_id: generation.grant
            for job_id, generation in self._register.live.items()
            if generation.job.model == model and generation.in_step
        }
        running = {job_id: grant.nonce for job_id, grant in named.items() if grant is not None}
        waiting = frozenset(job_id for job_id, grant in named.items() if grant is None)
        # A place costs the queue more than a lease, and its client more still.
        places = frozenset(job_id for job_id in waiting if self._register.live[job_id].place_due)
        renewal = await self._queue.renew(model, running, waiting, places=places, leaving=leaving)
        self._note_store_of(renewal)
        self._place(renewal)
        granted = {grant.job_id for grant in renewal.granted}
        self._judge_workers(model, renewal, waiting - renewal.lost - granted)
        for grant in renewal.granted:
            await self._deliver_found(model, grant)
        for job_id in renewal.lost & named.keys():
            await self._reclaim(job_id, named[job_id])
        if not renewal.degraded:
            self._confirm({job_id: running[job_id] for job_id in running.keys() - renewal.lost})
        for job_id in renewal.cancelled:
            self.stop(job_id)
        for job_id in renewal.unknown:
            await self._take_up(model, job_id)

    def _note_store_of(self, renewal: Renewal) -> None:
        """Has the logs looked after that a store which was away may have lost, also of what is silent now."""
        is_back, self._returns = renewal.returns != self._returns, renewal.returns
        if renewal.degraded or is_back:
            self.note_shaken()
        if not is_back:
            return
        for generation in self._register.live.values():
            if generation.chronicle is not None:
                generation.chronicle.doubt()

    def _place(self, renewal: Renewal) -> None:
        for job_id, place in renewal.waiting.items():
            generation = self._register.live.get(job_id)
            if generation is not None:
                generation.placed(place)

    def _confirm(self, running: Mapping[str, str]) -> None:
        """Lets logs be written of requests that began or went on while the store was away."""
        for job_id, nonce in running.items():
            generation = self._register.live.get(job_id)
            if generation is None or generation.chronicle is None or generation.grant is None:
                continue
            if generation.grant.nonce == nonce:
                generation.chronicle.confirm()

    def _judge_workers(self, model: str, renewal: Renewal, waiting: frozenset[str]) -> None:
        """Ends the wait of those for whom no worker has come back in time, and says so.

        What a worker needs to end what it runs, and to load a revision, is not known here: while one replaces
        another, requests wait until their deadline.
        """
        if self._is_replaced(model):
            self._barred_waits.forget(model)
            return
        of_model = [one for one in self._register.live.values() if one.job.model == model]
        for generation in self._barred_waits.judge(model, renewal, of_model, self._clock.monotonic()):
            # One that was lent a slot meanwhile waits no more.
            if generation.job.job_id in waiting and generation.waits:
                generation.withdraw(
                    NoWorker(
                        "No worker can take the request at present.", retry_after_s=RETRY_WITHOUT_WORKER_S
                    )
                )

    async def _deliver_found(self, model: str, grant: Grant) -> None:
        """Hands on a grant that a renewal told of.

        One for nobody is of a job that the renewal made this gateway's, or of an earlier process of its name.
        Taking it up tells the grant that holds then, for this one may be fenced off by it. What cannot be
        taken up gives its slot back.
        """
        if self._find(grant.job_id) is not None:
            self.deliver(grant)
        elif not await self._take_up(model, grant.job_id):
            await self._queue.settle(model, grant.job_id, grant.nonce, Outcome.CANCELLED, 0)

    async def _reclaim(self, job_id: str, grant: Grant | None) -> None:
        """Tells a queue that was emptied what is still under way here."""
        generation = self._register.live.get(job_id)
        if generation is None or not generation.in_step or generation.grant != grant:
            return
        if grant is None:
            self.note_shaken()
            generation.forgotten()
        elif not await self._queue.register(generation.queued_job(), grant):
            generation.lease_lost(grant.nonce)
        else:
            self.note_shaken()
            if generation.chronicle is not None:
                generation.chronicle.doubt()


def cancelled() -> RequestCancelled:
    """What a request ends with that its owner does not want any more."""
    return RequestCancelled("The request was cancelled by its owner.")
