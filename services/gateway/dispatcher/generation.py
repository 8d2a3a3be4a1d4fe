"""One request under way. Owns: its timers, its attempt at a worker and its events, from enqueue to end.

The shell around `core.request`: everything that happens becomes an event for the table, and the effects that
the table returns are performed here. Must not know: which queue, which workers, which API, or who listens:
its events go into an outbox, which a client empties, or the writer of its log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.common import logs
from services.common.clock import Clock
from services.common.errors import (
    InterlockError,
    InternalError,
    RequestCancelled,
    RequestExists,
    StoreUnavailable,
    WorkerLost,
)
from services.gateway.core import request as life
from services.gateway.core import request_events
from services.gateway.core.answer import Answer
from services.gateway.core.attempts import Output, RefusalReason, work_order
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import FinishReason, Queued, Started
from services.gateway.core.jobs import Grant, QueuedJob, Waiting
from services.gateway.core.log import LogTail, TakenUp
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import Attempt, GenerationLog, JobQueue, WorkerPool
from services.gateway.core.retry import backoff_s
from services.gateway.dispatcher.attendance import Attendance
from services.gateway.dispatcher.chronicle import Chronicle
from services.gateway.dispatcher.hearing import Hearing
from services.gateway.dispatcher.outbox import Outbox
from services.gateway.dispatcher.ticket import Ticket

# Starts that one gateway may count before the next one's numbers begin: a retry each 100 ms for an hour.
ADOPTION_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationLimits:
    """Bounds of every request; the settings of the same names say why."""

    credit_tokens: int = 256
    client_stall_s: float = 30.0
    attempts_max: int = 3
    failover_wait_s: float = 15.0
    detach_grace_s: float = 60.0


class Generation:
    """A request from `open` to its end.

    Attributes:
        job: What is asked.
        outbox: Its events, for the one who takes them.
        chronicle: The writer of its log, who takes them where it is resumable.
        attendance: Who follows it, where it is resumable.

    Args:
        job: What is asked.
        queue: Where slots come from.
        workers: Who generates.
        log: Where the events of resumable requests go.
        clock: Measures.
        limits: Bounds.
        on_end: Is called, perhaps more than once, when nothing is left to do.
    """

    def __init__(
        self,
        job: GenerationJob,
        queue: JobQueue,
        workers: WorkerPool,
        log: GenerationLog,
        clock: Clock,
        limits: GenerationLimits,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.job = job
        self._queue = queue
        self._workers = workers
        self._clock = clock
        self._limits = limits
        self._on_end = on_end
        self._request = life.Request(attempts_max=limits.attempts_max, resumable=job.resumable)
        self._answer = Answer(
            len(job.prompt_ids),
            job.params.max_tokens,
            job.decode,
            job.params.stop,
            accepted_s=clock.monotonic() - job.waited_s,
            scored=job.params.logprobs is not None,
        )
        self.outbox = Outbox(limits.credit_tokens)
        self._ticket = Ticket(job, queue, clock, self, self._look_for_end)
        self.chronicle = Chronicle(job, self.outbox, log, self, clock) if job.resumable else None
        self.attendance = Attendance(
            limits.detach_grace_s, lambda: log.unattended_s(job.model, job.job_id), self._give_up
        )
        self._attempt: Attempt | None = None
        self._started: Started | None = None
        self._unsaid = False
        self._position: int | None = None
        self._accepted = False
        self._error: InterlockError | None = None
        self._deadline = asyncio.get_running_loop().call_later(
            max(job.timeout_s - job.waited_s, 0.0), self._apply, request_events.DeadlinePassed()
        )
        self._failover: asyncio.TimerHandle | None = None

    # --- what the dispatcher and the queue say --------------------------------------------------------------

    @property
    def grant(self) -> Grant | None:
        """The slot that the request holds."""
        return self._request.grant

    @property
    def waits(self) -> bool:
        """Whether the request wants a slot."""
        return self._request.phase is life.Phase.QUEUED

    @property
    def ended(self) -> bool:
        """Whether the request has reached its terminal phase."""
        return self._request.phase in life.TERMINAL

    @property
    def in_step(self) -> bool:
        """Whether the queue knows all that happened here, so that its answers can be compared."""
        return self._ticket.idle and not self.ended

    @property
    def moved(self) -> bool:
        """Whether another gateway goes on with the request."""
        return self._request.phase is life.Phase.MOVED

    @property
    def idle(self) -> bool:
        """Whether the request has ended and owes nothing."""
        return self._ticket.idle and self.ended

    @property
    def started(self) -> Started | None:
        """The latest grant, as the client is told of it; None before the first."""
        return self._started

    @property
    def error(self) -> InterlockError | None:
        """What the request ended with; None while it is under way and after a success."""
        return self._error

    def queued_job(self) -> QueuedJob:
        """The request as the queue knows it."""
        return self._ticket.queued_job()

    def carry_on(self, taken: TakenUp) -> None:
        """Goes on where another process stopped."""
        assert self.chronicle is not None
        self._accepted = True
        self.chronicle.restore(taken.entries)
        self.attendance.leave_alone()
        self._started = self.chronicle.journal.started
        is_exact = self._answer.restore(taken.entries)
        self._request = life.Request(
            attempts_max=self._limits.attempts_max,
            resumable=True,
            # Other numbers than those that a worker may have heard from the process before.
            starts=taken.adoptions << ADOPTION_BITS,
            failures=0 if self._started is None else self._started.attempt,
            emitted=self._answer.index,
            revision="" if self._started is None else self._started.revision,
        )
        if not is_exact:
            self.withdraw(_unlike_log())
        elif taken.grant is not None:
            self.granted(taken.grant)

    async def open(self) -> None:
        """Enqueues the request; raises what the queue says against it."""
        self._ticket.enqueue()
        while not self._accepted and not self.ended:
            await self.outbox.wait()
        if not self._accepted and self._error is not None:
            raise self._error

    def granted(self, grant: Grant) -> None:
        """The queue lent the request a slot. One that it has no use for is given back."""
        self._accept()
        if self.waits:
            self._apply(request_events.Granted(grant))
        elif self._request.grant is None or self._request.grant.nonce != grant.nonce:
            self._ticket.give_back(grant)

    def placed(self, place: Waiting) -> None:
        """The queue told the request's place; the client hears of a change."""
        self._accept()
        if self.waits and place.position != self._position:
            self._position = place.position
            self.outbox.put(Queued(place.position, place.estimated_wait_s))

    def rejected(self, error: InterlockError) -> None:
        """The queue does not take the request."""
        if self.waits and self.job.resumable and isinstance(error, RequestExists):
            self._apply(request_events.LeaseLost())
        elif self.waits:
            self._apply(request_events.Rejected(error))

    def forgotten(self) -> None:
        """The queue does not know the request, which waits."""
        if self.waits:
            self._apply(request_events.Forgotten())

    def lease_lost(self, nonce: str) -> None:
        """The queue has given the request's slot away."""
        if self._request.grant is not None and self._request.grant.nonce == nonce:
            self._apply(request_events.LeaseLost())

    def leave(self) -> None:
        """Another gateway goes on with the request."""
        self._apply(request_events.LeaseLost())

    def withdraw(self, error: InterlockError) -> None:
        """Ends the request with `error` unless it has ended."""
        self._apply(request_events.Withdrawn(error))

    async def close(self) -> None:
        """Gives up whatever is left, what is owed to the queue included."""
        self.withdraw(RequestCancelled("The gateway stopped."))
        await self._ticket.close()

    def _accept(self) -> None:
        self._accepted = True
        self.outbox.wake()

    def add_credit(self, tokens: int) -> None:
        """Lets the worker send so many tokens more."""
        if self._attempt is not None:
            self._attempt.add_credit(tokens)

    # --- what the log says ----------------------------------------------------------------------------------

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in a cache."""
        return self._answer.cached_prompt_tokens

    async def dispute(self, grant: Grant) -> None:
        """The log was refused to `grant`: unless the queue confirms it, another gateway has the request."""
        if not await self._queue.register(self.queued_job(), grant):
            self.lease_lost(grant.nonce)

    def overflow(self) -> None:
        """The log is at its bound, which leaves room for every text that the request may get."""
        self.withdraw(InternalError("The log of the request is full."))

    def tail(self) -> LogTail | None:
        """What is written into the log when the job ends."""
        return None if self.chronicle is None else self.chronicle.tail()

    def settled(self, *, current: bool) -> None:
        """The queue knows that the job has ended; unless `current`, it was another gateway's already."""
        if self.chronicle is not None and current:
            self.chronicle.settled()
        elif self.chronicle is not None:
            self.chronicle.abandon()

    def _give_up(self) -> None:
        grace_s = self._limits.detach_grace_s
        self.withdraw(RequestCancelled(f"No client came back for the request within {grace_s:g} s."))

    # --- what the worker says -------------------------------------------------------------------------------

    def output(self, number: int, output: Output) -> None:
        """Tokens of attempt `number`, and with the last of them its end."""
        if not self._hears(number):
            return
        index = self._answer.index
        if not self._answer.continues(output):
            self._break("its tokens do not continue the text")
            return
        if output.token_ids:
            piece = self._answer.push(output, self._clock.monotonic())
            self._apply(request_events.Progressed(len(piece.token_ids)))
            self._say_started()
            self.outbox.put_piece(piece, index)
            if piece.stop is not None:
                self._cancel_attempt(Verdict.SUCCESS)
                self._apply(request_events.StopReached())
                return
        if output.finish is not None:
            self._complete(output.finish)

    def refused(self, number: int, reason: RefusalReason, message: str) -> None:
        """The worker did not take attempt `number`."""
        if self._hears(number):
            self._attempt = None
            self._log("attempt.refused", cause=reason.value, message=message)
            self._apply(request_events.Refused(reason, message))

    def lost(self, number: int, cause: str, *, crashed: bool) -> None:
        """The worker of attempt `number` is gone."""
        if self._hears(number):
            self._attempt = None
            self._log("attempt.lost", cause=cause)
            self._apply(request_events.AttemptLost(crashed))

    def _hears(self, number: int) -> bool:
        """Whether `number` is the attempt under way; what an earlier one says comes too late."""
        return number == self._request.starts and self._attempt is not None

    def _break(self, cause: str) -> None:
        self._cancel_attempt(Verdict.FAILURE)
        self._log("attempt.broken", cause=cause)
        self._apply(request_events.AttemptLost(crashed=False))

    def _say_started(self) -> None:
        if self._unsaid and self._started is not None:
            self._unsaid = False
            self.outbox.put(self._started)

    def _complete(self, reason: FinishReason) -> None:
        self._attempt = None
        self._say_started()
        piece = self._answer.flush(reason)
        self.outbox.put_piece(piece, self._answer.index)
        self._apply(request_events.Completed())

    def _log(self, event: str, **fields: object) -> None:
        grant = self._request.grant
        worker_id = None if grant is None else grant.worker_id
        logs.get_logger().warning(event, request_id=self.job.request_id, worker_id=worker_id, **fields)

    # --- table and effects ----------------------------------------------------------------------------------

    def _apply(self, event: request_events.RequestEvent) -> None:
        if self.ended:
            return
        self._request, effects = life.step(self._request, event)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: request_events.Effect) -> None:
        match effect:
            case request_events.StartAttempt(grant, number):
                self._start(grant, number)
            case request_events.CancelAttempt():
                self._cancel_attempt()
            case request_events.Enqueue():
                self._ticket.enqueue()
            case request_events.Withdraw():
                self._ticket.withdraw()
            case request_events.Requeue(grant, emitted):
                self._pause_log()
                pause_s = backoff_s(self._request.failures, grant.nonce)
                self._ticket.do(lambda: asyncio.sleep(pause_s))
                self._ticket.requeue(grant, emitted=emitted)
            case request_events.Decline(grant, hold_s):
                self._pause_log()
                self._ticket.decline(grant, hold_s)
            case request_events.Settle(grant, outcome):
                self._ticket.settle(grant, outcome, self._answer.used_tokens)
            case request_events.AwaitWorker():
                self._await_worker()
            case request_events.Close(error):
                self._close(error)

    def _pause_log(self) -> None:
        if self.chronicle is not None:
            self.chronicle.pause()

    def _start(self, grant: Grant, number: int) -> None:
        self._position = None
        self._answer.grant(self._clock.monotonic())
        job = self.job
        if self.chronicle is not None:
            self.chronicle.grant(grant)
        if self._answer.is_complete:
            self._complete(FinishReason.LENGTH)
            return
        # Later workers are named with their first tokens: the client need not hear of those that refuse.
        self._unsaid = self._started is not None
        self._started = Started(
            request_id=job.request_id,
            model=job.model,
            revision=grant.revision,
            worker_id=grant.worker_id,
            attempt=self._request.failures + 1,
            queue_s=self._answer.queue_s,
            degraded=grant.degraded,
        )
        if not self._unsaid:
            self.outbox.put(self._started)
        credit_tokens = self.outbox.first_credit_tokens()
        order = work_order(
            job, grant, number, emitted_ids=self._answer.token_ids, credit_tokens=credit_tokens
        )
        sink = Hearing(self, number)
        self._attempt = self._workers.start(grant.worker_id, grant.worker_address, order, sink)

    def _cancel_attempt(self, verdict: Verdict = Verdict.NEUTRAL) -> None:
        if self._attempt is None:
            return
        ended, self._attempt = self._attempt.cancel(verdict), None

        async def wait() -> None:
            # A slot that is settled while its worker still winds down earns the next job a refusal.
            await ended

        self._ticket.do(wait)

    def _await_worker(self) -> None:
        if self._failover is not None:
            self._failover.cancel()
        wait_s = self._limits.failover_wait_s
        self._failover = asyncio.get_running_loop().call_later(
            wait_s, self._apply, request_events.WaitedOut()
        )

    def _close(self, error: InterlockError | None) -> None:
        self._error = error
        for timer in (self._deadline, self._failover):
            if timer is not None:
                timer.cancel()
        self.attendance.close()
        if error is None:
            self.outbox.put(self._answer.finished(self._clock.monotonic()))
        if self.chronicle is not None and self.moved:
            self.chronicle.abandon()
        elif self.chronicle is not None:
            self.chronicle.close(error)
        self.outbox.wake()
        self._look_for_end()

    def _look_for_end(self) -> None:
        if not self.idle:
            return
        if self.chronicle is not None:
            self.chronicle.finish(self._error or _store_away())
        self._on_end(self)


def _unlike_log() -> WorkerLost:
    return WorkerLost(
        "The request's gateway is gone, and its text cannot be continued exactly. Ask again.",
        retry_after_s=life.RETRY_AFTER_LOSS_S,
    )


def _store_away() -> StoreUnavailable:
    return StoreUnavailable("The end of the request could not be written.", retry_after_s=1.0)
