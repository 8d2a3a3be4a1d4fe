"""One request under way. Owns: its timers, its attempt at a worker and its events, from enqueue to end.

The shell around `core.request`: everything that happens becomes an event for the table, and the effects that
the table returns are performed here. Must not know: which queue, which workers, which API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from services.common import logs
from services.common.clock import Clock
from services.common.errors import ClientStalled, InterlockError, RequestCancelled
from services.gateway.core import request as life
from services.gateway.core import request_events
from services.gateway.core.answer import Answer
from services.gateway.core.attempts import Output, RefusalReason, work_order
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import Event, FinishReason, Queued, Started
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import Attempt, JobQueue, WorkerPool
from services.gateway.core.retry import backoff_s
from services.gateway.dispatcher.hearing import Hearing
from services.gateway.dispatcher.outbox import Outbox
from services.gateway.dispatcher.reader import ReaderWatch
from services.gateway.dispatcher.ticket import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationLimits:
    """Bounds of every request; the settings of the same names say why."""

    credit_tokens: int = 256
    client_stall_s: float = 30.0
    attempts_max: int = 3
    failover_wait_s: float = 15.0


class Generation:
    """A request from `open` to its end; an asynchronous iterator of its events.

    Asking for the next event says that the last one is written: that renews the worker's credit. Iteration
    ends after `Finished`, or raises the InterlockError that the request ended with.

    Args:
        job: What is asked.
        queue: Where slots come from.
        workers: Who generates.
        clock: Measures.
        limits: Bounds.
        on_end: Is called, perhaps more than once, when nothing is left to do.
    """

    def __init__(
        self,
        job: GenerationJob,
        queue: JobQueue,
        workers: WorkerPool,
        clock: Clock,
        limits: GenerationLimits,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.job = job
        self._workers = workers
        self._clock = clock
        self._limits = limits
        self._on_end = on_end
        self._request = life.Request(attempts_max=limits.attempts_max)
        self._answer = Answer(
            len(job.prompt_ids),
            job.params.max_tokens,
            job.decode,
            job.params.stop,
            accepted_s=clock.monotonic(),
            scored=job.params.logprobs is not None,
        )
        self._outbox = Outbox(limits.credit_tokens)
        self._ticket = Ticket(job, queue, clock, self, self._look_for_end)
        self._reader = ReaderWatch(clock, limits.client_stall_s, self._stalled)
        self._attempt: Attempt | None = None
        self._started: Started | None = None
        self._unsaid = False
        self._position: int | None = None
        self._accepted = False
        self._error: InterlockError | None = None
        self._deadline = asyncio.get_running_loop().call_later(
            job.timeout_s, self._apply, request_events.DeadlinePassed()
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

    async def open(self) -> None:
        """Enqueues the request; raises what the queue says against it."""
        self._ticket.enqueue()
        while not self._accepted and not self.ended:
            await self._outbox.wait()
        if not self._accepted and self._error is not None:
            raise self._error

    def granted(self, grant: Grant) -> None:
        """The queue lent the request a slot. One that it has no use for is given back."""
        self._accept()
        if self.waits:
            self._apply(request_events.Granted(grant))
        elif self._request.grant is None or self._request.grant.nonce != grant.nonce:
            self._ticket.settle(grant, Outcome.CANCELLED, 0)

    def placed(self, place: Waiting) -> None:
        """The queue told the request's place; the client hears of a change."""
        self._accept()
        if self.waits and place.position != self._position:
            self._position = place.position
            self._outbox.put(Queued(place.position, place.estimated_wait_s))

    def rejected(self, error: InterlockError) -> None:
        """The queue does not take the request."""
        if self.waits:
            self._apply(request_events.Rejected(error))

    def forgotten(self) -> None:
        """The queue does not know the request, which waits."""
        if self.waits:
            self._apply(request_events.Forgotten())

    def lease_lost(self, nonce: str) -> None:
        """The queue has given the request's slot away."""
        if self._request.grant is not None and self._request.grant.nonce == nonce:
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
        self._outbox.wake()

    # --- what the client's side asks ------------------------------------------------------------------------

    async def first_grant(self, timeout_s: float) -> Started | None:
        """Returns what is known of the worker once one is granted; None when that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._started is None and not self.ended:
                    await self._outbox.wait()
        except TimeoutError:
            return None
        return self._started

    async def ready(self, timeout_s: float) -> bool:
        """Whether, within `timeout_s`, asking for the next event will answer at once."""
        self._return()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._outbox and not self.ended:
                    await self._outbox.wait()
        except TimeoutError:
            return False
        return True

    def __aiter__(self) -> Self:
        """The request itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one."""
        self._return()
        while not self._outbox:
            if self.ended:
                raise self._error or StopAsyncIteration
            await self._outbox.wait()
        self._reader.left()
        return self._outbox.take()

    async def aclose(self) -> None:
        """Ends the request when the client is gone."""
        self._reader.close()
        self.withdraw(RequestCancelled("The client ended the call."))

    def _return(self) -> None:
        self._reader.returned()
        credit = self._outbox.acknowledge()
        if credit and self._attempt is not None:
            self._attempt.add_credit(credit)

    def _stalled(self) -> None:
        stall_s = self._limits.client_stall_s
        self.withdraw(ClientStalled(f"The client read nothing for {stall_s:g} s; its slot was freed."))

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
            self._outbox.put_piece(piece, index)
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

    def lost(self, number: int, cause: str) -> None:
        """The worker of attempt `number` is gone."""
        if self._hears(number):
            self._attempt = None
            self._log("attempt.lost", cause=cause)
            self._apply(request_events.AttemptLost())

    def _hears(self, number: int) -> bool:
        """Whether `number` is the attempt under way; what an earlier one says comes too late."""
        return number == self._request.starts and self._attempt is not None

    def _break(self, cause: str) -> None:
        self._cancel_attempt(Verdict.FAILURE)
        self._log("attempt.broken", cause=cause)
        self._apply(request_events.AttemptLost())

    def _say_started(self) -> None:
        if self._unsaid and self._started is not None:
            self._unsaid = False
            self._outbox.put(self._started)

    def _complete(self, reason: FinishReason) -> None:
        self._attempt = None
        self._say_started()
        piece = self._answer.flush(reason)
        self._outbox.put_piece(piece, self._answer.index)
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
                pause_s = backoff_s(self._request.failures, grant.nonce)
                self._ticket.do(lambda: asyncio.sleep(pause_s))
                self._ticket.requeue(grant, emitted=emitted)
            case request_events.Decline(grant, hold_s):
                self._ticket.decline(grant, hold_s)
            case request_events.Settle(grant, outcome):
                self._ticket.settle(grant, outcome, self._answer.used_tokens)
            case request_events.AwaitWorker():
                self._await_worker()
            case request_events.Close(error):
                self._close(error)

    def _start(self, grant: Grant, number: int) -> None:
        self._position = None
        self._answer.grant(self._clock.monotonic())
        job = self.job
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
            self._outbox.put(self._started)
        credit_tokens = self._outbox.first_credit_tokens()
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
        self._reader.close()
        if error is None:
            self._outbox.put(self._answer.finished(self._clock.monotonic()))
        self._outbox.wake()
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self.idle:
            self._on_end(self)
