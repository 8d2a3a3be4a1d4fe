"""Workers behind breakers. Owns: what each attempt's outcome says about its worker, and what a loss costs.

A pool around the pool that speaks with workers: requests and sessions know nothing of it. An attempt at a
worker whose breaker is open is refused without asking; one that was lost when the gateway's retry budget is
spent may not go on elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field

from services.common.clock import Clock
from services.gateway.adapters.breakers import Breakers
from services.gateway.adapters.pybreaker_circuit import Circuit
from services.gateway.core.attempts import Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Permit, Verdict, verdict_of
from services.gateway.core.ports import Attempt, AttemptSink, WorkerPool
from services.gateway.core.retry import RetryBudget

# The status that each refusal stands for. A worker that could not be reached is ill; one that is full, behind
# the route or about to leave is not, and an impossible request is its sender's mistake.
_REFUSAL_CODES = {
    RefusalReason.UNREACHABLE: "UNAVAILABLE",
    RefusalReason.BUSY: "RESOURCE_EXHAUSTED",
    RefusalReason.REVISION_NOT_READY: "FAILED_PRECONDITION",
    RefusalReason.EPOCH_STALE: "FAILED_PRECONDITION",
    RefusalReason.DRAINING: "FAILED_PRECONDITION",
    RefusalReason.INVALID: "INVALID_ARGUMENT",
}


class GuardedWorkerPool:
    """`WorkerPool` over another one.

    Args:
        pool: Who speaks with workers.
        breakers: One a worker.
        budget: What going on after a loss may cost.
        clock: Measures.
    """

    def __init__(self, pool: WorkerPool, breakers: Breakers, budget: RetryBudget, clock: Clock) -> None:
        self._pool = pool
        self._breakers = breakers
        self._budget = budget
        self._clock = clock

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """See `WorkerPool.start`."""
        circuit = self._breakers.worker(worker_id, order.model)
        permit = circuit.admit()
        if permit is None:
            # The board cannot have heard of it, or this grant crossed the news.
            self._breakers.tell(worker_id)
            return _Declined(sink)
        guarded = _Guarded(sink, circuit, permit, self._budget, self._clock)
        guarded.attempt = self._pool.start(worker_id, address, order, guarded)
        return guarded


class _Declined:
    """An attempt that was never made; the sink hears of it in a moment, as it does of all others."""

    def __init__(self, sink: AttemptSink) -> None:
        self._told = asyncio.get_running_loop().call_soon(
            sink.refused, RefusalReason.BREAKER_OPEN, "its breaker is open"
        )

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None]:  # noqa: ARG002 - nobody was asked
        """See `Attempt.cancel`."""
        self._told.cancel()
        return asyncio.sleep(0)


@dataclass(slots=True)
class _Guarded:
    """One attempt, and the sink of it: whatever ends it is settled with the breaker, once.

    A trial decides with its first tokens. Its whole answer may take minutes, in which nobody else would be
    let to a worker that is well again.
    """

    sink: AttemptSink
    circuit: Circuit
    permit: Permit
    budget: RetryBudget
    clock: Clock
    # Set before anything can be heard: a pool calls no sink before `start` has returned.
    attempt: Attempt = field(init=False)
    _settled: bool = False

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        if output.token_ids and self.permit.trial and not self._settled:
            self.permit = self.circuit.pass_trial(self.permit)
        if output.ends_attempt:
            self._settle(Verdict.SUCCESS)
        self.sink.output(output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        self._settle(verdict_of(_REFUSAL_CODES.get(reason, "RESOURCE_EXHAUSTED")))
        self.sink.refused(reason, message)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        self._settle(loss.verdict)
        # What the gateway itself has lost tells of no worker that fails, and is free.
        own = loss is Loss.ABSENCE
        if own or self.budget.spend(self.circuit.target, self.clock.monotonic()):
            self.sink.lost(cause, loss)
        else:
            self.sink.refused(RefusalReason.BUDGET_SPENT, cause)

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""
        self.attempt.add_credit(sequence, tokens)

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""
        self.attempt.end(sequence)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None]:
        """See `Attempt.cancel`."""
        self._settle(verdict)
        return self.attempt.cancel(verdict)

    def _settle(self, verdict: Verdict) -> None:
        if self._settled:
            return
        self._settled = True
        self.circuit.settle(self.permit, verdict)
        if verdict is Verdict.SUCCESS:
            self.budget.earn()
