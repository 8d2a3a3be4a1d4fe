"""The live jobs of one model. Owns: what is known of each, and by what they are found and counted.

Pure. Every index is kept with each change, so that no question goes through all jobs: a thousand may wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from services.gateway.core.jobs import Band, Grant, QueuedJob
from services.gateway.core.queue_fair import Charge

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class LiveJob:
    """A job that has not ended. It runs while `grant` is set, and waits otherwise.

    Attributes:
        job: What was submitted.
        arrival: Its place among those of its tenant.
        deadline: When it expires, if it still waits.
        band: The band that it counts in: one higher than its own while it is lifted.
        ages_at: When it ages.
        grant: The current one.
        granted_at: When that was made.
        charge: What that was charged.
        attempt: How many attempts were charged.
        ended_nonce: The attempt that ended last, by which a repeated call is recognised.
        pin: The revision that it must go on with; empty while it has none.
        pin_until: Until when it waits for a worker of that revision to come back.
        avoid: The worker where its last attempt ended.
    """

    job: QueuedJob
    arrival: float
    deadline: float
    band: Band
    ages_at: float
    grant: Grant | None = None
    granted_at: float = 0.0
    charge: Charge | None = None
    attempt: int = 0
    ended_nonce: str = ""
    pin: str = ""
    pin_until: float = 0.0
    avoid: str = ""

    @property
    def is_lifted(self) -> bool:
        """Whether it counts one band higher than it asked for, as it has waited long."""
        return self.band is not self.job.band

    def note_used(self, tokens: int) -> None:
        """Notes what the job has used so far."""
        self.job = self.job.having_used(tokens)


@dataclass(slots=True)
class LiveJobs:
    """All live jobs. Whoever changes a job's state, band or pin takes it out before and puts it in again.

    Attributes:
        by_id: All of them.
        lines: By band, each tenant's jobs that wait for its turn, oldest first; no line is empty.
        lifted: By tenant, the lifted job that waits for its turn; there is one at most.
        pinned: By revision, the jobs that wait for it, oldest first.
        bands: Jobs by band.
        tenants: Jobs by tenant.
        running: Running jobs by tenant.
        waiting: Waiting jobs by tenant.
        slots: Slots that are taken, by worker.
        waits: Waiting jobs by band.
        backlog: Estimated tokens of the waiting jobs by band.
        due: The job whose turn has come and that waits for slots.
    """

    by_id: dict[str, LiveJob] = field(default_factory=dict)
    lines: dict[Band, dict[str, list[LiveJob]]] = field(default_factory=lambda: {band: {} for band in Band})
    lifted: dict[str, LiveJob] = field(default_factory=dict)
    pinned: dict[str, list[LiveJob]] = field(default_factory=dict)
    bands: Counter[Band] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    slots: Counter[str] = field(default_factory=Counter)
    waits: Counter[Band] = field(default_factory=Counter)
    backlog: Counter[Band] = field(default_factory=Counter)
    due: LiveJob | None = None

    @property
    def waiting_count(self) -> int:
        """How many jobs wait."""
        return self.waits.total()

    def in_line(self, band: Band, tenant: str) -> bool:
        """Whether a job of the tenant waits for its turn in the band."""
        return tenant in self.lines[band]

    def all_pinned(self) -> list[LiveJob]:
        """The waiting jobs that are pinned, oldest first."""
        return sorted((entry for line in self.pinned.values() for entry in line), key=_arrival)

    def put(self, entry: LiveJob) -> None:
        """Takes a job in as it is now."""
        self.by_id[entry.job.job_id] = entry
        self._count(entry, 1)
        if entry.grant is not None:
            return
        if entry.pin:
            insort(self.pinned.setdefault(entry.pin, []), entry, key=_arrival)
        else:
            insort(self.lines[entry.band].setdefault(entry.job.tenant, []), entry, key=_arrival)
            if entry.is_lifted:
                self.lifted[entry.job.tenant] = entry

    def take(self, entry: LiveJob) -> None:
        """Takes a job out that is in."""
        del self.by_id[entry.job.job_id]
        self._count(entry, -1)
        if self.due is entry:
            self.due = None
        if entry.grant is not None:
            return
        if not entry.pin and entry.is_lifted:
            del self.lifted[entry.job.tenant]
        lines, name = self._lines_of(entry)
        line = lines[name]
        del line[place_in(line, entry)]
        if not line:
            del lines[name]

    def _lines_of(self, entry: LiveJob) -> tuple[dict[str, list[LiveJob]], str]:
        return (self.pinned, entry.pin) if entry.pin else (self.lines[entry.band], entry.job.tenant)

    def _count(self, entry: LiveJob, sign: int) -> None:
        job = entry.job
        _add(self.bands, entry.band, sign)
        _add(self.tenants, job.tenant, sign)
        if entry.grant is not None:
            _add(self.running, job.tenant, sign)
            _add(self.slots, entry.grant.worker_id, sign * job.slots)
        else:
            _add(self.waiting, job.tenant, sign)
            _add(self.waits, entry.band, sign)
            _add(self.backlog, entry.band, sign * job.cost_tokens)


def place_in(line: list[LiveJob], entry: LiveJob) -> int:
    """How many jobs of its line, which is one of those kept by arrival, stand before a job."""
    place = bisect_left(line, entry.arrival, key=_arrival)
    while line[place] is not entry:
        place += 1
    return place


def _arrival(entry: LiveJob) -> float:
    return entry.arrival


def _add(counts: Counter[T], name: T, delta: int) -> None:
    """Changes a count; a count of nothing leaves no name behind."""
    counts[name] += delta
    if not counts[name]:
        del counts[name]
