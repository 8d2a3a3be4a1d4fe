"""What the gateway's core speaks of: principals, jobs, grants and their outcomes. Data alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

from services.common.allowance import Allowance
from services.gateway.core.tenancy import TenantLimits

# News of a grant may arrive when its slot was given back already: so many of the latest are known again.
RETURNED_MAX = 32


class Band(IntEnum):
    """Priority bands; a higher one goes first. The values are those of `interlock.v1.Priority`."""

    BATCH = 1
    INTERACTIVE = 2
    SYSTEM = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls.

    Attributes:
        subject: The token's `sub`: the tenant.
        scopes: What the token allows.
        limits: What the tenant may take.
    """

    subject: str
    scopes: frozenset[str] = field(default_factory=frozenset)
    limits: TenantLimits = field(default_factory=TenantLimits)


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job on its way into the queue.

    Attributes:
        job_id: Hash of subject and request id: 64 hexadecimal digits.
        model: The model's name; it selects the queue.
        tenant: The subject that is charged.
        band: How urgent it is.
        cost_tokens: Prompt, and `max_tokens` of each sequence: what is charged until it is settled.
        timeout_s: Time until its deadline.
        submission: Nonce of this submission; a repeated call with it is recognised.
        waited_s: Time since it arrived. Above 0 where an accepted job comes back after the store lost
            it: it takes its old place, and the queue's bound does not refuse it.
        limits: What its tenant may take.
        digest: Digest of what was asked: the same id with another one is a conflict.
        payload: What another gateway needs to carry it on, of a resumable job; empty: it is not resumable.
        slots: Slots of one worker that it takes: one for each sequence.
        used_tokens: What it has used of them already, in attempts whose workers were lost: it is charged no
            less, however it ends.
        pin: The revision whose text it has, which alone may go on with it; empty: any may begin.
        unclaimed: Whether its id was to stand for it before, and the store could not be told.
    """

    job_id: str
    model: str
    tenant: str
    band: Band
    cost_tokens: int
    timeout_s: float
    submission: str
    waited_s: float = 0.0
    limits: TenantLimits = field(default_factory=TenantLimits)
    digest: str = ""
    payload: str = ""
    slots: int = 1
    used_tokens: int = 0
    pin: str = ""
    unclaimed: bool = False

    def having_used(self, tokens: int) -> QueuedJob:
        """The job once it has used so much; what was noted before does not become less."""
        return self if tokens <= self.used_tokens else replace(self, used_tokens=tokens)


@dataclass(frozen=True, slots=True)
class Grant:
    """A worker's slots, lent to a job until `settle`, `requeue` or `refused`.

    Attributes:
        job_id: The job.
        attempt: 1 for the first.
        nonce: The fence: names this grant alone, and with it the attempt.
        worker_id: The worker.
        worker_address: `host:port` of its WorkerService.
        revision: The revision that answers.
        epoch: The route's epoch.
        trial: Whether it is the one call that tries a worker whose breaker is open.
        degraded: Whether it was made without the store that all gateways share.
        allowance: What was left to its tenant, where it was made in the call that enqueued the job; None: it
            was made later, or the tenant has no limit. Grants that differ in this alone are the same.
    """

    job_id: str
    attempt: int
    nonce: str
    worker_id: str
    worker_address: str
    revision: str
    epoch: int
    trial: bool = False
    degraded: bool = False
    allowance: Allowance | None = field(default=None, compare=False)


def and_returned(returned: tuple[str, ...], nonce: str) -> tuple[str, ...]:
    """Adds the nonce of a grant whose slot is given back to those of the latest such ones."""
    return (*returned, nonce)[-RETURNED_MAX:]


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job waits.

    Attributes:
        position: Estimated number of jobs that start before it.
        estimated_wait_s: Estimated time until it starts; None while nothing was measured.
        allowance: What was left to its tenant, in the answer to the call that enqueued the job; None: its
            tenant has no limit. Places that differ in this alone are the same.
    """

    position: int
    estimated_wait_s: float | None = None
    allowance: Allowance | None = field(default=None, compare=False)


class Outcome(StrEnum):
    """How a job ended, for the queue."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal found out.

    Attributes:
        granted: Grants of waiting jobs whose message was lost, or that this call made.
        waiting: Positions of the jobs that wait, of those whose places the caller asked for.
        lost: Jobs that the caller named and the queue does not give to it: unknown to it (it was
            emptied), ended, expired, or another gateway's.
        unknown: Job ids that the queue gives to this gateway and the caller did not name.
        workers: Workers that take jobs of this gateway now, with or without a free slot; None when nobody
            waited.
        due: Workers that are not among them, since their breakers are open, but would be tried next.
        cancelled: Running jobs that their subject wants ended.
        degraded: Whether it was answered without the store that all gateways share.
        returns: How often this gateway has come back to that store, which may have been emptied meanwhile.
    """

    granted: tuple[Grant, ...] = ()
    waiting: dict[str, Waiting] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    workers: int | None = None
    due: int = 0
    cancelled: frozenset[str] = frozenset()
    degraded: bool = False
    returns: int = 0
