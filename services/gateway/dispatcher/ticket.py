"""A request's ticket in the queue. Owns: every call about one job, in order, and what comes of it.

Must not know: the life of a request. What the queue answers is told to the holder; a grant that the holder
has no use for is given back by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.common.clock import Clock
from services.common.errors import InterlockError, StoreUnavailable
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.log import LogTail
from services.gateway.core.params import GenerationJob
from services.gateway.core.payload import write_payload
from services.gateway.core.ports import JobQueue
from services.gateway.dispatcher.errands import Errand, Errands


class TicketHolder(Protocol):
    """Who hears what the queue answers."""

    @property
    def waits(self) -> bool:
        """Whether a slot is wanted now."""
        ...

    def granted(self, grant: Grant) -> None:
        """A slot was lent."""
        ...

    def placed(self, place: Waiting) -> None:
        """The job waits at this place."""
        ...

    def rejected(self, error: InterlockError) -> None:
        """The queue does not take the job."""
        ...

    def forgotten(self) -> None:
        """The queue does not know the job any more."""
        ...

    def tail(self, *, whole: bool = False) -> LogTail | None:
        """What is to be written into the job's log when it ends, or all that it holds; None: nothing."""
        ...

    def settled(self, *, current: bool) -> None:
        """The job's end is known to the queue; unless `current`, the job was another gateway's already."""
        ...


class TicketText(Protocol):
    """What has been generated of the job."""

    def charged_tokens(self) -> int:
        """What is charged however the job ends."""
        ...

    def final_tokens(self, outcome: Outcome) -> int:
        """What is charged of a job that ends in a slot."""
        ...

    def pin(self) -> str:
        """The revision that alone may go on with the text; empty while there is none."""
        ...


class Ticket:
    """The place of one job in the queue.

    Args:
        job: The job.
        queue: The queue.
        clock: Measures what is left of the deadline.
        holder: Hears the answers.
        text: Tells what the queue must know of the text.
        on_idle: Is called whenever nothing is owed to the queue.
    """

    def __init__(
        self,
        job: GenerationJob,
        queue: JobQueue,
        clock: Clock,
        holder: TicketHolder,
        text: TicketText,
        on_idle: Callable[[], None],
    ) -> None:
        self._job = job
        self._queue = queue
        self._clock = clock
        self._holder = holder
        self._text = text
        self._accepted_s = clock.monotonic() - job.waited_s
        # The queue knows a job that another gateway began.
        self._known = job.waited_s > 0
        self._payload = write_payload(job) if job.resumable else ""
        self._errands = Errands(clock, on_idle)

    @property
    def idle(self) -> bool:
        """Whether the queue knows all that happened here."""
        return self._errands.idle

    def queued_job(self) -> QueuedJob:
        """The job as the queue knows it, with the time that is left."""
        job = self._job
        # What the queue never had has not waited; what it lost keeps its place by the time that it waited.
        waited_s = self._clock.monotonic() - self._accepted_s if self._known else 0.0
        return QueuedJob(
            job_id=job.job_id,
            model=job.model,
            tenant=job.tenant,
            band=job.band,
            cost_tokens=job.cost_tokens,
            # The deadline's own timer ends a job that has no time left.
            timeout_s=max(job.timeout_s - waited_s, 0.001),
            waited_s=waited_s,
            submission=job.submission,
            limits=job.limits,
            digest=job.digest,
            payload=self._payload,
            slots=job.params.n,
            used_tokens=self._text.charged_tokens(),
            pin=self._text.pin(),
            unclaimed=job.unclaimed,
        )

    def do(self, errand: Errand) -> None:
        """Does something of the holder's between the calls to the queue, in its turn."""
        self._errands.add(errand)

    def enqueue(self) -> None:
        """Asks for a slot, unless none is wanted any more when it is this call's turn."""
        self._errands.add(self._enqueue)

    def withdraw(self) -> None:
        """Leaves the queue."""

        async def call() -> None:
            job = self._job
            tail, used_tokens = self._holder.tail(), self._text.charged_tokens()
            await self._queue.cancel(job.model, job.job_id, job.submission, tail, used_tokens=used_tokens)
            self._holder.settled(current=True)

        self._errands.add(call)

    def requeue(self, grant: Grant, *, emitted: bool) -> None:
        """Gives back the slot of a lost worker and waits at the old place."""

        async def call() -> None:
            job = self._job
            known = await self._queue.requeue(
                job.model,
                job.job_id,
                grant.nonce,
                pin=grant.revision if emitted else "",
                used_tokens=self._text.charged_tokens(),
            )
            self._after_return(known=known)

        self._errands.add(call)

    def decline(self, grant: Grant, hold_s: float) -> None:
        """Gives back a slot that the worker refused to fill."""

        async def call() -> None:
            job = self._job
            known = await self._queue.refused(job.model, job.job_id, grant.nonce, hold_s=hold_s)
            self._after_return(known=known)

        self._errands.add(call)

    def settle(self, grant: Grant, outcome: Outcome) -> None:
        """Gives a slot back for good, and ends the job with it."""
        used_tokens = self._text.final_tokens(outcome)

        async def call() -> None:
            current = await self._settle(grant, outcome, used_tokens)
            if not current and self._payload and await self._queue.register(self.queued_job(), grant):
                # The store had lost the job, or its log alone, which is written once more.
                current = await self._settle(grant, outcome, used_tokens, whole=True)
            self._holder.settled(current=current)

        self._errands.add(call)

    def give_back(self, grant: Grant) -> None:
        """Gives back a slot that nobody here has a use for."""

        async def call() -> None:
            job = self._job
            await self._queue.settle(job.model, job.job_id, grant.nonce, Outcome.CANCELLED, 0)

        self._errands.add(call)

    async def close(self) -> None:
        """Gives up what is still owed."""
        await self._errands.close()

    async def _enqueue(self) -> None:
        if not self._holder.waits:
            return
        try:
            answer = await self._queue.enqueue(self.queued_job())
        except InterlockError as error:
            if self._known and isinstance(error, StoreUnavailable):
                # The request was accepted once: it waits for the store rather than fail with it.
                raise
            self._holder.rejected(error)
            return
        self._known = True
        if isinstance(answer, Grant):
            self._holder.granted(answer)
        else:
            self._holder.placed(answer)

    async def _settle(self, grant: Grant, outcome: Outcome, used_tokens: int, *, whole: bool = False) -> bool:
        job, tail = self._job, self._holder.tail(whole=whole)
        return await self._queue.settle(job.model, job.job_id, grant.nonce, outcome, used_tokens, tail)

    def _after_return(self, *, known: bool) -> None:
        if not known:
            self._holder.forgotten()
