"""The queue in memory. Owns: the queue of a gateway that is alone with its workers.

The working twin of `redis_queue`: the same order, places, fences and records, for one gateway. Leases of
jobs do not lapse here, since their gateway is this process. Tests use it, and so can a gateway that has lost
its store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from services.common.allowance import Allowance, allowance_of
from services.common.clock import Clock
from services.common.errors import NoWorker, QueueFull, QuotaExceeded, RequestExists, RequestUnknown
from services.gateway.adapters.queue_looks import Looks
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.log import LogTail, Notice, TakenUp
from services.gateway.core.queue_errors import ended_error, hopeless, queue_full, tenant_full
from services.gateway.core.queue_jobs import LiveJob
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueLine, QueueWorker
from services.gateway.core.tenancy import TenantUsage, part_of


class MemoryJobQueue:
    """`JobQueue` in this process. `set_route` and `set_worker` say what it may grant. Close it when done.

    Args:
        clock: Measures.
        limits: Bounds.
        write_tail: Writes what is left of a log when its job ends; None: nothing is logged.
    """

    def __init__(
        self,
        clock: Clock,
        limits: QueueLimits | None = None,
        write_tail: Callable[[str, LogTail], None] | None = None,
    ) -> None:
        self._clock = clock
        self._limits = limits or QueueLimits()
        self._lines: dict[str, QueueLine] = {}
        self._receive: Callable[[Grant], None] = _ignore
        self._tail = write_tail
        self._looks = Looks()

    def close(self) -> None:
        """Lends nothing any more unless it is asked."""
        self._looks.close()

    def set_route(self, model: str, epoch: int, weights: Mapping[str, int], gateways: int = 1) -> None:
        """Says which revisions serve; what waits is granted with the next call.

        Of what its limits grant a tenant this queue lets one of so many gateways' part through.
        """
        line = self._line(model)
        line.epoch, line.places.weights = epoch, dict(weights)
        line.quotas.gateways = max(1, gateways)

    def carry(self, model: str, tenant: str, taken_tokens: int, ends_s: float) -> None:
        """Says what all gateways took of a tenant's minute, once what lives here is known."""
        self._line(model).quotas.carry(tenant, taken_tokens, ends_s, self._now())

    def set_worker(self, model: str, worker: QueueWorker) -> None:
        """Adds a worker or replaces what was known of it; what waits is granted with the next call."""
        self._line(model).places.set_worker(worker)

    def remove_worker(self, model: str, worker_id: str) -> None:
        """Forgets a worker; what runs on it ends by `settle` or `requeue`."""
        self._line(model).places.workers.pop(worker_id, None)

    def on_grant(self, receive: Callable[[Grant], None]) -> None:
        """See `JobQueue.on_grant`."""
        self._receive = receive

    def on_notice(self, receive: Callable[[Notice], None]) -> None:
        """See `JobQueue.on_notice`. There is no other gateway to tell anything."""

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """See `JobQueue.enqueue`."""
        try:
            answer = self._enqueue(self._line(job.model), job)
        except (QueueFull, QuotaExceeded, NoWorker) as error:
            error.allowance = self._allowance(job)
            raise
        return replace(answer, allowance=self._allowance(job))

    def _enqueue(self, line: QueueLine, job: QueuedJob) -> Grant | Waiting:
        self._expire(line)
        known = line.find(job.job_id)
        if known is None:
            self._admit(line, job)
        elif known.job.submission != job.submission:
            raise RequestExists("This request id is in use by a request that has not ended.")
        else:
            known.note_used(job.used_tokens)
            if job.pin:
                line.bind(known, job.pin, self._pin_until())
        self._deliver(self._grant_free(line), besides=job.job_id)
        entry = line.find(job.job_id)
        if entry is None:
            raise ended_error(line.ended[job.job_id].outcome)
        if known is None and entry.grant is None:
            self._check_time(line, entry)
        return entry.grant or line.place_of(entry)

    def adopt(self, jobs: Iterable[QueuedJob]) -> None:
        """Takes in jobs that were accepted elsewhere, oldest first, and then lends what is free.

        None of them may be known here. Each takes the place that its `waited_s`, which is above 0, gives it.
        """
        lines: dict[str, QueueLine] = {}
        for job in jobs:
            lines[job.model] = line = self._line(job.model)
            self._admit(line, job)
        for line in lines.values():
            self._deliver(self._grant_free(line))

    async def renew(
        self,
        model: str,
        running: Mapping[str, str],
        waiting: frozenset[str],
        *,
        places: frozenset[str] | None = None,
        leaving: bool = False,  # noqa: ARG002 - see the port
    ) -> Renewal:
        """See `JobQueue.renew`. There is no other gateway that could hand anything over."""
        line = self._line(model)
        self._expire(line)
        unknown = line.jobs.by_id.keys() - running.keys() - waiting
        somebody_waits = line.jobs.waiting_count > 0
        made = self._grant_free(line)
        known = {job_id: entry for job_id in waiting if (entry := line.find(job_id)) is not None}
        lost = {job_id for job_id, nonce in running.items() if line.current(job_id, nonce) is None}
        nonces = {grant.nonce for grant in made}
        workers, due = line.places.takers(self._now()) if somebody_waits else (None, 0)
        missed = [entry.grant for entry in known.values() if entry.grant and entry.grant.nonce not in nonces]
        asked = known.keys() if places is None else known.keys() & places
        return Renewal(
            granted=(*missed, *made),
            waiting=line.places_of(known[job_id] for job_id in asked if known[job_id].grant is None),
            lost=frozenset(lost | (waiting - known.keys())),
            unknown=frozenset(unknown),
            workers=workers,
            due=due,
        )

    async def settle(
        self,
        model: str,
        job_id: str,
        nonce: str,
        outcome: Outcome,
        used_tokens: int,
        tail: LogTail | None = None,
    ) -> bool:
        """See `JobQueue.settle`."""
        line = self._line(model)
        entry = line.current(job_id, nonce)
        if entry is not None:
            self._write_tail(job_id, tail)
            if outcome is Outcome.FINISHED:
                line.note_service(entry, self._now())
            self._end(line, entry, outcome, used_tokens)
        self._deliver(self._grant_free(line))
        return entry is not None

    async def requeue(
        self, model: str, job_id: str, nonce: str, *, pin: str = "", used_tokens: int = 0
    ) -> bool:
        """See `JobQueue.requeue`."""
        line = self._line(model)
        entry = line.current(job_id, nonce)
        if entry is None or entry.grant is None:
            return self._is_repeated(line, job_id, nonce)
        entry.pin_until = self._pin_until()
        entry.note_used(used_tokens)
        self._put_back(line, entry, self._limits.suspect_s, pin=pin)
        return True

    async def refused(self, model: str, job_id: str, nonce: str, *, hold_s: float) -> bool:
        """See `JobQueue.refused`."""
        line = self._line(model)
        entry = line.current(job_id, nonce)
        if entry is None or entry.grant is None:
            return self._is_repeated(line, job_id, nonce)
        entry.attempt -= 1
        self._put_back(line, entry, hold_s)
        return True

    async def register(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """See `JobQueue.register`."""
        return self.hold(job, grant, instead=instead)

    def hold(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """What `register` does, for who cannot wait."""
        line = self._line(job.model)
        known, ended = line.find(job.job_id), line.ended.get(job.job_id)
        if line.current(job.job_id, grant.nonce) is not None:
            return True
        if known is not None and known.job.submission != job.submission:
            return False
        if known is not None and known.grant is not None and not instead:
            return False
        if ended is not None and ended.submission == job.submission:
            return False
        if known is None:
            line.quotas.reserve(job.tenant, job.cost_tokens, None, self._now())
        held = line.hold(job, grant, self._now(), self._limits.aging_s)
        held.pin_until = self._pin_until()
        return True

    async def cancel(
        self,
        model: str,
        job_id: str,
        submission: str,
        tail: LogTail | None = None,
        *,
        used_tokens: int = 0,
        outcome: Outcome = Outcome.CANCELLED,
    ) -> None:
        """See `JobQueue.cancel`."""
        line = self._line(model)
        entry = line.find(job_id)
        if entry is not None and entry.job.submission == submission:
            self._write_tail(job_id, tail)
            self._end(line, entry, outcome, used_tokens)
        self._deliver(self._grant_free(line))

    async def stop(self, model: str, job_id: str) -> bool:
        """See `JobQueue.stop`. What lives is this gateway's own, and is ended by its own means."""
        line = self._line(model)
        if line.find(job_id) is None and job_id not in line.ended:
            raise RequestUnknown("No request of that id is under way for this subject.")
        return line.find(job_id) is not None

    async def take_up(self, model: str, job_id: str) -> TakenUp | None:  # noqa: ARG002 - see the port
        """See `JobQueue.take_up`. No other process could leave anything here."""
        return None

    async def release(self, model: str, job_id: str, submission: str) -> bool:  # noqa: ARG002 - see the port
        """See `JobQueue.release`. There is no other gateway."""
        return False

    async def reap(self, model: str) -> tuple[str, ...]:
        """See `JobQueue.reap`. There is no other gateway; pinned jobs that nobody can continue end."""
        line, now = self._line(model), self._now()
        line.note_held(now, now - self._limits.failover_wait_s)
        for entry in line.jobs.all_pinned():
            if entry.pin not in line.held_at and entry.pin_until <= now:
                self._end(line, entry, Outcome.FAILED)
        self._deliver(self._grant_free(line))
        return ()

    async def length(self, model: str) -> int:
        """See `JobQueue.length`."""
        return self._line(model).jobs.waiting_count

    async def list_open(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """See `BreakerBoard.list_open`."""
        self.bar(model, worker_id, sleep_s)

    def bar(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """What `list_open` does, for who cannot wait."""
        self._line(model).places.list_open(worker_id, sleep_s, self._now())

    async def list_closed(self, model: str, worker_id: str) -> None:
        """See `BreakerBoard.list_closed`."""
        line = self._line(model)
        line.places.opened.pop(worker_id, None)
        self._deliver(self._grant_free(line))

    async def usage(self, model: str, tenant: str) -> TenantUsage:
        """See `UsageBook.usage`."""
        line, now = self._line(model), self._now()
        account = line.quotas.account(tenant, now)
        running = line.jobs.running[tenant]
        age_s = line.quotas.age_s(now)
        return TenantUsage(age_s, account.used_tokens, account.reserved_tokens, running)

    async def book(self, model: str, tenant: str, nonce: str, used_tokens: int, *, unless: str = "") -> None:
        """See `StoreQueue.book`."""
        line, now = self._line(model), self._now()
        if line.find(unless) is None and unless not in line.ended:
            line.quotas.book(tenant, nonce, used_tokens, now, now + self._limits.record_ttl_s)

    def _write_tail(self, job_id: str, tail: LogTail | None) -> None:
        if tail is not None and self._tail is not None:
            self._tail(job_id, tail)

    def _now(self) -> float:
        return self._clock.monotonic()

    def _pin_until(self) -> float:
        """Until when a job that is pinned now waits for a worker with its revision."""
        return self._now() + self._limits.failover_wait_s

    def _allowance(self, job: QueuedJob) -> Allowance | None:
        """What is left to a job's tenant; None: it has no limit."""
        line, limits, now = self._line(job.model), job.limits, self._now()
        if limits.tokens_per_minute is None and limits.concurrency is None:
            return None
        account = line.quotas.account(job.tenant, now)
        taken = account.used_tokens + account.reserved_tokens
        requests, gateways = line.jobs.tenants[job.tenant], line.quotas.gateways
        tokens_limit, requests_limit = (
            part_of(bound, gateways) for bound in (limits.tokens_per_minute, limits.concurrency)
        )
        return allowance_of(tokens_limit, taken, line.quotas.left_s(now), requests_limit, requests)

    def _line(self, model: str) -> QueueLine:
        return self._lines.setdefault(model, QueueLine())

    def _admit(self, line: QueueLine, job: QueuedJob) -> None:
        ended = line.ended.get(job.job_id)
        if ended is not None and ended.submission == job.submission:
            raise ended_error(ended.outcome)
        limit = job.limits.tokens_per_minute
        # A job that was accepted once comes back after a loss; it is not refused now.
        if job.waited_s > 0:
            limit = None
        else:
            line.places.check_open(job, self._now())
            self._check_room(line, job.tenant)
        line.quotas.reserve(job.tenant, job.cost_tokens, limit, self._now())
        line.add(job, self._now(), self._limits.aging_s).pin_until = self._pin_until()

    def _check_room(self, line: QueueLine, tenant: str) -> None:
        if self._is_crowded(line, tenant):
            # A hold may have ended since the last call.
            self._deliver(self._grant_free(line))
        waiting, own = line.jobs.waiting_count, line.jobs.waiting[tenant]
        if waiting >= self._limits.waiting_jobs_max:
            raise queue_full(waiting, line.wait_s(0))
        if own >= self._limits.tenant_waiting_jobs_max:
            raise tenant_full(own, line.wait_s(0))

    def _is_crowded(self, line: QueueLine, tenant: str) -> bool:
        return (
            line.jobs.waiting_count >= self._limits.waiting_jobs_max
            or line.jobs.waiting[tenant] >= self._limits.tenant_waiting_jobs_max
        )

    def _check_time(self, line: QueueLine, entry: LiveJob) -> None:
        """Lets nobody wait for nothing: a job that starts too late to end in time goes at once."""
        place = line.place_of(entry)
        left_s = entry.deadline - self._now()
        if entry.job.waited_s > 0 or place.estimated_wait_s is None:
            return
        if place.estimated_wait_s + line.runs_s(entry.job.cost_tokens) / entry.job.slots > left_s:
            line.remove(entry, 0, self._now())
            raise hopeless(place.position, place.estimated_wait_s, left_s)

    def _put_back(self, line: QueueLine, entry: LiveJob, hold_s: float, *, pin: str = "") -> None:
        line.put_back(entry, pin=pin)
        line.places.suspect(entry.avoid, self._now() + hold_s)
        self._deliver(self._grant_free(line))
        self._looks.after(hold_s, lambda: self._deliver(self._grant_free(line)))

    def _is_repeated(self, line: QueueLine, job_id: str, nonce: str) -> bool:
        """Whether a call is the repetition of one whose answer was lost; grants like every call."""
        entry = line.find(job_id)
        repeated = entry is not None and entry.ended_nonce == nonce
        made = self._grant_free(line)
        if repeated and entry is not None and entry.grant is not None and entry.grant not in made:
            made.append(entry.grant)
        self._deliver(made)
        return repeated

    def _end(self, line: QueueLine, entry: LiveJob, outcome: Outcome, used_tokens: int = 0) -> None:
        now = self._now()
        line.remove(entry, used_tokens, now)
        line.remember(entry, outcome, now + self._limits.record_ttl_s, now)

    def _expire(self, line: QueueLine) -> None:
        for entry in line.overdue(self._now()):
            self._end(line, entry, Outcome.EXPIRED)

    def _grant_free(self, line: QueueLine) -> list[Grant]:
        self._expire(line)
        line.age(self._now())
        made: list[Grant] = []
        while (grant := line.grant_next(secrets.token_hex(8), self._now())) is not None:
            made.append(grant)
        return made

    def _deliver(self, grants: Iterable[Grant], *, besides: str | None = None) -> None:
        for grant in grants:
            if grant.job_id != besides:
                self._receive(grant)


def _ignore(grant: Grant) -> None:
    """Stands in until a receiver is set; the next renewal tells of the grant again."""
