"""Places to run. Owns: which worker and revision take a job, and who is kept from which worker.

Pure: times are arguments, in seconds. Leases of workers do not lapse here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.gateway.core.jobs import QueuedJob


@dataclass(frozen=True, slots=True)
class QueueWorker:
    """A worker as the queue sees it: the last that was known of it."""

    worker_id: str
    address: str
    slots: int
    ready: frozenset[str]
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A free slot for a job; `trial` where it tries a worker whose breaker is open."""

    worker: QueueWorker
    revision: str
    trial: bool


@dataclass(frozen=True, slots=True)
class OpenPair:
    """A worker that is listed as open: until when, and for how long again after a trial; None: for good."""

    until: float
    sleep_s: float | None


@dataclass(slots=True)
class Places:
    """The workers and the route of one model.

    Attributes:
        weights: The route.
        workers: The workers by their names.
        suspect_until: Until when workers get no job.
        opened: Workers whose breaker is open.
        running: The slots that are taken of each worker; the line keeps it.
        kept_free: Workers whose free slots are kept, until the next grant, for a job that needs more of them.
    """

    weights: dict[str, int] = field(default_factory=dict)
    workers: dict[str, QueueWorker] = field(default_factory=dict)
    suspect_until: dict[str, float] = field(default_factory=dict)
    opened: dict[str, OpenPair] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    kept_free: set[str] = field(default_factory=set)

    @property
    def slots(self) -> int:
        """All slots of those that take jobs, suspects included."""
        return sum(worker.slots for worker in self.workers.values() if not worker.draining)

    def set_worker(self, worker: QueueWorker) -> None:
        """Adds a worker or replaces what was known of it; one that was away comes back as a new process."""
        if worker.worker_id not in self.workers:
            self.suspect_until.pop(worker.worker_id, None)
            pair = self.opened.get(worker.worker_id)
            if pair is not None and pair.sleep_s is not None:
                del self.opened[worker.worker_id]
        self.workers[worker.worker_id] = worker

    def list_open(self, worker_id: str, sleep_s: float | None, now: float) -> None:
        """Keeps jobs from a worker for `sleep_s`; None: until it is listed as closed."""
        self.opened[worker_id] = OpenPair(now + (sleep_s or 0.0), sleep_s)

    def open_workers(self, now: float) -> int:
        """Workers that take jobs, with or without a free slot."""
        return sum(
            not worker.draining and not self._is_suspect(worker.worker_id, now)
            for worker in self.workers.values()
        )

    def place(self, job: QueuedJob, pin: str, avoid: str, now: float) -> Place | None:
        """Where a job may go: its pin alone, or the revision of its hash and then the others.

        While no worker has enough free slots for it, those that are free are kept for it.
        """
        revisions = [pin] if pin else list(self._revisions(job.job_id))
        for revision in revisions:
            if (place := self._pick(revision, avoid, job.slots, now)) is not None:
                return place
        short = {
            worker.worker_id
            for worker in self.workers.values()
            if any(self._may_take(worker, revision, now) for revision in revisions)
        }
        self.kept_free |= short
        return None

    def note_trial(self, worker_id: str, now: float) -> None:
        """A trial puts the worker's breaker to sleep again."""
        self.list_open(worker_id, self.opened[worker_id].sleep_s, now)

    def _revisions(self, job_id: str) -> Iterator[str]:
        routed = self._routed()
        if routed:
            wanted = self._weighted_revision(job_id, routed)
            yield wanted
            yield from (revision for revision in routed if revision != wanted)

    def _pick(self, revision: str, avoid: str, slots: int, now: float) -> Place | None:
        """The least loaded worker with enough free slots; the one to avoid only if there is no other."""
        free = [worker for worker in self.workers.values() if self._may_take(worker, revision, now)]
        found = [
            (worker.worker_id == avoid, self.running[worker.worker_id] / worker.slots, worker.worker_id)
            for worker in free
            if worker.slots - self.running[worker.worker_id] >= min(slots, self._largest)
        ]
        if not found:
            return None
        worker_id = min(found)[2]
        return Place(self.workers[worker_id], revision, trial=worker_id in self.opened)

    @property
    def _largest(self) -> int:
        """Slots of the largest worker: what needs more is given a whole one, which refuses it in words."""
        return max((worker.slots for worker in self.workers.values() if not worker.draining), default=1)

    def _may_take(self, worker: QueueWorker, revision: str, now: float) -> bool:
        """Whether a worker has a free slot for a revision that is not kept for another job."""
        pair = self.opened.get(worker.worker_id)
        is_closed = pair is None or (pair.sleep_s is not None and pair.until <= now)
        is_open = not worker.draining and is_closed and not self._is_suspect(worker.worker_id, now)
        has_slot = self.running[worker.worker_id] < worker.slots and worker.worker_id not in self.kept_free
        return revision in worker.ready and is_open and has_slot

    def _is_suspect(self, worker_id: str, now: float) -> bool:
        return self.suspect_until.get(worker_id, now) > now

    def _routed(self) -> list[str]:
        """The revisions that serve, heaviest first, ties by name."""
        serving = [revision for revision, weight in self.weights.items() if weight > 0]
        return sorted(serving, key=lambda revision: (-self.weights[revision], revision))

    def _weighted_revision(self, job_id: str, routed: list[str]) -> str:
        """The revision that the weights give to this job, the same at each attempt."""
        digest = hashlib.sha1(job_id.encode(), usedforsecurity=False).hexdigest()
        point = int(digest[:8], 16) % sum(self.weights[revision] for revision in routed)
        for revision in routed:
            point -= self.weights[revision]
            if point < 0:
                return revision
        raise AssertionError("a point lies within the sum of the weights")
