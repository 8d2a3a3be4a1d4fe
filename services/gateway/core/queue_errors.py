"""What the queue tells a caller that it refuses, or whose job has ended already."""

from __future__ import annotations

from services.common.errors import (
    DeadlineExceeded,
    InterlockError,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestExists,
    WorkerLost,
)
from services.gateway.core.jobs import Outcome
from services.gateway.core.retry import RETRY_AFTER_LOSS_S

# Requests end all the time: a second later there may be room, whatever the estimate.
RETRY_MIN_S = 1.0
# Nobody knows when an operator lets go: as long as a breaker that opened by itself sleeps.
RETRY_WHEN_HELD_S = 5.0


class WorkersBarred(NoWorker):
    """The gateway sends no request to any worker of the model for a while, since too many failed there."""


def queue_full(waiting: int, wait_s: float | None) -> QueueFull:
    """The model's bound is reached; `wait_s` is the estimated time until one more has room."""
    return QueueFull(
        f"The queue is full: {waiting} requests wait for this model.", retry_after_s=_retry_s(wait_s)
    )


def tenant_full(waiting: int, wait_s: float | None) -> QueueFull:
    """The tenant's bound is reached, while others may still enter."""
    return QueueFull(
        f"The queue is full for this subject: {waiting} of its requests wait for this model.",
        retry_after_s=_retry_s(wait_s),
    )


def gateway_full(requests: int) -> QueueFull:
    """This gateway's own bound is reached; another one may have room, and this one has within a moment."""
    error = QueueFull(f"This gateway carries {requests} requests already.", retry_after_s=RETRY_MIN_S)
    error.lasting = False
    return error


def tenant_unread(waiting: int) -> QueueFull:
    """The tenant's part of the prompts that wait to be tokenized is taken, while others may still come."""
    return QueueFull(
        f"{waiting} prompts of this subject wait to be tokenized at this gateway already.",
        retry_after_s=RETRY_MIN_S,
    )


def prompts_unread() -> QueueFull:
    """The prompts that wait to be tokenized take all the memory that they may."""
    error = QueueFull(
        "Too many long prompts wait to be tokenized at this gateway.", retry_after_s=RETRY_MIN_S
    )
    error.lasting = False
    return error


def hopeless(position: int, wait_s: float, left_s: float) -> QueueFull:
    """The job could not be done before its deadline; it may once the queue has become shorter by the rest."""
    error = QueueFull(
        f"The queue is too long for the deadline: {position} requests are ahead, which takes about "
        f"{wait_s:.1f} s, and {left_s:.1f} s are left.",
        retry_after_s=_retry_s(wait_s - left_s),
    )
    # With nobody ahead it was a slot that was missing just then.
    error.lasting = position > 0
    return error


def workers_barred(sleep_s: float | None) -> WorkersBarred:
    """The breakers of all workers are open; `sleep_s` is the time until one is tried, None: they are held."""
    return WorkersBarred(
        "No worker can take the request at present: the breakers of all of them are open.",
        retry_after_s=RETRY_WHEN_HELD_S if sleep_s is None else sleep_s,
    )


def ended_error(outcome: Outcome) -> InterlockError:
    """The error for a submission that is repeated after it ended; it never runs twice."""
    match outcome:
        case Outcome.EXPIRED:
            return DeadlineExceeded("The deadline passed while the request waited.")
        case Outcome.CANCELLED:
            return RequestCancelled("The request was cancelled.")
        case Outcome.FAILED:
            return WorkerLost(
                "The request lost its worker, and none can continue it.", retry_after_s=RETRY_AFTER_LOSS_S
            )
        case Outcome.FINISHED:
            return RequestExists("This request has been answered already.")


def in_use() -> RequestExists:
    """The error for an id whose request is under way and cannot be joined."""
    return RequestExists("request_id: is in use by a request of this subject that has not ended.")


def exists_with_other_body() -> RequestExists:
    """The error for an id that stands for another body."""
    return RequestExists("request_id: stands for a request with another body.")


def _retry_s(wait_s: float | None) -> float:
    return max(RETRY_MIN_S, wait_s or 0.0)
