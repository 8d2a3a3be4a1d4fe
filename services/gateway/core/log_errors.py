"""Errors of requests whose log, or whose text in it, cannot be gone on with."""

from __future__ import annotations

from services.common.errors import StoreUnavailable, WorkerLost

# A client that asks again meets whatever took the place of what was lost.
RETRY_AFTER_LOSS_S = 2.0


def unlike_log() -> WorkerLost:
    """The error for a log whose text is not what comes out of its tokens here."""
    return WorkerLost(
        "The request's gateway is gone, and its text cannot be continued exactly. Ask again.",
        retry_after_s=RETRY_AFTER_LOSS_S,
    )


def lost_log() -> WorkerLost:
    """The error for a log that the store has lost."""
    return WorkerLost(
        "The log of the request was lost, and its text cannot be continued. Ask again.",
        retry_after_s=RETRY_AFTER_LOSS_S,
    )


def not_told_again() -> StoreUnavailable:
    """The error for a request that the store may know again once its gateway has come back to it."""
    return StoreUnavailable(
        "The store of requests was away, and may not know this one yet. Try again in a moment.",
        retry_after_s=1.0,
    )


def store_away() -> StoreUnavailable:
    """The error for an end that the store did not take."""
    return StoreUnavailable("The end of the request could not be written.", retry_after_s=1.0)
