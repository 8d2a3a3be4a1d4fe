"""The queue's bounds. Owns: how much waits, and for how long each kind of silence is forgiven."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Bounds of a job queue; the same for all gateways of a mesh.

    Attributes:
        waiting_jobs_max: Most jobs that wait per model.
        tenant_waiting_jobs_max: Most jobs of one tenant that wait per model.
        aging_s: How long a job of the lowest band waits before it counts one band higher.
        lease_ttl_s: How long a job stays its gateway's without a renewal.
        gateway_ttl_s: How long a gateway may be silent before others end its jobs.
        record_ttl_s: How long the record of an ended job is kept.
        suspect_s: How long a worker that failed a job gets no other.
        failover_wait_s: How long a job that must go on with its revision waits for a worker that has it.
        resume_ttl_s: How long the log of a resumable job is kept after its end.
    """

    # A minute of work for a busy laptop; beyond it, waiting helps nobody.
    waiting_jobs_max: int = 1_000
    # Whoever sends most leaves half of the queue to the others.
    tenant_waiting_jobs_max: int = 500
    # Most of a minute's queue is served by then; what is still there has been overtaken.
    aging_s: float = 30.0
    # Gateways renew every second: five missed renewals are a loss, not a hiccup.
    lease_ttl_s: float = 5.0
    gateway_ttl_s: float = 5.0
    # Outlives every retry of a call, and every gateway that slept and still counts as a member.
    record_ttl_s: float = 60.0
    # Time for the controller to notice a death, or for the worker to show that it lives.
    suspect_s: float = 0.8
    # A supervisor restarts a worker within this.
    failover_wait_s: float = 15.0
    # A client that was cut off in a tunnel is back within this.
    resume_ttl_s: float = 600.0
