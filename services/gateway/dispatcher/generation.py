"""One request under way. Owns: its table, from enqueue to end.

The shell around `core.request`: everything that happens becomes an event for the table, and the effects that
the table returns are performed here, by its ticket, its engagement, its narration and its timers. Must not
know: which queue, which workers, which API, or who listens: its events go into an outbox, which a client
empties, or the writer of its log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from services.common.allowance import Allowance
from services.common.clock import Clock
from services.common.errors import InterlockError, InternalError, RequestCancelled, RequestExists
from services.gateway.core import request as life
from services.gateway.core import request_events
from services.gateway.core.attempts import Output, RefusalReason
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import FinishReason, Started
from services.gateway.core.jobs import Grant, QueuedJob, Waiting
from services.gateway.core.log import LogTail, TakenUp
from services.gateway.core.log_errors import store_away, unlike_log
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import GenerationLog, JobQueue, Meter, WorkerPool
from services.gateway.core.retry import backoff_s
from services.gateway.dispatcher.attendance import Attendance
from services.gateway.dispatcher.chronicle import Chronicle
from services.gateway.dispatcher.engagement import Engagement
from services.gateway.dispatcher.limits import GenerationLimits
from services.gateway.dispatcher.narration import Narration
from services.gateway.dispatcher.outbox import Outbox
from services.gateway.dispatcher.ticket import Ticket
from services.gateway.dispatcher.timers import Timers


class Generation:
    """A request from `open` to its end.

    Attributes:
        job: What is asked.
        outbox: Its events, for the one who takes them.
        chronicle: The writer of its log, who takes them where it is resumable.
        attendance: Who follows it, where it is resumable.
        allowance: What was left to its tenant when it was admitted; None where the tenant has no limit.
        error: What it ended with; None while it is under way and after a success.

    Args:
        job: What is asked.
        queue: Where slots come from.
        workers: Who generates.
        log: Where the events of resumable requests go.
        clock: Measures.
        limits: Bounds.
        meter: Counts what becomes of it.
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
        meter: Meter,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.job = job
        self._queue = queue
        self._limits = limits
        self._meter = meter
        self._on_end = on_end
        self._request = life.Request(attempts_max=limits.attempts_max, resumable=job.resumable)
        self.outbox = Outbox(limits.credit_tokens, job.params.n)
        self._narration = Narration(job, self.outbox, clock, meter)
        self._engagement = Engagement(workers, self, job.request_id, meter)
        self._ticket = Ticket(job, queue, clock, self, self._narration, self._look_for_end)
        self.chronicle = (
            Chronicle(job, self.outbox, log, self, self._narration, clock) if job.resumable else None
        )
        self.attendance = Attendance(
            limits.detach_grace_s, lambda: log.unattended_s(job.model, job.job_id), self._give_up
        )
        self._accepted = False
        self.allowance: Allowance | None = None
        self.error: InterlockError | None = None
        self._timers = Timers(job.timeout_s - job.waited_s, limits.failover_wait_s, self._apply)

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
    def tries(self) -> bool:
        """Whether the request is the one that tries a worker, which has not spoken yet."""
        return self._request.tries

    @property
    def place_due(self) -> bool:
        """Whether the client is to hear where the request stands in the queue."""
        return self._narration.place_due

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
        return self._narration.started

    @property
    def starts(self) -> int:
        """The number of the latest attempt."""
        return self._request.starts

    def start_behind(self, starts: int) -> None:
        """Numbers attempts behind those of a request before it that had its id.

        A worker may not have ended the last of them yet, and what it says of that is of another number.
        """
        self._request = replace(self._request, starts=starts)

    def queued_job(self) -> QueuedJob:
        """The request as the queue knows it."""
        return self._ticket.queued_job()

    def carry_on(self, taken: TakenUp) -> None:
        """Goes on where another process stopped."""
        assert self.chronicle is not None
        self._accepted = True
        self.chronicle.restore(taken.entries)
        self.attendance.leave_alone()
        started = self.chronicle.journal.started
        is_exact = self._narration.restore(taken.entries, started)
        self._request = replace(
            self._request,
            starts=max(self.starts, taken.starts),
            failures=0 if started is None else started.failures,
            emitted=self._narration.answers.progress > 0,
            revision="" if started is None else started.revision,
        )
        if started is not None:
            # Its worker may have gone with its gateway: as after any loss, it waits so long for another.
            self._timers.await_worker()
        if not is_exact:
            self.withdraw(unlike_log())
        elif taken.grant is not None:
            self.granted(taken.grant)

    async def open(self) -> None:
        """Enqueues the request; raises what the queue says against it."""
        self._ticket.enqueue()
        while not self._accepted and not self.ended:
            await self.outbox.wait()
        if not self._accepted and self.error is not None:
            raise self.error

    def granted(self, grant: Grant) -> None:
        """The queue lent the request a slot. One without a use is given back, unless the job goes on."""
        self._accept(grant.allowance)
        if self.waits:
            self._apply(request_events.Granted(grant))
        elif not self.moved and not self._request.knows(grant):
            self._ticket.give_back(grant)

    def placed(self, place: Waiting) -> None:
        """The queue told the request's place; the client hears of a change."""
        self._accept(place.allowance)
        if self.waits:
            self._narration.place(place)

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

    def _accept(self, allowance: Allowance | None) -> None:
        self._accepted = True
        self.allowance = self.allowance or allowance
        self.outbox.wake()

    def add_credit(self, sequence: int, tokens: int) -> None:
        """Lets the worker send so many tokens more of a sequence."""
        self._engagement.add_credit(sequence, tokens)

    # --- what the log says ----------------------------------------------------------------------------------

    async def dispute(self, grant: Grant) -> None:
        """The log was refused to `grant`: unless the queue confirms it, another gateway has the request."""
        if not await self._queue.register(self.queued_job(), grant):
            self.lease_lost(grant.nonce)

    def overflow(self) -> None:
        """The log is at its bound, which leaves room for every text that the request may get."""
        self.withdraw(InternalError("The log of the request is full."))

    def tail(self, *, whole: bool = False) -> LogTail | None:
        """What is written into the log when the job ends."""
        return None if self.chronicle is None else self.chronicle.tail(whole=whole)

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

    def heard(self, output: Output) -> None:
        """Tokens of the attempt under way, and with the last of a sequence its end."""
        narration, sequence = self._narration, output.sequence
        if not narration.answers.continues(output):
            self._break("its tokens do not continue the text")
            return
        narration.answers[sequence].note_cached(output.cached_prompt_tokens)
        if output.token_ids:
            piece = narration.take(output)
            self._apply(request_events.PROGRESSED)
            narration.tell(piece, sequence, output.index)
            if piece.stop is not None:
                self._stop(sequence)
                return
        if output.finish is not None:
            if not narration.answers.is_last(sequence):
                # An end that is told binds the others to the revision, as a token does.
                self._apply(request_events.PROGRESSED)
            self._complete(sequence, output.finish)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """The worker did not take the attempt."""
        self._apply(request_events.Refused(reason, message))

    def worker_lost(self, *, crashed: bool) -> None:
        """The worker is gone."""
        self._apply(request_events.AttemptLost(crashed))

    def _break(self, cause: str) -> None:
        self._cancel_attempt(Verdict.FAILURE)
        self._engagement.note_broken(cause)
        self._apply(request_events.AttemptLost(crashed=False))

    def _stop(self, sequence: int) -> None:
        """The text of a sequence has met a stop string, which the worker cannot know."""
        if self._narration.answers.is_last(sequence):
            self._cancel_attempt(Verdict.SUCCESS)
            self._apply(request_events.StopReached())
        else:
            self._engagement.end(sequence)
            self._narration.end(sequence)

    def _complete(self, sequence: int, reason: FinishReason) -> None:
        """Nothing is left to generate of a sequence."""
        self._narration.flush(sequence, reason)
        if self._narration.answers.is_last(sequence):
            self._engagement.complete()
            self._apply(request_events.Completed())
        else:
            self._narration.end(sequence)

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
                self._ticket.settle(grant, outcome)
            case request_events.AwaitWorker():
                self._timers.await_worker()
            case request_events.Close(error):
                self._close(error)

    def _pause_log(self) -> None:
        if self.chronicle is not None:
            self.chronicle.pause()

    def _start(self, grant: Grant, number: int) -> None:
        answers = self._narration.answers
        self._narration.granted()
        if self.chronicle is not None:
            self.chronicle.grant(grant)
        for sequence in answers.complete:
            self._complete(sequence, FinishReason.LENGTH)
        if self.ended:
            return
        self._narration.start(grant, self._request.failures)
        order = answers.work_order(grant, number, self.outbox.first_credit_tokens())
        self._engagement.start(grant, order)

    def _cancel_attempt(self, verdict: Verdict = Verdict.NEUTRAL) -> None:
        ended = self._engagement.cancel(verdict)
        if ended is None:
            return

        async def wait() -> None:
            # A slot that is settled while its worker still winds down earns the next job a refusal.
            await ended

        self._ticket.do(wait)

    def _close(self, error: InterlockError | None) -> None:
        self.error = error
        self._timers.close()
        self.attendance.close()
        finished = self._narration.finish() if error is None else None
        if (outcome := life.OUTCOMES.get(self._request.phase)) is not None:
            self._meter.request_ended(self.job.model, outcome, finished)
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
            self.chronicle.finish(self.error or store_away())
        self._on_end(self)
