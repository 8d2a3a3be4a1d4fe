"""The queue in Redis. Owns: the calls of its scripts.

The rules live in `scripts/`, where each operation is one atomic step; `docs/queue.md` describes them. Here
arguments are laid out and replies are read. It knows nothing of requests, sessions or texts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from services.common.errors import InterlockError, RequestUnknown, StoreUnavailable
from services.common.redis_client import RedisStore
from services.gateway.adapters.job_claims import JobClaims
from services.gateway.adapters.log_entries import read_entry
from services.gateway.adapters.queue_replies import (
    bound,
    emptied,
    fields,
    read_account,
    read_place,
    seconds,
    tail_args,
)
from services.gateway.adapters.queue_scripts import QueueScripts, ms
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.adapters.redis_grants import GrantListener, read_grant
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.log import LogTail, Notice, TakenUp
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.tenancy import TenantUsage

_OPERATIONS = (
    "book",
    "cancel",
    "enqueue",
    "grant",
    "length",
    "list_closed",
    "list_open",
    "reap",
    "refused",
    "register",
    "release",
    "renew",
    "requeue",
    "settle",
    "stop",
    "take_up",
    "usage",
)

# A refusal or failure schedules one look when the worker may be used again; more at once say nothing new.
_LOOKS_MAX = 64
# A hold ends inside Redis a little before the look that it was scheduled for.
_LOOK_MARGIN_S = 0.005


class RedisJobQueue:
    """`JobQueue` in Redis, shared by all gateways.

    `start` subscribes to the grants that other gateways make for this one; a message that is lost is found
    by the next `renew`. `close` ends the subscription; the store is the caller's.

    Args:
        store: Redis.
        gateway_id: This gateway.
        limits: The queue's bounds.
        expects_route: Whether a model's route was seen before. Where it is gone, Redis was emptied, and takes
            no job until the controller has written to it.
    """

    def __init__(
        self,
        store: RedisStore,
        gateway_id: str,
        limits: QueueLimits | None = None,
        expects_route: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._limits = limits or QueueLimits()
        self._expects_route = expects_route
        self._scripts = QueueScripts(store, gateway_id, self._limits, _OPERATIONS)
        self._claims = JobClaims(RedisRequestDirectory(store), self._limits)
        self._receive: Callable[[Grant], None] = _ignore
        self._notice: Callable[[Notice], None] = _ignore
        self._listener = GrantListener(store, gateway_id, self._hand_over, self._tell)
        self._looks: set[asyncio.Task[None]] = set()
        # Jobs with a call under way; a renewal that overlaps one cannot judge that job.
        self._busy: Counter[str] = Counter()
        self._renewals: list[set[str]] = []

    async def start(self) -> None:
        """Begins to listen for grants. Returns at once, also while Redis is away."""
        self._listener.start()

    async def wait_subscribed(self) -> None:
        """Waits until grants by others are heard without delay."""
        await self._listener.subscribed.wait()

    async def close(self) -> None:
        """Ends the subscription and what is scheduled. Jobs stay as they are."""
        looks = tuple(self._looks)
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        await self._claims.close()
        await self._listener.close()

    def on_grant(self, receive: Callable[[Grant], None]) -> None:
        """See `JobQueue.on_grant`."""
        self._receive = receive

    def on_notice(self, receive: Callable[[Notice], None]) -> None:
        """See `JobQueue.on_notice`."""
        self._notice = receive

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """See `JobQueue.enqueue`."""
        limits = self._limits
        with self._calling(job.job_id):
            async with self._claims.beside(job) if job.waited_s > 0 else contextlib.nullcontext():
                reply = await self._run(
                    "enqueue",
                    job.model,
                    *fields(job),
                    job.limits.weight,
                    bound(job.limits.concurrency),
                    bound(job.limits.tokens_per_minute),
                    limits.waiting_jobs_max,
                    limits.tenant_waiting_jobs_max,
                    ms(limits.aging_s),
                    *self._kept(job),
                    int(self._expects_route(job.model)),
                    job.slots,
                    job.used_tokens,
                    *self._pinned(job),
                )
        grants = reply[3] if len(reply) > 3 else []
        own = self._deliver(grants, besides=job.job_id)
        allowance = read_account(job, reply[4] if len(reply) > 4 else [])
        try:
            answer = replace(own or read_place(job, reply), allowance=allowance)
        except InterlockError as error:
            error.allowance = allowance
            raise
        if job.unclaimed and not job.waited_s:
            # Not before: what is refused has no id.
            self._claims.behind(job)
        return answer

    async def renew(
        self,
        model: str,
        running: Mapping[str, str],
        waiting: frozenset[str],
        *,
        places: frozenset[str] | None = None,
        leaving: bool = False,
    ) -> Renewal:
        """See `JobQueue.renew`."""
        fences = [text for pair in running.items() for text in pair]
        asked = waiting if places is None else waiting & places
        with self._renewing() as touched:
            grants, positions, lost, unknown, workers, cancelled, due = await self._run(
                "renew", model, int(leaving), len(running), len(asked), *fences, *asked, *(waiting - asked)
            )
        return Renewal(
            granted=tuple(read_grant(text) for text in grants),
            waiting={
                job_id: Waiting(int(position), seconds(wait_ms))
                for job_id, position, wait_ms in zip(*[iter(positions)] * 3, strict=True)
            },
            lost=frozenset(lost) - touched,
            unknown=frozenset(unknown) - touched,
            workers=None if int(workers) < 0 else int(workers),
            cancelled=frozenset(cancelled),
            due=int(due),
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
        with self._calling(job_id):
            current, grants = await self._run(
                "settle", model, job_id, nonce, outcome.value, used_tokens, *tail_args(tail)
            )
        self._deliver(grants)
        return bool(current)

    async def requeue(
        self, model: str, job_id: str, nonce: str, *, pin: str = "", used_tokens: int = 0
    ) -> bool:
        """See `JobQueue.requeue`."""
        suspect_s = self._limits.suspect_s
        pin_ms = ms(self._limits.failover_wait_s)
        with self._calling(job_id):
            current, grants = await self._run(
                "requeue", model, job_id, nonce, pin, ms(suspect_s), pin_ms, used_tokens
            )
        self._deliver(grants)
        self._look_after(model, suspect_s)
        return bool(current)

    async def refused(self, model: str, job_id: str, nonce: str, *, hold_s: float) -> bool:
        """See `JobQueue.refused`."""
        with self._calling(job_id):
            current, grants = await self._run("refused", model, job_id, nonce, ms(hold_s))
        self._deliver(grants)
        self._look_after(model, hold_s)
        return bool(current)

    async def register(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """See `JobQueue.register`."""
        with self._calling(job.job_id):
            async with self._claims.beside(job):
                current = await self._run(
                    "register",
                    job.model,
                    *fields(job),
                    grant.nonce,
                    grant.attempt,
                    grant.worker_id,
                    grant.worker_address,
                    grant.revision,
                    grant.epoch,
                    job.limits.weight,
                    bound(job.limits.concurrency),
                    ms(self._limits.aging_s),
                    *self._kept(job),
                    job.slots,
                    job.used_tokens,
                    int(instead),
                    *self._pinned(job),
                )
        return bool(current)

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
        with self._calling(job_id):
            grants = await self._run(
                "cancel", model, job_id, submission, outcome.value, used_tokens, *tail_args(tail)
            )
        self._deliver(grants)

    async def stop(self, model: str, job_id: str) -> bool:
        """See `JobQueue.stop`."""
        state, grants = await self._run("stop", model, job_id)
        self._deliver(grants)
        if state == "unknown":
            raise RequestUnknown("No request of that id is under way for this subject.")
        return bool(state == "stopped")

    async def reap(self, model: str) -> tuple[str, ...]:
        """See `JobQueue.reap`."""
        grants, adopted = await self._run("reap", model, ms(self._limits.failover_wait_s))
        self._deliver(grants)
        return tuple(adopted)

    async def take_up(self, model: str, job_id: str) -> TakenUp | None:
        """See `JobQueue.take_up`."""
        with self._calling(job_id):
            reply = await self._run("take_up", model, job_id)
        if not reply:
            return None
        payload, submission, waited_ms, left_ms, adoptions, grant, entries, grants = reply
        self._deliver(grants, besides=job_id)
        return TakenUp(
            payload=payload,
            submission=submission,
            waited_s=waited_ms / 1000,
            left_s=left_ms / 1000,
            adoptions=adoptions,
            entries=tuple(map(read_entry, entries)),
            grant=read_grant(grant) if grant else None,
        )

    async def release(self, model: str, job_id: str, submission: str) -> bool:
        """See `JobQueue.release`."""
        with self._calling(job_id):
            released, grants = await self._run("release", model, job_id, submission)
        self._deliver(grants)
        return bool(released)

    async def length(self, model: str) -> int:
        """See `JobQueue.length`."""
        count = int(await self._run("length", model, int(self._expects_route(model))))
        if count < 0:
            raise emptied()
        return count

    async def list_open(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """See `BreakerBoard.list_open`."""
        await self._run("list_open", model, worker_id, "forced" if sleep_s is None else ms(sleep_s))
        if sleep_s is not None:
            self._look_after(model, sleep_s)

    async def list_closed(self, model: str, worker_id: str) -> None:
        """See `BreakerBoard.list_closed`."""
        self._deliver(await self._run("list_closed", model, worker_id))

    async def usage(self, model: str, tenant: str) -> TenantUsage:
        """See `UsageBook.usage`."""
        age_ms, used, reserved, running = await self._run("usage", model, tenant)
        return TenantUsage(int(age_ms) / 1000, int(used), int(reserved), int(running))

    async def book(self, model: str, tenant: str, nonce: str, used_tokens: int, *, unless: str = "") -> None:
        """See `StoreQueue.book`."""
        await self._run("book", model, tenant, nonce, used_tokens, unless)

    async def _run(self, name: str, model: str, *args: str | float) -> Any:
        return await self._scripts.run(name, model, *args)

    def _kept(self, job: QueuedJob) -> tuple[str, str, int]:
        """What a record says of the job's body, and of the log that may outlive it."""
        return job.digest, job.payload, ms(self._limits.resume_ttl_s)

    def _pinned(self, job: QueuedJob) -> tuple[str, int]:
        """The revision that a job must go on with, and how long it waits while no worker has it."""
        return job.pin, ms(self._limits.failover_wait_s)

    def _deliver(self, grants: list[str], *, besides: str | None = None) -> Grant | None:
        """Hands grants to the receiver; returns the one for the job `besides` instead."""
        kept = None
        for text in grants:
            grant = read_grant(text)
            if grant.job_id == besides:
                kept = grant
            else:
                self._hand_over(grant)
        return kept

    def _hand_over(self, grant: Grant) -> None:
        self._receive(grant)

    def _tell(self, notice: Notice) -> None:
        self._notice(notice)

    @contextlib.contextmanager
    def _calling(self, job_id: str) -> Iterator[None]:
        self._busy[job_id] += 1
        for touched in self._renewals:
            touched.add(job_id)
        try:
            yield
        finally:
            self._busy[job_id] -= 1
            if self._busy[job_id] == 0:
                del self._busy[job_id]

    @contextlib.contextmanager
    def _renewing(self) -> Iterator[set[str]]:
        touched = set(self._busy)
        self._renewals.append(touched)
        try:
            yield touched
        finally:
            self._renewals.remove(touched)

    def _look_after(self, model: str, delay_s: float) -> None:
        """Grants again when a held worker may be used; otherwise its slots idle until the next renewal."""
        if len(self._looks) >= _LOOKS_MAX:
            return
        task = asyncio.create_task(self._look(model, delay_s + _LOOK_MARGIN_S), name="queue-look")
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look(self, model: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        # The next renewal does the same; nobody waits for this one.
        with contextlib.suppress(StoreUnavailable):
            self._deliver(await self._run("grant", model))


def _ignore(message: Grant | Notice) -> None:
    """Stands in until a receiver is set; the next renewal tells of it again."""
