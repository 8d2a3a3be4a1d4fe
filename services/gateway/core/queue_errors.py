"""What a caller is told when it asks for a job that has ended already."""

from __future__ import annotations

from services.common.errors import (
    DeadlineExceeded,
    InterlockError,
    RequestCancelled,
    RequestExists,
    WorkerLost,
)
from services.gateway.core.jobs import Outcome


def ended_error(outcome: Outcome) -> InterlockError:
    """The error for a submission that is repeated after it ended; it never runs twice."""
    match outcome:
        case Outcome.EXPIRED:
            return DeadlineExceeded("The deadline passed while the request waited.")
        case Outcome.CANCELLED:
            return RequestCancelled("The request was cancelled.")
        case Outcome.FAILED:
            return WorkerLost("The request lost its worker, and none can continue it.")
        case Outcome.FINISHED:
            return RequestExists("This request has been answered already.")


def exists_with_other_body() -> RequestExists:
    """The error for an id that stands for another body."""
    return RequestExists("request_id: stands for a request with another body.")
