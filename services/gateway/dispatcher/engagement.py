"""The worker's side of one request. Owns: the attempt under way, and what may still be heard of it.

Must not know: the life of the request, its answer or the queue. What an earlier attempt says comes too
late and goes no further.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from services.common import logs
from services.gateway.core.attempts import AttemptEnd, Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.jobs import Grant
from services.gateway.core.ports import Attempt, Meter, WorkerPool
from services.gateway.dispatcher.hearing import Hearing

# What a cancellation was for, by what was learned of the worker: a text that met its stop string is whole.
_ENDS = {
    Verdict.SUCCESS: AttemptEnd.FINISHED,
    Verdict.NEUTRAL: AttemptEnd.CANCELLED,
    Verdict.FAILURE: AttemptEnd.BROKEN,
}


class Employer(Protocol):
    """For whom a worker works."""

    def heard(self, output: Output) -> None:
        """Tokens of the attempt under way, and with the last of them its end."""
        ...

    def refused(self, reason: RefusalReason, message: str) -> None:
        """The worker did not take the attempt."""
        ...

    def worker_lost(self, *, crashed: bool) -> None:
        """The worker is gone, or what it says cannot be used."""
        ...


class Engagement:
    """At most one attempt at a time, each with a number of its own.

    Args:
        workers: Who generates.
        employer: Hears what they say.
        request_id: For the log.
        meter: Counts how attempts end.
    """

    def __init__(self, workers: WorkerPool, employer: Employer, request_id: str, meter: Meter) -> None:
        self._workers = workers
        self._employer = employer
        self._request_id = request_id
        self._meter = meter
        self._attempt: Attempt | None = None
        self._number = 0
        self._worker_id = ""

    def start(self, grant: Grant, order: WorkOrder) -> None:
        """Asks the granted worker; the order carries the attempt's number."""
        self._number, self._worker_id = order.attempt, grant.worker_id
        sink = Hearing(self, order.attempt)
        self._attempt = self._workers.start(grant.worker_id, grant.worker_address, order, sink)

    def add_credit(self, sequence: int, tokens: int) -> None:
        """Lets the worker send so many tokens more of a sequence."""
        if self._attempt is not None:
            self._attempt.add_credit(sequence, tokens)

    def end(self, sequence: int) -> None:
        """Tells the worker that one sequence is long enough; others go on."""
        if self._attempt is not None:
            self._attempt.end(sequence)

    def complete(self) -> None:
        """The worker has ended the attempt as it should."""
        if self._attempt is not None:
            self._end(AttemptEnd.FINISHED)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None] | None:
        """Tells the worker to stop; returns what is done once it has, None where nothing is under way."""
        if self._attempt is None:
            return None
        attempt = self._attempt
        self._end(_ENDS[verdict])
        return attempt.cancel(verdict)

    def note_broken(self, cause: str) -> None:
        """Says in the log why the attempt was broken off."""
        self._log("attempt.broken", cause=cause)

    def output(self, number: int, output: Output) -> None:
        """See `AttemptListener.output`."""
        if self._hears(number):
            self._employer.heard(output)

    def refused(self, number: int, reason: RefusalReason, message: str) -> None:
        """See `AttemptListener.refused`."""
        if self._hears(number):
            self._end(AttemptEnd.REFUSED)
            self._log("attempt.refused", cause=reason.value, message=message)
            self._employer.refused(reason, message)

    def lost(self, number: int, cause: str, loss: Loss) -> None:
        """See `AttemptListener.lost`."""
        if self._hears(number):
            self._end(AttemptEnd.LOST)
            self._log("attempt.lost", cause=cause)
            self._employer.worker_lost(crashed=loss.crashed)

    def _hears(self, number: int) -> bool:
        return number == self._number and self._attempt is not None

    def _end(self, end: AttemptEnd) -> None:
        self._attempt = None
        self._meter.attempt_ended(end)

    def _log(self, event: str, **fields: object) -> None:
        logs.get_logger().warning(event, request_id=self._request_id, worker_id=self._worker_id, **fields)
