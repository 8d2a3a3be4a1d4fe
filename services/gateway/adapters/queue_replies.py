"""Arguments and replies of the queue's scripts. Owns: how jobs are laid out for them, and what they answer.

Must not know: connections, or when anything is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.common.allowance import Allowance, allowance_of
from services.common.errors import RequestExists, StoreUnavailable
from services.common.redis_client import RETRY_AFTER_S
from services.gateway.adapters.log_entries import write_entry
from services.gateway.adapters.queue_scripts import ms
from services.gateway.core.jobs import Outcome, QueuedJob, Waiting
from services.gateway.core.log import LogTail
from services.gateway.core.queue_errors import (
    ended_error,
    hopeless,
    queue_full,
    tenant_full,
    workers_barred,
)
from services.gateway.core.queue_quota import quota_exceeded


def fields(job: QueuedJob) -> tuple[str | int, ...]:
    """What the scripts are told of a job first."""
    return (
        job.job_id,
        job.submission,
        job.tenant,
        int(job.band),
        job.cost_tokens,
        ms(job.timeout_s),
        ms(job.waited_s),
    )


def bound(limit: int | None) -> str | int:
    """A bound as the scripts have it: empty where there is none."""
    return "" if limit is None else limit


def read_place(job: QueuedJob, reply: list[Any]) -> Waiting:
    """Where a job waits that was not granted; or the error that the queue refuses it with."""
    match reply[0]:
        case "emptied":
            raise emptied()
        case "full":
            raise queue_full(reply[1], seconds(reply[2]))
        case "tenant_full":
            raise tenant_full(reply[1], seconds(reply[2]))
        case "quota":
            limit = job.limits.tokens_per_minute or 0
            raise quota_exceeded(job.cost_tokens, reply[1], limit, reply[2] / 1000)
        case "late":
            raise hopeless(reply[1], reply[2] / 1000, job.timeout_s)
        case "barred":
            raise workers_barred(seconds(reply[2]))
        case "exists":
            raise RequestExists("This request id is in use by a request that has not ended.")
        case "ended":
            raise ended_error(Outcome(reply[1]))
    return Waiting(int(reply[1]), seconds(reply[2]))


def read_account(job: QueuedJob, account: Sequence[int]) -> Allowance | None:
    """What is left to the job's tenant; None: it has no limit."""
    if not account:
        return None
    limits = job.limits
    return allowance_of(
        limits.tokens_per_minute, account[0], account[1] / 1000, limits.concurrency, account[2]
    )


def emptied() -> StoreUnavailable:
    """The error for a store that has lost the route that this gateway knows of."""
    return StoreUnavailable(
        "The queue's store was emptied. Try again in a moment.", retry_after_s=RETRY_AFTER_S
    )


def tail_args(tail: LogTail | None) -> tuple[str | int, ...]:
    """What is left of a log, behind the other arguments."""
    return () if tail is None else (tail.position, *map(write_entry, tail.entries))


def seconds(ms: int) -> float | None:
    """Seconds; None for the scripts' -1, which means that nothing was measured."""
    return None if ms < 0 else ms / 1000
