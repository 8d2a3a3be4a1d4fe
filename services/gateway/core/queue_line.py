"""One model's queue in memory. Owns: which job goes next, and what is remembered of it.

Pure: times are arguments, in seconds of any clock that does not go back. The scripts of the queue in Redis
follow the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.queue_fair import FairShares
from services.gateway.core.queue_jobs import LiveJob, LiveJobs, place_in
from services.gateway.core.queue_places import Place, Places, QueueWorker
from services.gateway.core.queue_quota import QuotaBook
from services.gateway.core.tenancy import part_of

__all__ = ["EndedJob", "QueueLine", "QueueWorker"]

# Of so many grants one begins with the lowest band and another with the next, so that neither starves.
TURNS = 8
EARLY = {0: (Band.BATCH, Band.INTERACTIVE, Band.SYSTEM), 4: (Band.INTERACTIVE, Band.SYSTEM, Band.BATCH)}
# The band whose jobs age, and the one that they are lifted into.
_AGING, _AGED = Band.BATCH, Band.INTERACTIVE
# A place is counted anew so many times, until it does not change any more.
RECOUNTS_MAX = 16
# A finished job's share of the mean service time and of the mean cost.
SERVICE_SHARE = 0.1
# Two arrivals are a microsecond apart at least, so that equal times keep their order.
ARRIVAL_STEP_S = 1e-6


@dataclass(frozen=True, slots=True)
class EndedJob:
    """How a submission ended, and until when that is remembered."""

    submission: str
    outcome: Outcome
    kept_until: float


@dataclass(slots=True)
class QueueLine:
    """Everything that one model's queue knows.

    `held_at` says when a worker was last seen to hold a revision that jobs are pinned to, lately.
    """

    epoch: int = 0
    places: Places = field(default_factory=Places)
    shares: dict[Band, FairShares] = field(default_factory=lambda: {band: FairShares() for band in Band})
    quotas: QuotaBook = field(default_factory=QuotaBook)
    caps: dict[str, int | None] = field(default_factory=dict)
    jobs: LiveJobs = field(default_factory=LiveJobs)
    ended: dict[str, EndedJob] = field(default_factory=dict)
    held_at: dict[str, float] = field(default_factory=dict)
    grants: int = 0
    service_s: float | None = None
    service_tokens: float = 0.0
    last_arrival: float = 0.0

    # --- jobs -----------------------------------------------------------------------------------------------

    def find(self, job_id: str) -> LiveJob | None:
        """The live job of that id."""
        return self.jobs.by_id.get(job_id)

    def current(self, job_id: str, nonce: str) -> LiveJob | None:
        """The job, if `nonce` names the attempt that runs."""
        entry = self.find(job_id)
        if entry is None or entry.grant is None or entry.grant.nonce != nonce:
            return None
        return entry

    def overdue(self, now: float) -> list[LiveJob]:
        """The jobs that wait and whose deadline has passed."""
        return [entry for entry in self.jobs.by_id.values() if entry.deadline <= now and entry.grant is None]

    def add(self, job: QueuedJob, now: float, aging_s: float) -> LiveJob:
        """Takes a job in, whose tokens are reserved; it waits."""
        entry = self._new_entry(job, now, aging_s)
        if not entry.pin:
            self._enter(entry)
        self.jobs.put(entry)
        return entry

    def hold(self, job: QueuedJob, grant: Grant, now: float, aging_s: float) -> LiveJob:
        """Takes in a job that runs already, free of charge; in the place of what is known of it."""
        entry = self._new_entry(job, now, aging_s)
        if (known := self.find(job.job_id)) is not None:
            self._correct(known, 0)
            self.jobs.take(known)
            entry.band = known.band
            entry.pin = entry.pin or known.pin
            entry.note_used(known.job.used_tokens)
        entry.grant, entry.attempt, entry.granted_at = grant, grant.attempt, now
        self.jobs.put(entry)
        return entry

    def bind(self, entry: LiveJob, pin: str, pin_until: float) -> None:
        """Pins a job that was submitted again. A grant of another revision was heard by nobody and ends."""
        if entry.pin == pin:
            return
        self.jobs.take(entry)
        if (grant := entry.grant) is not None and grant.revision != pin:
            self._take_back(entry, grant)
        entry.pin, entry.pin_until = pin, pin_until
        self.jobs.put(entry)

    def remove(self, entry: LiveJob, used_tokens: int, now: float) -> None:
        """Takes a job out; what it was charged is corrected to what it used, in earlier attempts at least."""
        self.jobs.take(entry)
        entry.note_used(used_tokens)
        job, used_tokens = entry.job, entry.job.used_tokens
        if entry.grant is None and used_tokens:
            # The charge of its last grant was taken back when its worker was lost.
            self._enter(entry)
            self.shares[entry.band].charge(job.tenant, used_tokens, job.limits.weight)
        else:
            self._correct(entry, used_tokens)
        self.quotas.settle(job.tenant, job.cost_tokens, used_tokens, now)
        if not self.jobs.bands[entry.band]:
            self.shares[entry.band].clear()
        if not self.jobs.tenants[job.tenant]:
            del self.caps[job.tenant]

    def remember(self, entry: LiveJob, outcome: Outcome, kept_until: float, now: float) -> None:
        """Remembers how a job ended; forgets what is remembered long enough."""
        # They are in the order of their ends, and all are remembered for as long.
        while self.ended and (oldest := next(iter(self.ended))) and self.ended[oldest].kept_until <= now:
            del self.ended[oldest]
        self.ended[entry.job.job_id] = EndedJob(entry.job.submission, outcome, kept_until)

    def note_held(self, now: float, since: float) -> None:
        """Notes which revisions that jobs are pinned to are held; forgets what was seen until `since`."""
        held = {revision for worker in self.places.workers.values() for revision in worker.ready}
        self.held_at = {revision: at for revision, at in self.held_at.items() if at > since}
        self.held_at |= dict.fromkeys(held & self.jobs.pinned.keys(), now)

    def put_back(self, entry: LiveJob, *, pin: str = "") -> None:
        """Ends an attempt; the job waits at its old place, and its tenant is given back the charge.

        `pin` is the revision that must go on with it from now on; empty: what bound it before still does.
        """
        grant = entry.grant
        assert grant is not None
        self.jobs.take(entry)
        self._take_back(entry, grant)
        entry.avoid = grant.worker_id
        entry.pin = pin or entry.pin
        if not entry.pin:
            self._enter(entry)
        self.jobs.put(entry)

    def _take_back(self, entry: LiveJob, grant: Grant) -> None:
        """Ends the attempt of a job that is taken out and goes on elsewhere, and takes its charge back.

        One that was lifted is so no more: of several that come back at once, one alone may be.
        """
        self._correct(entry, 0)
        entry.grant, entry.ended_nonce = None, grant.nonce
        if entry.is_lifted:
            self._change_band(entry, entry.job.band)

    def age(self, now: float) -> None:
        """Lifts jobs that have waited long for their turn in the lowest band into the next; it alone ages.

        Within a band nobody starves, and whoever floods it has the oldest jobs there: they must not overtake
        those of the others. Of each tenant it is the oldest job, while no other one of it waits there: an old
        backlog is never before what the tenant asks for now.
        """
        for tenant in self._ranked(_AGING):
            oldest = self.jobs.lines[_AGING][tenant][0]
            if oldest.ages_at <= now and not self.jobs.in_line(_AGED, tenant):
                self._move(oldest, _AGED)

    def _move(self, entry: LiveJob, band: Band) -> None:
        """Lets a waiting job count in another band, at its old place there."""
        self.jobs.take(entry)
        self._change_band(entry, band)
        self._enter(entry)
        self.jobs.put(entry)

    def _change_band(self, entry: LiveJob, band: Band) -> None:
        """Lets a job count in another band that is taken out."""
        former, entry.band = entry.band, band
        if not self.jobs.bands[former]:
            self.shares[former].clear()

    # --- the next grant -------------------------------------------------------------------------------------

    def grant_next(self, nonce: str, now: float) -> Grant | None:
        """Lends free slots to the job that is next; None where none are free for anyone."""
        self.places.look(self.jobs.slots, now)
        for band, entry in self._turns():
            if not self.places.free:
                return None
            able = self.places.able(entry.pin)
            place = self.places.place(entry.job, able, entry.pin, entry.avoid)
            if place is not None:
                if entry.band is not band:
                    self._move(entry, band)
                return self._grant(entry, place, nonce, now)
            if not entry.pin and any(worker.slots < self.places.needed(entry.job) for worker in able):
                # Those behind it may start there now, and shall not go before it for ever.
                self.jobs.due = self.jobs.due or entry
        return None

    def _turns(self) -> Iterator[tuple[Band, LiveJob]]:
        """Who goes first, and in which band: pinned jobs; the due one; by band, tenant and age.

        A lifted job stays the first of its tenant in the turn of its own band too.
        """
        if not self.places.free:
            return
        yield from ((entry.band, entry) for entry in self.jobs.all_pinned())
        due = self.jobs.due
        if due is not None and self._free_of_cap(due.job.tenant) != 0:
            yield due.band, due
        for band in EARLY.get((self.grants + 1) % TURNS, sorted(Band, reverse=True)):
            lifted = self.jobs.lifted if band is _AGING else {}
            for tenant in self._ranked(band, lifted.values()):
                if tenant in lifted:
                    yield band, lifted[tenant]
                yield from ((band, entry) for entry in self.jobs.lines[band].get(tenant, ()))

    def _grant(self, entry: LiveJob, place: Place, nonce: str, now: float) -> Grant:
        self._charge(entry)
        if place.trial:
            self.places.note_trial(place.worker.worker_id, now)
        self.jobs.take(entry)
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
        self.jobs.put(entry)
        return entry.grant

    def _charge(self, entry: LiveJob) -> None:
        shares, job = self.shares[entry.band], entry.job
        if entry.pin:
            # Its turn is none of the line's, and its tenant may have no other job there.
            self._enter(entry)
        else:
            first = self._ranked(entry.band)[0]
            shares.raise_floor(shares.counter(first))
        entry.charge = shares.charge(job.tenant, job.cost_tokens, job.limits.weight)

    def _correct(self, entry: LiveJob, used_tokens: int) -> None:
        """Replaces what the attempt was charged by what it used."""
        if entry.charge is not None:
            self.shares[entry.band].correct(entry.job.tenant, entry.charge, used_tokens)
            entry.charge = None

    def _enter(self, entry: LiveJob) -> None:
        """Its tenant enters the band, unless a job of it stands in line there, where this one does not."""
        if not self.jobs.in_line(entry.band, entry.job.tenant):
            self.shares[entry.band].enter(entry.job.tenant)

    def _ranked(self, band: Band, lifted: Iterable[LiveJob] = ()) -> list[str]:
        """Tenants in their turn: served least first, then by their oldest job; without those at their cap.

        Those that have a lifted job alone rank as they would if it came back.
        """
        lines, shares = self.jobs.lines[band], self.shares[band]
        at_entry = shares.counter_at_entry
        ranks = {entry.job.tenant: (at_entry(entry.job.tenant), entry.arrival) for entry in lifted}
        ranks |= {tenant: (shares.counter(tenant), line[0].arrival) for tenant, line in lines.items()}
        return sorted((tenant for tenant in ranks if self._free_of_cap(tenant) != 0), key=ranks.__getitem__)

    def _free_of_cap(self, tenant: str) -> int | None:
        """How many more jobs of a tenant may run; None: as many as there are."""
        cap = self.caps.get(tenant)
        return None if cap is None else max(0, cap - self.jobs.running[tenant])

    # --- estimates ------------------------------------------------------------------------------------------

    def places_of(self, entries: Iterable[LiveJob]) -> dict[str, Waiting]:
        """Where waiting jobs stand, by their ids, and how long each will: an estimate."""
        turns: dict[Band, dict[str, int]] = {}
        found = {}
        for entry in entries:
            if entry.band not in turns:
                turns[entry.band] = {tenant: turn for turn, tenant in enumerate(self._ranked(entry.band))}
            found[entry.job.job_id] = self._place_of(entry, turns[entry.band])
        return found

    def place_of(self, entry: LiveJob) -> Waiting:
        """Where one waiting job stands."""
        return self.places_of((entry,))[entry.job.job_id]

    def _place_of(self, entry: LiveJob, turns: dict[str, int]) -> Waiting:
        jobs, tenant = self.jobs, entry.job.tenant
        if entry.pin:
            return Waiting(place_in(jobs.pinned[entry.pin], entry), self.wait_s(0))
        place = place_in(jobs.lines[entry.band][tenant], entry)
        turn = turns.get(tenant, len(turns))
        before = min(place * max(len(turns), 1) + turn, jobs.waits[entry.band] - 1)
        above = self._count_above(entry, before)
        counts = {entry.band: before, **above}
        tokens = sum(count * jobs.backlog[band] // jobs.waits[band] for band, count in counts.items())
        return Waiting(sum(counts.values()), self._longer(self.wait_s(tokens), entry, place))

    def _count_above(self, entry: LiveJob, before: int) -> dict[Band, int]:
        """How many jobs of each higher band start before one that has `before` ahead of it in its own.

        How many there are depends on how many start in all: they are counted anew from all of them down, and
        so never to too few.
        """
        counts = {band: count for band, count in self.jobs.waits.items() if band > entry.band}
        ahead = before + sum(counts.values())
        for _ in range(RECOUNTS_MAX if self.places.slots else 0):
            counts = {band: self._count_starts(band, entry.job.tenant, ahead + 1) for band in counts}
            fewer = before + sum(counts.values())
            if fewer == ahead:
                break
            ahead = fewer
        return counts

    def _count_starts(self, band: Band, tenant: str, starts: int) -> int:
        """How many jobs of a higher band start while so many start in all.

        A tenant that may run few at once begins another one where one of its own ends; the tenant of the job
        that waits begins all of them before it.
        """
        jobs = self.jobs.waits[band]
        for other, line in self.jobs.lines[band].items():
            cap, free = self.caps.get(other), self._free_of_cap(other)
            if other != tenant and cap is not None and free is not None:
                jobs -= max(0, len(line) - free - math.ceil(cap * starts / self.places.slots))
        return jobs

    def _longer(self, wait_s: float | None, entry: LiveJob, place: int) -> float | None:
        """Whoever may run few jobs at once waits for its own, too."""
        tenant = entry.job.tenant
        cap, free = self.caps.get(tenant), self._free_of_cap(tenant)
        if wait_s is None or self.service_s is None or cap is None or free is None:
            return wait_s
        above = sum(len(self.jobs.lines[band].get(tenant, ())) for band in Band if band > entry.band)
        return max(wait_s, max(0, above + place + 1 - free) * self.service_s / cap)

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
        self.caps[job.tenant] = part_of(job.limits.concurrency, self.quotas.gateways)
        self.ended.pop(job.job_id, None)
        return LiveJob(
            job,
            arrival=self.last_arrival - job.waited_s,
            deadline=now + job.timeout_s,
            band=job.band,
            ages_at=now - job.waited_s + aging_s,
            pin=job.pin,
        )
