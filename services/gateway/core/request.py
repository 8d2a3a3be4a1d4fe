"""The life of a request: one table, two rules.

Owns: which events a request may meet in which phase, and what has to be done then. Must not know: clocks,
queues, workers or wires. Time-outs arrive as events, and what must happen leaves as effects.

1. Every accepted request reaches exactly one terminal phase; nothing leaves a terminal phase.
2. An event that its phase does not know raises `IllegalEvent` and changes nothing.

    QUEUED -> GRANTED -> RUNNING -> FINISHED | FAILED | CANCELLED | EXPIRED | MOVED
       ^---------'----------'   (the worker refused, or was lost)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from services.common.errors import (
    ArgumentInvalid,
    DeadlineExceeded,
    InterlockError,
    InternalError,
    StoreUnavailable,
    WorkerLost,
)
from services.gateway.core.attempts import RefusalReason
from services.gateway.core.jobs import Grant, Outcome, and_returned
from services.gateway.core.request_events import (
    AttemptLost,
    AwaitWorker,
    CancelAttempt,
    Close,
    Completed,
    DeadlinePassed,
    Decline,
    Effect,
    Enqueue,
    Forgotten,
    Granted,
    LeaseLost,
    Progressed,
    Refused,
    Rejected,
    RequestEvent,
    Requeue,
    Settle,
    StartAttempt,
    StopReached,
    WaitedOut,
    Withdraw,
    Withdrawn,
)
from services.gateway.core.retry import BLAMES_MAX, RETRY_AFTER_LOSS_S

# How long a refusing worker is left alone: a slot frees within steps, a revision loads for longer, a worker
# that drains does not come back, and one that cannot be reached restarts or is soon struck off.
HOLD_S = {
    RefusalReason.BUSY: 0.1,
    RefusalReason.REVISION_NOT_READY: 0.5,
    RefusalReason.EPOCH_STALE: 0.1,
    RefusalReason.DRAINING: 2.0,
    RefusalReason.UNREACHABLE: 0.5,
    RefusalReason.BREAKER_OPEN: 0.1,
}

# What a worker says that is not there for the request at all; any other refusal comes from one that lives.
ABSENCES = frozenset({RefusalReason.UNREACHABLE, RefusalReason.REVISION_NOT_READY})


class Phase(StrEnum):
    """Where a request is. MOVED: another gateway goes on with it, which a resumable one survives."""

    QUEUED = "queued"
    GRANTED = "granted"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    MOVED = "moved"


TERMINAL = frozenset({Phase.FINISHED, Phase.FAILED, Phase.CANCELLED, Phase.EXPIRED, Phase.MOVED})


@dataclass(frozen=True, slots=True)
class Request:
    """What the table needs to know of a request.

    Attributes:
        attempts_max: Workers that it may use up.
        resumable: Whether another gateway may go on with it.
        phase: Where it is.
        starts: The number of the latest attempt. Each time that a worker is asked is one; refusals count.
        failures: Workers that it has used up; refusals do not count.
        blames: Those of them that were lost before they emitted anything for it.
        emitted: Whether anything was generated so far.
        revision: The revision of the latest grant; once tokens were emitted, of all of them.
        missed: Whether a worker that was lent to it since the last loss, or since the last time of waiting
            was over, was not there.
        waited_out: Whether that was so when a whole time of waiting was over.
        grant: The slot that it holds; None while it waits or has ended.
        returned: The nonces of the latest grants that it gave back to wait for another.
    """

    attempts_max: int = 3
    resumable: bool = False
    phase: Phase = Phase.QUEUED
    starts: int = 0
    failures: int = 0
    blames: int = 0
    emitted: bool = False
    revision: str = ""
    missed: bool = False
    waited_out: bool = False
    grant: Grant | None = None
    returned: tuple[str, ...] = ()

    def knows(self, grant: Grant) -> bool:
        """Whether it holds the slot, or has given it back."""
        return grant.nonce in self.returned or (self.grant is not None and self.grant.nonce == grant.nonce)

    @property
    def tries(self) -> bool:
        """Whether it is the one call that tries a worker, which has said nothing yet."""
        return self.phase is Phase.GRANTED and self.grant is not None and self.grant.trial


Step = tuple[Request, tuple[Effect, ...]]


class IllegalEvent(Exception):
    """The phase does not know the event: a defect of the caller."""


def step(request: Request, event: RequestEvent) -> Step:
    """Returns the request after `event`, and what must be done now, in this order.

    Raises:
        IllegalEvent: The table has no such entry; nothing changed.
    """
    transition = TABLE.get((request.phase, type(event)))
    if transition is None:
        raise IllegalEvent(f"{type(event).__name__} in {request.phase}")
    return transition(request, event)


# --- transitions --------------------------------------------------------------------------------------------


def _start(request: Request, event: Granted) -> Step:
    if event.grant.nonce in request.returned:
        # Late news, or a store that has forgotten the return: said again, it is without effect or made good.
        return request, (
            Requeue(event.grant, emitted=True) if request.emitted else Decline(event.grant, 0.0),
        )
    if request.emitted and event.grant.revision != request.revision:
        # One response, one revision: another one would continue somebody else's sentence.
        lost = WorkerLost(
            "The revision that answered is gone, and no other one may continue its text. Ask again.",
            retry_after_s=RETRY_AFTER_LOSS_S,
        )
        return _end(replace(request, grant=event.grant), Phase.FAILED, lost)
    number = request.starts + 1
    granted = replace(
        request, phase=Phase.GRANTED, grant=event.grant, starts=number, revision=event.grant.revision
    )
    return granted, (StartAttempt(event.grant, number),)


def _enqueue_again(request: Request, _: Forgotten) -> Step:
    return request, (Enqueue(),)


def _reject(request: Request, event: Rejected) -> Step:
    # Where the store did not answer, the call may have worked all the same. A resumable request goes on then
    # without this gateway, and the client that comes back joins it: its log must not say that it has ended.
    in_doubt = isinstance(event.error, StoreUnavailable) and not request.resumable
    doubt: tuple[Effect, ...] = (Withdraw(),) if in_doubt else ()
    return replace(request, phase=Phase.FAILED), (*doubt, Close(event.error))


def _run(request: Request, _: Progressed) -> Step:
    return replace(request, phase=Phase.RUNNING, emitted=True), ()


def _run_on(request: Request, _: Progressed) -> Step:
    return request, ()


def _complete(request: Request, _: Completed) -> Step:
    return _end(request, Phase.FINISHED, None)


def _stop(request: Request, _: StopReached) -> Step:
    ended, effects = _end(request, Phase.FINISHED, None)
    return ended, (CancelAttempt(), *effects)


def _refuse(request: Request, event: Refused) -> Step:
    assert request.grant is not None
    if event.reason is RefusalReason.INVALID:
        return _end(request, Phase.FAILED, _impossible(event))
    if event.reason is RefusalReason.BUDGET_SPENT:
        return _end(request, Phase.FAILED, _unaffordable())
    absent = event.reason in ABSENCES
    if absent and request.waited_out:
        return _end(request, Phase.FAILED, _nobody_goes_on())
    waiting = replace(_back_in_line(request, request.grant), missed=request.missed or absent)
    return waiting, (Decline(request.grant, HOLD_S[event.reason]),)


def _refuse_late(request: Request, event: Refused) -> Step:
    if event.reason is RefusalReason.INVALID:
        # A format that could not be followed any further; what was told stays told.
        return _end(request, Phase.FAILED, _impossible(event))
    # A worker that says anything else of what it has begun broke the protocol.
    return _fail_over(request, event)


def _blame(request: Request, event: AttemptLost) -> Step:
    # Only a request that had no token yet may have killed the worker: the others ran well on it.
    if not event.crashed:
        return _fail_over(request, event)
    blamed = replace(request, blames=request.blames + 1)
    if blamed.blames < BLAMES_MAX:
        return _fail_over(blamed, event)
    error = InternalError(
        f"{BLAMES_MAX} workers crashed as they began this request. It is not tried on another one."
    )
    return _end(replace(blamed, failures=blamed.failures + 1), Phase.FAILED, error)


def _fail_over(request: Request, event: AttemptLost | Refused) -> Step:
    assert request.grant is not None
    if isinstance(event, Refused) and event.reason is RefusalReason.BUDGET_SPENT:
        return _end(request, Phase.FAILED, _unaffordable())
    failures = request.failures + 1
    if failures >= request.attempts_max:
        error = WorkerLost(
            f"{failures} workers were lost one after the other while they answered.",
            retry_after_s=RETRY_AFTER_LOSS_S,
        )
        return _end(replace(request, failures=failures), Phase.FAILED, error)
    waiting = _back_in_line(request, request.grant)
    waiting = replace(waiting, failures=failures, missed=False, waited_out=False)
    return waiting, (Requeue(request.grant, request.emitted), AwaitWorker())


def _back_in_line(request: Request, grant: Grant) -> Request:
    returned = and_returned(request.returned, grant.nonce)
    return replace(request, phase=Phase.QUEUED, grant=None, returned=returned)


def _lose_lease(request: Request, _: LeaseLost) -> Step:
    error = WorkerLost(
        "The queue gave this request's slot away while the gateway was not heard of.",
        retry_after_s=RETRY_AFTER_LOSS_S,
    )
    phase = Phase.MOVED if request.resumable else Phase.FAILED
    return replace(request, phase=phase, grant=None), (CancelAttempt(), Close(error))


def _withdraw(request: Request, event: Withdrawn) -> Step:
    return _abandon(request, Phase.CANCELLED, event.error)


def _expire(request: Request, _: DeadlinePassed) -> Step:
    where = "while it waited in the queue" if request.phase is Phase.QUEUED else "before it was done"
    return _abandon(request, Phase.EXPIRED, DeadlineExceeded(f"The request's deadline passed {where}."))


def _note_wait(request: Request, _: WaitedOut) -> Step:
    # A line may be long: whether anybody holds the revision the queue knows, and ends whom it keeps in vain.
    # That a worker which it lists is not there is known here alone, and ends a request if it goes on.
    return replace(request, missed=False, waited_out=request.missed), (AwaitWorker(),)


def _ignore_wait(request: Request, _: WaitedOut) -> Step:
    return request, ()


def _impossible(event: Refused) -> ArgumentInvalid:
    # Another worker would say the same: it is what only workers can check, a format above all.
    return ArgumentInvalid(event.message or "The worker could not make sense of the request.")


def _unaffordable() -> WorkerLost:
    return WorkerLost(
        "The worker was lost, and too many others were lost lately to go on elsewhere.",
        retry_after_s=RETRY_AFTER_LOSS_S,
    )


def _nobody_goes_on() -> WorkerLost:
    return WorkerLost(
        "The worker was lost while it answered, and no other one could go on in its place.",
        retry_after_s=RETRY_AFTER_LOSS_S,
    )


# How an end is told to the queue; one that has moved has not ended.
OUTCOMES = {
    Phase.FINISHED: Outcome.FINISHED,
    Phase.FAILED: Outcome.FAILED,
    Phase.CANCELLED: Outcome.CANCELLED,
    Phase.EXPIRED: Outcome.EXPIRED,
}


def _abandon(request: Request, phase: Phase, error: InterlockError) -> Step:
    """Ends the request while a worker may still be busy with it."""
    ended, effects = _end(request, phase, error)
    return ended, effects if request.grant is None else (CancelAttempt(), *effects)


def _end(request: Request, phase: Phase, error: InterlockError | None) -> Step:
    """Ends the request: its slot, or its place in the queue, is given back; the client is told."""
    ended = replace(request, phase=phase, grant=None)
    leave: Effect = Withdraw() if request.grant is None else Settle(request.grant, OUTCOMES[phase])
    return ended, (leave, Close(error))


Transition = Callable[[Request, Any], Step]

TABLE: dict[tuple[Phase, type], Transition] = {
    (Phase.QUEUED, Granted): _start,
    (Phase.QUEUED, Forgotten): _enqueue_again,
    (Phase.QUEUED, Rejected): _reject,
    # A gateway that slept learns that its place is another one's.
    (Phase.QUEUED, LeaseLost): _lose_lease,
    (Phase.QUEUED, Withdrawn): _withdraw,
    (Phase.QUEUED, DeadlinePassed): _expire,
    (Phase.QUEUED, WaitedOut): _note_wait,
    (Phase.GRANTED, Progressed): _run,
    (Phase.GRANTED, Completed): _complete,
    (Phase.GRANTED, Refused): _refuse,
    (Phase.GRANTED, AttemptLost): _blame,
    (Phase.GRANTED, LeaseLost): _lose_lease,
    (Phase.GRANTED, Withdrawn): _withdraw,
    (Phase.GRANTED, DeadlinePassed): _expire,
    (Phase.GRANTED, WaitedOut): _note_wait,
    (Phase.RUNNING, Progressed): _run_on,
    (Phase.RUNNING, Completed): _complete,
    (Phase.RUNNING, StopReached): _stop,
    (Phase.RUNNING, Refused): _refuse_late,
    (Phase.RUNNING, AttemptLost): _fail_over,
    (Phase.RUNNING, LeaseLost): _lose_lease,
    (Phase.RUNNING, Withdrawn): _withdraw,
    (Phase.RUNNING, DeadlinePassed): _expire,
    (Phase.RUNNING, WaitedOut): _ignore_wait,
}
