"""The moment of an event. Owns: what the fleet and the time come to, as far as the table asks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.core.rollout_events import Fleet, Standing


@dataclass(frozen=True, slots=True)
class Moment:
    """The fleet and the time of an event.

    Attributes:
        fleet: Who is attached.
        ms: The time since the epoch.
        findings: What is to be said for the new revision so far, for people; empty: nothing.
    """

    fleet: Fleet
    ms: int
    findings: str = ""

    def after(self, seconds: float) -> int:
        """The time so much later."""
        return self.ms + round(seconds * 1000)

    @property
    def ready(self) -> int:
        """Workers that have the new revision ready."""
        return sum(worker.new is Standing.READY for worker in self.fleet.workers)

    @property
    def all_staged(self) -> bool:
        """Whether no worker lacks a file; until then nobody gives up what serves."""
        return all(worker.new is Standing.STAGED for worker in self.fleet.workers)

    @property
    def old_is_ready(self) -> bool:
        """Whether a worker has the old revision ready."""
        return any(worker.old is Standing.READY for worker in self.fleet.workers)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the new revision failed, for each worker on which it did."""
        failed = (worker for worker in self.fleet.workers if worker.new is Standing.FAILED)
        return tuple(f"{worker.worker_id}: {worker.failure}" for worker in failed)
