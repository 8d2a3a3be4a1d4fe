"""Workers whose work is counted. Owns: what of each attempt's end is the revision's doing.

A pool around the pool that speaks with workers. An attempt failed when the worker ended it in error, or broke
the protocol. A worker that is lost counts once, however many attempts it carried: its process may have been
killed, and nobody knows which of them did it, if any. Refusals and cancellations count nothing, nor does what
a gateway lost because it stood still itself.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field

from services.common.clock import Clock
from services.gateway.core.attempts import Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.ports import Attempt, AttemptSink, WorkerPool
from services.gateway.core.tallies import Tallies


class CountedWorkerPool:
    """`WorkerPool` over another one.

    Args:
        pool: Who speaks with workers.
        tallies: Where the counts go.
        clock: Measures.
    """

    def __init__(self, pool: WorkerPool, tallies: Tallies, clock: Clock) -> None:
        self._pool = pool
        self._tallies = tallies
        self._clock = clock
        # Bounded by the requests under way.
        self._running: dict[str, list[_Counted]] = {}

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """See `WorkerPool.start`."""
        began_s = self._clock.monotonic()
        counted = _Counted(self, worker_id, order.model, order.revision, sink, began_s)
        # A text that goes on elsewhere has its first token already.
        counted.awaits_first = not any(order.emitted)
        self._running.setdefault(worker_id, []).append(counted)
        counted.attempt = self._pool.start(worker_id, address, order, counted)
        return counted

    def note_first_token(self, one: _Counted) -> None:
        """The first tokens of an attempt have come."""
        ttft_s = self._clock.monotonic() - one.began_s
        self._tallies.count_first_token(one.model, one.revision, ttft_s)

    def end(self, one: _Counted, verdict: Verdict, *, worker_lost: bool = False) -> None:
        """An attempt is over; `worker_lost`: it ended with its worker, as all others there will."""
        running = self._running.get(one.worker_id, [])
        if one not in running:
            return
        running.remove(one)
        if verdict is Verdict.SUCCESS:
            self._tallies.count_finished(one.model, one.revision)
        elif verdict is Verdict.FAILURE and not one.excused:
            self._tallies.count_failed(one.model, one.revision)
        if worker_lost:
            for other in running:
                other.excused = other.excused or other.revision == one.revision
        if not running:
            del self._running[one.worker_id]


@dataclass(slots=True, eq=False)
class _Counted:
    """One attempt, and the sink of it: whatever ends it is counted, once."""

    pool: CountedWorkerPool
    worker_id: str
    model: str
    revision: str
    sink: AttemptSink
    began_s: float
    awaits_first: bool = True
    # Whether the loss of its worker has been counted already.
    excused: bool = False
    # Set before anything can be heard: a pool calls no sink before `start` has returned.
    attempt: Attempt = field(init=False)

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        if self.awaits_first and output.token_ids:
            self.awaits_first = False
            self.pool.note_first_token(self)
        if output.ends_attempt:
            self.pool.end(self, Verdict.SUCCESS)
        self.sink.output(output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        self.pool.end(self, Verdict.NEUTRAL)
        self.sink.refused(reason, message)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        self.pool.end(self, loss.verdict, worker_lost=loss in {Loss.PROCESS, Loss.SILENCE})
        self.sink.lost(cause, loss)

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""
        self.attempt.add_credit(sequence, tokens)

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""
        self.attempt.end(sequence)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None]:
        """See `Attempt.cancel`."""
        self.pool.end(self, verdict)
        return self.attempt.cancel(verdict)
