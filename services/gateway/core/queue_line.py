"""One model's queue in memory. Owns: which job goes next, where it goes, and what is remembered of it.

Pure: times are arguments, in seconds of any clock that does not go back. The scripts of the queue in Redis
follow the same rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Waiting

# One grant in so many looks at the bands from the bottom, so that the lowest never starves.
BOTTOM_UP_EVERY = 8
# A finished job's share of the mean service time.
SERVICE_SHARE = 0.1
# Two arrivals are a microsecond apart at least, so that equal times keep their order.
ARRIVAL_STEP_S = 1e-6


@dataclass(frozen=True, slots=True)
class QueueWorker:
    """A worker as the queue sees it: the last that was known of it."""

    worker_id: str
    address: str
    slots: int
    ready: frozenset[str]
    draining: bool = False


@dataclass(slots=True)
class LiveJob:
    """A job that has not ended. It runs while `grant` is set, and waits otherwise.

    Attributes:
        job: What was submitted.
        arrival: Its place among the others.
        deadline: When it expires, if it still waits.
        grant: The current one.
        granted_at: When that was made.
        attempt: How many attempts were charged.
        ended_nonce: The attempt that ended last, by which a repeated call is recognised.
        pin: The revision that it must go on with; empty while it has none.
        pin_until: Until when it waits for a worker of that revision to come back.
        avoid: The worker where its last attempt ended.
    """

    job: QueuedJob
    arrival: float
    deadline: float
    grant: Grant | None = None
    granted_at: float = 0.0
    attempt: int = 0
    ended_nonce: str = ""
    pin: str = ""
    pin_until: float = 0.0
    avoid: str = ""

    def is_before(self, other: LiveJob) -> bool:
        """Whether it is counted as ahead of `other`: in a higher band, or older in the same."""
        if other.pin:
            return self.pin == other.pin and self.arrival < other.arrival
        if self.job.band != other.job.band:
            return self.job.band > other.job.band
        return not self.pin and self.arrival < other.arrival


@dataclass(frozen=True, slots=True)
class EndedJob:
    """How a submission ended, and until when that is remembered."""

    submission: str
    outcome: Outcome
    kept_until: float


@dataclass(slots=True)
class QueueLine:
    """Everything that one model's queue knows."""

    weights: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    workers: dict[str, QueueWorker] = field(default_factory=dict)
    suspect_until: dict[str, float] = field(default_factory=dict)
    jobs: dict[str, LiveJob] = field(default_factory=dict)
    ended: dict[str, EndedJob] = field(default_factory=dict)
    grants: int = 0
    service_s: float | None = None
    last_arrival: float = 0.0

    def waiting(self) -> list[LiveJob]:
        """The jobs that wait, oldest first."""
        found = [entry for entry in self.jobs.values() if entry.grant is None]
        return sorted(found, key=lambda entry: entry.arrival)

    def current(self, job_id: str, nonce: str) -> LiveJob | None:
        """The job, if `nonce` names the attempt that runs."""
        entry = self.jobs.get(job_id)
        if entry is None or entry.grant is None or entry.grant.nonce != nonce:
            return None
        return entry

    def add(self, job: QueuedJob, now: float) -> LiveJob:
        """Takes a job in; it waits."""
        self.last_arrival = max(now, self.last_arrival + ARRIVAL_STEP_S)
        entry = LiveJob(job, self.last_arrival - job.waited_s, now + job.timeout_s)
        self.jobs[job.job_id] = entry
        self.ended.pop(job.job_id, None)
        return entry

    def end(self, entry: LiveJob, outcome: Outcome, now: float, record_ttl_s: float) -> None:
        """Ends a job and remembers how; forgets what is remembered long enough."""
        del self.jobs[entry.job.job_id]
        self.ended = {job_id: ended for job_id, ended in self.ended.items() if ended.kept_until > now}
        self.ended[entry.job.job_id] = EndedJob(entry.job.submission, outcome, now + record_ttl_s)

    def grant_next(self, nonce: str, now: float) -> Grant | None:
        """Lends a free slot to the job that is next; None where no slot is free for anyone."""
        entry = self._next(now)
        if entry is None:
            return None
        worker, revision = next(self._places(entry, now))
        entry.attempt += 1
        entry.granted_at = now
        self.grants += 1
        entry.grant = Grant(
            job_id=entry.job.job_id,
            attempt=entry.attempt,
            nonce=nonce,
            worker_id=worker.worker_id,
            worker_address=worker.address,
            revision=revision,
            epoch=self.epoch,
        )
        return entry.grant

    def place_of(self, entry: LiveJob) -> Waiting:
        """Where a waiting job stands."""
        position = sum(other.is_before(entry) for other in self.waiting())
        return Waiting(position, self.wait_s(position))

    def wait_s(self, position: int) -> float | None:
        """Estimated time until a job at `position` starts; None while nothing was measured."""
        slots = sum(worker.slots for worker in self.workers.values())
        if self.service_s is None or slots == 0:
            return None
        return (position + 1) * self.service_s / slots

    def open_workers(self, now: float) -> int:
        """Workers that take jobs, with or without a free slot."""
        return sum(
            not worker.draining and self.suspect_until.get(worker.worker_id, now) <= now
            for worker in self.workers.values()
        )

    def note_service(self, entry: LiveJob, now: float) -> None:
        """Takes a finished job's service time into the mean."""
        took = now - entry.granted_at
        mean = took if self.service_s is None else self.service_s
        self.service_s = mean + SERVICE_SHARE * (took - mean)

    def _next(self, now: float) -> LiveJob | None:
        """Pinned jobs first; then by band in turn, the oldest. Any free worker can take any of the latter."""
        waiting = self.waiting()
        for entry in waiting:
            if entry.pin and self._pick(entry.pin, "", now):
                return entry
        if not any(self._pick(revision, "", now) for revision in self._routed()):
            return None
        bands = sorted(Band, reverse=(self.grants + 1) % BOTTOM_UP_EVERY != 0)
        return next((e for band in bands for e in waiting if e.job.band == band and not e.pin), None)

    def _places(self, entry: LiveJob, now: float) -> Iterator[tuple[QueueWorker, str]]:
        """Where a job may go, best first: its pin alone, or the revision of its hash and then the others."""
        wanted = entry.pin or self._weighted_revision(entry.job.job_id)
        others = [] if entry.pin else [revision for revision in self._routed() if revision != wanted]
        for revision in [wanted, *others]:
            worker = self._pick(revision, entry.avoid, now)
            if worker is not None:
                yield worker, revision

    def _pick(self, revision: str, avoid: str, now: float) -> QueueWorker | None:
        """The least loaded worker with a free slot; the one to avoid only if there is no other."""
        found = [
            (worker.worker_id == avoid, self._running(worker.worker_id) / worker.slots, worker.worker_id)
            for worker in self.workers.values()
            if revision in worker.ready
            and not worker.draining
            and self.suspect_until.get(worker.worker_id, now) <= now
            and self._running(worker.worker_id) < worker.slots
        ]
        return self.workers[min(found)[2]] if found else None

    def _running(self, worker_id: str) -> int:
        grants = (entry.grant for entry in self.jobs.values())
        return sum(grant is not None and grant.worker_id == worker_id for grant in grants)

    def _routed(self) -> list[str]:
        """The revisions that serve, heaviest first, ties by name."""
        serving = [revision for revision, weight in self.weights.items() if weight > 0]
        return sorted(serving, key=lambda revision: (-self.weights[revision], revision))

    def _weighted_revision(self, job_id: str) -> str:
        """The revision that the weights give to this job, the same at each attempt."""
        digest = hashlib.sha1(job_id.encode(), usedforsecurity=False).hexdigest()
        routed = self._routed()
        point = int(digest[:8], 16) % sum(self.weights[revision] for revision in routed)
        for revision in routed:
            point -= self.weights[revision]
            if point < 0:
                return revision
        raise AssertionError("a point lies within the sum of the weights")
