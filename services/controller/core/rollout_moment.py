"""The moment of an event. Owns: what the fleet and the time come to, as far as the table asks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.core.rollout_events import Fleet, Standing

FAILURES = frozenset({Standing.FAILED, Standing.GIVEN_UP})


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
        return all(worker.new in {Standing.STAGED, Standing.READY} for worker in self.fleet.workers)

    @property
    def old_is_ready(self) -> bool:
        """Whether a worker has the old revision ready."""
        return any(worker.old is Standing.READY for worker in self.fleet.workers)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the new revision failed, for each worker on which it did."""
        failed = (worker for worker in self.fleet.workers if worker.new in FAILURES)
        return tuple(f"{worker.worker_id}: {worker.failure}" for worker in failed)

    @property
    def no_way_back(self) -> str:
        """Why no worker can come to the old revision by itself any more; empty while one may."""
        workers = self.fleet.workers
        if not workers or any(worker.old is not Standing.GIVEN_UP for worker in workers):
            return ""
        return f"{workers[0].worker_id}: {workers[0].old_failure}"

    @property
    def nothing_left(self) -> bool:
        """Whether no worker can come to either revision by itself any more."""
        given_up = (Standing.GIVEN_UP, Standing.GIVEN_UP)
        workers = self.fleet.workers
        return bool(workers) and all((worker.new, worker.old) == given_up for worker in workers)
