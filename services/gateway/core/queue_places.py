"""Places to run. Owns: which worker and revision take a job, and who is kept from which worker.

Pure: times are arguments, in seconds. Leases of workers do not lapse here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.core.jobs import QueuedJob
from services.gateway.core.queue_errors import workers_barred


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

    def is_due(self, now: float) -> bool:
        """Whether one job may try the worker."""
        return self.sleep_s is not None and self.until <= now


@dataclass(slots=True)
class Places:
    """The workers and the route of one model.

    Attributes:
        weights: The route.
        workers: The workers by their names.
        suspect_until: Until when workers get no job.
        opened: Workers whose breaker is open.
        running: The slots that are taken of each worker, at the last look.
        free: The workers that may take a job, since the last look. Those whose free slots are kept for a job
            that needs more of them are left out.
    """

    weights: dict[str, int] = field(default_factory=dict)
    workers: dict[str, QueueWorker] = field(default_factory=dict)
    suspect_until: dict[str, float] = field(default_factory=dict)
    opened: dict[str, OpenPair] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    free: dict[str, QueueWorker] = field(default_factory=dict)

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

    def suspect(self, worker_id: str, until: float) -> None:
        """Keeps jobs from a worker; what it is held for already does not become less."""
        self.suspect_until[worker_id] = max(until, self.suspect_until.get(worker_id, until))

    def takers(self, now: float) -> tuple[int, int]:
        """Workers that take jobs, with or without a free slot: those whose breakers are closed, those due."""
        takers = [
            self.opened.get(worker.worker_id)
            for worker in self.workers.values()
            if not worker.draining and not self._is_suspect(worker.worker_id, now)
        ]
        return takers.count(None), sum(pair is not None and pair.is_due(now) for pair in takers)

    def check_open(self, job: QueuedJob, now: float) -> None:
        """Lets no job begin to wait for workers that are all barred; one that has a text waits on.

        A suspect counts: it is back in a moment.

        Raises:
            WorkersBarred: The breakers of all that serve the route are open.
        """
        serving = [
            self.opened.get(worker.worker_id)
            for worker in self.workers.values()
            if not worker.draining and not worker.ready.isdisjoint(self._routed())
        ]
        pairs = [pair for pair in serving if pair is not None and not pair.is_due(now)]
        if not job.pin and serving and len(pairs) == len(serving):
            sleeps = (pair.until - now for pair in pairs if pair.sleep_s is not None)
            raise workers_barred(min(sleeps, default=None))

    def look(self, running: Mapping[str, int], now: float) -> None:
        """Looks who has a free slot; `running` says how many of each worker are taken."""
        self.running = running
        self.free = {
            worker.worker_id: worker for worker in self.workers.values() if self._is_free(worker, now)
        }

    def able(self, pin: str) -> list[QueueWorker]:
        """The free workers that have the revision of the pin, or one of the route."""
        revisions = {pin} if pin else {revision for revision, weight in self.weights.items() if weight > 0}
        return [worker for worker in self.free.values() if not revisions.isdisjoint(worker.ready)]

    def needed(self, job: QueuedJob) -> int:
        """How many free slots of one worker a job needs; who wants more than any has gets a whole one."""
        return min(job.slots, self._largest)

    def place(self, job: QueuedJob, able: Sequence[QueueWorker], pin: str, avoid: str) -> Place | None:
        """Where of the able a job may go: to its pin, or to the revision of its hash and then the others.

        While no worker has enough free slots for it, those that are free are kept for it, but not of workers
        that are too small for it, whatever ends there.
        """
        if not able:
            return None
        needed = self.needed(job)
        for revision in [pin] if pin else self._revisions(job.job_id):
            if (place := self._pick(able, revision, avoid, needed)) is not None:
                return place
        for worker in able:
            if worker.slots >= needed:
                del self.free[worker.worker_id]
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

    def _pick(self, able: Sequence[QueueWorker], revision: str, avoid: str, needed: int) -> Place | None:
        """The least loaded worker with enough free slots; the one to avoid only if there is no other."""
        found = [
            (worker.worker_id == avoid, self._taken(worker) / worker.slots, worker.worker_id)
            for worker in able
            if revision in worker.ready and worker.slots - self._taken(worker) >= needed
        ]
        if not found:
            return None
        worker_id = min(found)[2]
        return Place(self.workers[worker_id], revision, trial=worker_id in self.opened)

    @property
    def _largest(self) -> int:
        """Slots of the largest worker: what needs more is given a whole one, which refuses it in words."""
        return max((worker.slots for worker in self.workers.values() if not worker.draining), default=1)

    def _is_free(self, worker: QueueWorker, now: float) -> bool:
        """Whether a worker takes jobs, and has a free slot."""
        pair = self.opened.get(worker.worker_id)
        is_closed = pair is None or pair.is_due(now)
        is_open = not worker.draining and is_closed and not self._is_suspect(worker.worker_id, now)
        return is_open and self._taken(worker) < worker.slots

    def _taken(self, worker: QueueWorker) -> int:
        return self.running.get(worker.worker_id, 0)

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
