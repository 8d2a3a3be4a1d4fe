"""One model's queue in memory. Owns: which job goes next, and what is remembered of it.

Pure: times are arguments, in seconds of any clock that does not go back. The scripts of the queue in Redis
follow the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.queue_fair import Charge, FairShares
from services.gateway.core.queue_places import Place, Places, QueueWorker
from services.gateway.core.queue_quota import QuotaBook

__all__ = ["EndedJob", "LiveJob", "QueueLine", "QueueWorker"]

# One grant in so many looks at the bands from the bottom, so that the lowest never starves.
BOTTOM_UP_EVERY = 8
# A finished job's share of the mean service time and of the mean cost.
SERVICE_SHARE = 0.1
# Two arrivals are a microsecond apart at least, so that equal times keep their order.
ARRIVAL_STEP_S = 1e-6


@dataclass(slots=True)
class LiveJob:
    """A job that has not ended. It runs while `grant` is set, and waits otherwise.

    Attributes:
        job: What was submitted.
        arrival: Its place among those of its tenant.
        deadline: When it expires, if it still waits.
        band: The band that it counts in: one higher than its own once it has aged.
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
    def may_age(self) -> bool:
        """Whether it waits for its tenant's turn in the lowest band, which alone ages.

        Within a band nobody starves, and whoever floods it has the oldest jobs there: they must not overtake
        those of the others.
        """
        return self.grant is None and not self.pin and self.band is Band.BATCH

    def note_used(self, tokens: int) -> None:
        """Notes what the job has used so far; what was noted before does not become less."""
        if tokens > self.job.used_tokens:
            self.job = replace(self.job, used_tokens=tokens)


@dataclass(frozen=True, slots=True)
class EndedJob:
    """How a submission ended, and until when that is remembered."""

    submission: str
    outcome: Outcome
    kept_until: float


@dataclass(slots=True)
class QueueLine:
    """Everything that one model's queue knows."""

    epoch: int = 0
    places: Places = field(default_factory=Places)
    shares: dict[Band, FairShares] = field(default_factory=lambda: {band: FairShares() for band in Band})
    quotas: QuotaBook = field(default_factory=QuotaBook)
    caps: dict[str, int | None] = field(default_factory=dict)
    jobs: dict[str, LiveJob] = field(default_factory=dict)
    ended: dict[str, EndedJob] = field(default_factory=dict)
    grants: int = 0
    service_s: float | None = None
    service_tokens: float = 0.0
    last_arrival: float = 0.0

    # --- jobs -----------------------------------------------------------------------------------------------

    def waiting(self) -> list[LiveJob]:
        """The jobs that wait, oldest first."""
        found = [entry for entry in self.jobs.values() if entry.grant is None]
        return sorted(found, key=lambda entry: entry.arrival)

    def running(self, tenant: str) -> int:
        """How many jobs of a tenant run."""
        return sum(entry.grant is not None and entry.job.tenant == tenant for entry in self.jobs.values())

    def current(self, job_id: str, nonce: str) -> LiveJob | None:
        """The job, if `nonce` names the attempt that runs."""
        entry = self.jobs.get(job_id)
        if entry is None or entry.grant is None or entry.grant.nonce != nonce:
            return None
        return entry

    def add(self, job: QueuedJob, now: float, aging_s: float) -> LiveJob:
        """Takes a job in, whose tokens are reserved; it waits."""
        entry = self._new_entry(job, now, aging_s)
        self._enter(entry)
        self.jobs[job.job_id] = entry
        return entry

    def hold(self, job: QueuedJob, grant: Grant, now: float, aging_s: float) -> None:
        """Takes in a job that runs already, free of charge; in the place of what is known of it."""
        entry = self._new_entry(job, now, aging_s)
        if (known := self.jobs.get(job.job_id)) is not None:
            self._correct(known, 0)
            entry.band = known.band
            entry.note_used(known.job.used_tokens)
        entry.grant, entry.attempt, entry.granted_at = grant, grant.attempt, now
        self.jobs[job.job_id] = entry

    def remove(self, entry: LiveJob, used_tokens: int, now: float) -> None:
        """Takes a job out; what it was charged is corrected to what it used, in earlier attempts at least."""
        entry.note_used(used_tokens)
        job, used_tokens = entry.job, entry.job.used_tokens
        if entry.grant is None and used_tokens:
            # The charge of its last grant was taken back when its worker was lost.
            self._enter(entry)
            self.shares[entry.band].charge(job.tenant, used_tokens, job.limits.weight)
        else:
            self._correct(entry, used_tokens)
        del self.jobs[job.job_id]
        self.quotas.settle(job.tenant, job.cost_tokens, used_tokens, now)
        if not any(other.band == entry.band for other in self.jobs.values()):
            self.shares[entry.band].clear()
        if not any(other.job.tenant == job.tenant for other in self.jobs.values()):
            del self.caps[job.tenant]

    def remember(self, entry: LiveJob, outcome: Outcome, kept_until: float, now: float) -> None:
        """Remembers how a job ended; forgets what is remembered long enough."""
        # They are in the order of their ends, and all are remembered for as long.
        while self.ended and (oldest := next(iter(self.ended))) and self.ended[oldest].kept_until <= now:
            del self.ended[oldest]
        self.ended[entry.job.job_id] = EndedJob(entry.job.submission, outcome, kept_until)

    def put_back(self, entry: LiveJob, *, pin: bool) -> None:
        """Ends an attempt; the job waits at its old place, and its tenant is given back the charge."""
        grant = entry.grant
        assert grant is not None
        self._correct(entry, 0)
        entry.avoid, entry.ended_nonce = grant.worker_id, grant.nonce
        if pin:
            entry.pin = grant.revision
        entry.grant = None
        if not entry.pin:
            self._enter(entry)

    def age(self, now: float) -> None:
        """Lifts jobs that have waited long into the next band."""
        for entry in self.waiting():
            if entry.may_age and entry.ages_at <= now:
                left, entry.band = entry.band, Band(entry.band + 1)
                if not any(other.band == left for other in self.jobs.values()):
                    self.shares[left].clear()
                self._enter(entry)

    # --- the next grant -------------------------------------------------------------------------------------

    def grant_next(self, nonce: str, now: float) -> Grant | None:
        """Lends free slots to the job that is next; None where none are free for anyone."""
        self.places.running = Counter()
        for entry in self.jobs.values():
            if entry.grant is not None:
                self.places.running[entry.grant.worker_id] += entry.job.slots
        self.places.kept_free = set()
        for entry in self._turns():
            place = self.places.place(entry.job, entry.pin, entry.avoid, now)
            if place is not None:
                return self._grant(entry, place, nonce, now)
        return None

    def _turns(self) -> Iterator[LiveJob]:
        """Who goes first: pinned jobs; then by band in turn, the tenant served least, its oldest job."""
        waiting = self.waiting()
        yield from (entry for entry in waiting if entry.pin)
        for band in sorted(Band, reverse=(self.grants + 1) % BOTTOM_UP_EVERY != 0):
            lines = self._lines(band, waiting)
            for tenant in self._ranked(band, lines):
                yield from lines[tenant]

    def _grant(self, entry: LiveJob, place: Place, nonce: str, now: float) -> Grant:
        self._charge(entry)
        if place.trial:
            self.places.note_trial(place.worker.worker_id, now)
        entry.attempt += 1
        entry.granted_at = now
        self.grants += 1
        entry.grant = Grant(
            job_id=entry.job.job_id,
            attempt=entry.attempt,
            nonce=nonce,
            worker_id=place.worker.worker_id,
            worker_address=place.worker.address,
            revision=place.revision,
            epoch=self.epoch,
            trial=place.trial,
        )
        return entry.grant

    def _charge(self, entry: LiveJob) -> None:
        shares, job = self.shares[entry.band], entry.job
        if entry.pin:
            # Its turn is none of the line's, and its tenant may have no other job there.
            self._enter(entry)
        else:
            first = self._ranked(entry.band, self._lines(entry.band, self.waiting()))[0]
            shares.raise_floor(shares.counter(first))
        entry.charge = shares.charge(job.tenant, job.cost_tokens, job.limits.weight)

    def _correct(self, entry: LiveJob, used_tokens: int) -> None:
        """Replaces what the attempt was charged by what it used."""
        if entry.charge is not None:
            self.shares[entry.band].correct(entry.job.tenant, entry.charge, used_tokens)
            entry.charge = None

    def _enter(self, entry: LiveJob) -> None:
        """Its tenant enters the band, unless another of its jobs stands in line there."""
        line = self._lines(entry.band, self.waiting()).get(entry.job.tenant, [])
        if all(other is entry for other in line):
            self.shares[entry.band].enter(entry.job.tenant)

    def _lines(self, band: Band, waiting: Iterable[LiveJob]) -> dict[str, list[LiveJob]]:
        """Each tenant's jobs that wait for its turn, oldest first."""
        lines: dict[str, list[LiveJob]] = {}
        for entry in waiting:
            if entry.band == band and not entry.pin:
                lines.setdefault(entry.job.tenant, []).append(entry)
        return lines

    def _ranked(self, band: Band, lines: dict[str, list[LiveJob]]) -> list[str]:
        """Tenants in their turn: served least first, then by their oldest job; without those at their cap."""
        shares = self.shares[band]
        able = [tenant for tenant in lines if self._free_of_cap(tenant) != 0]
        return sorted(able, key=lambda tenant: (shares.counter(tenant), lines[tenant][0].arrival))

    def _free_of_cap(self, tenant: str) -> int | None:
        """How many more jobs of a tenant may run; None: as many as there are."""
        cap = self.caps.get(tenant)
        return None if cap is None else max(0, cap - self.running(tenant))

    # --- estimates ------------------------------------------------------------------------------------------

    def place_of(self, entry: LiveJob) -> Waiting:
        """Where a waiting job stands, and how long it will: an estimate."""
        waiting = self.waiting()
        if entry.pin:
            position = sum(other.pin == entry.pin and other.arrival < entry.arrival for other in waiting)
            return Waiting(position, self.wait_s(0))
        higher = [other for other in waiting if other.band > entry.band]
        band = [other for other in waiting if other.band == entry.band]
        lines, tenant = self._lines(entry.band, band), entry.job.tenant
        turns, place = self._ranked(entry.band, lines), lines[tenant].index(entry)
        turn = turns.index(tenant) if tenant in turns else len(turns)
        ahead = min(place * max(len(turns), 1) + turn, len(band) - 1)
        tokens = sum(other.job.cost_tokens for other in higher)
        tokens += ahead * sum(other.job.cost_tokens for other in band) // len(band)
        return Waiting(len(higher) + ahead, self._longer(self.wait_s(tokens), tenant, place))

    def _longer(self, wait_s: float | None, tenant: str, place: int) -> float | None:
        """Whoever may run few jobs at once waits for its own, too."""
        cap, free = self.caps.get(tenant), self._free_of_cap(tenant)
        if wait_s is None or self.service_s is None or cap is None or free is None:
            return wait_s
        return max(wait_s, max(0, place + 1 - free) * self.service_s / cap)

    def wait_s(self, tokens: float) -> float | None:
        """Estimated time until a job behind so many tokens starts; None while nothing was measured."""
        slots = self.places.slots
        if self.service_s is None or slots == 0:
            return None
        return (self.runs_s(tokens) + self.service_s) / slots

    def runs_s(self, tokens: float) -> float:
        """How long so many estimated tokens take a slot, by the jobs that finished; 0 while none has."""
        return 0.0 if self.service_s is None else tokens * self.service_s / self.service_tokens

    def note_service(self, entry: LiveJob, now: float) -> None:
        """Takes a finished job's time in its slots, and what it was expected to cost, into the means."""
        took, tokens = (now - entry.granted_at) * entry.job.slots, float(entry.job.cost_tokens)
        if self.service_s is None:
            self.service_s, self.service_tokens = took, tokens
        self.service_s += SERVICE_SHARE * (took - self.service_s)
        self.service_tokens += SERVICE_SHARE * (tokens - self.service_tokens)

    def _new_entry(self, job: QueuedJob, now: float, aging_s: float) -> LiveJob:
        self.last_arrival = max(now, self.last_arrival + ARRIVAL_STEP_S)
        self.caps[job.tenant] = job.limits.concurrency
        self.ended.pop(job.job_id, None)
        return LiveJob(
            job,
            arrival=self.last_arrival - job.waited_s,
            deadline=now + job.timeout_s,
            band=job.band,
            ages_at=now - job.waited_s + aging_s,
        )
