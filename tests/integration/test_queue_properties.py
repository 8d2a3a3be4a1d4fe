"""Random histories: the queue in Redis against its twin in memory, a simple model of the same rules."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import InterlockError
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.ports import BreakerBoard, JobQueue
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import Books, audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job

# 10,000 steps; `make soak` takes several times as many.
HISTORY_STEPS = 40
# Every answer is compared; what an index has wrong stays wrong for a few steps.
AUDITED_EVERY = 4
HISTORIES = 250 * int(os.environ.get("INTERLOCK_SOAK_FACTOR", "1"))
# Leases and records outlive a history: the twin has no leases, and Redis keeps records by its own time.
LIMITS = QueueLimits(
    waiting_jobs_max=6, tenant_waiting_jobs_max=4, aging_s=10.0, lease_ttl_s=1e5, record_ttl_s=1e5
)
TENANTS = (
    TenantLimits(),
    TenantLimits(concurrency=1),
    TenantLimits(tokens_per_minute=400, weight=3),
    TenantLimits(tokens_per_minute=600, concurrency=2, weight=2),
)
JOB_IDS = tuple(f"j{number}" for number in range(10))
WORKERS = {"w1": ("r1",), "w2": ("r1", "r2"), "w3": ("r2",)}


class RedisClock:
    """The clock inside Redis, for the twin, as it was read last: each script moves it."""

    def __init__(self, world: QueueWorld) -> None:
        self._world = world
        self._now_s = 0.0

    def read(self) -> None:
        """Looks at it."""
        self._now_s = float(self._world.client.hget(KEYS.clock, "logical") or 0) / 1000

    def monotonic(self) -> float:
        """Seconds of the scripts' clock."""
        return self._now_s

    def now(self) -> float:
        """The same."""
        return self._now_s


@dataclass
class Twins:
    """Both queues, taken through the same steps, and the nonces by which each names a grant."""

    world: QueueWorld
    clock: RedisClock
    memory: MemoryJobQueue
    nonces: dict[str, tuple[str, str]] = field(default_factory=dict)

    async def same(self, step: Callable[[JobQueue, int], Awaitable[object]]) -> None:
        """Takes a step in both and compares answers, errors and grants."""
        redis_queue = self.world.gateway("g1")
        heard: list[list[Grant]] = [[], []]
        redis_queue.on_grant(heard[0].append)
        self.memory.on_grant(heard[1].append)
        answers = [await attempt(step, redis_queue, 0)]
        self.clock.read()
        answers.append(await attempt(step, self.memory, 1))
        # What is scheduled would happen in one of them alone.
        await redis_queue.close()
        self.memory.close()
        for side, answer in enumerate(answers):
            heard[side] += sorted(grants_of(answer), key=lambda grant: grant.job_id)
        assert [plain(grant) for grant in heard[0]] == [plain(grant) for grant in heard[1]]
        assert comparable(answers[0]) == comparable(answers[1])
        for ours, theirs in zip(*heard, strict=True):
            self.nonces[ours.job_id] = (ours.nonce, theirs.nonce)

    async def same_books(self, books: Books, tenant: str) -> None:
        """Compares what waits and what tenants take; of one tenant also what its minute has used."""
        assert books.waiting.total() == await self.memory.length(MODEL)
        for number in range(len(TENANTS)):
            usage = await self.memory.usage(MODEL, f"t{number}")
            assert usage.reserved_tokens == books.reserved[f"t{number}"]
            assert usage.running == books.running[f"t{number}"]
        usage = await self.world.gateway("g1").usage(MODEL, tenant)
        self.clock.read()
        assert usage == await self.memory.usage(MODEL, tenant)

    def flush(self) -> None:
        """Redis dies and comes back empty: no job is known any more, no worker and no route."""
        self.world.client.flushall()
        self.memory = MemoryJobQueue(self.clock, LIMITS)


async def attempt(step: Callable[[JobQueue, int], Awaitable[object]], queue: JobQueue, side: int) -> object:
    """The step's answer, or the class of its error and what it says is left."""
    try:
        return await step(queue, side)
    except InterlockError as error:
        return type(error), error.allowance


def grants_of(answer: object) -> tuple[Grant, ...]:
    """The grants that an answer holds."""
    if isinstance(answer, Renewal):
        return answer.granted
    return (answer,) if isinstance(answer, Grant) else ()


def plain(grant: Grant) -> tuple[object, ...]:
    """A grant without its nonce."""
    return grant.job_id, grant.attempt, grant.worker_id, grant.revision, grant.epoch, grant.trial


def comparable(answer: object) -> object:
    """An answer without nonces and estimates."""
    match answer:
        case Grant():
            return plain(answer), answer.allowance
        case Waiting():
            return answer.position, answer.allowance
        case Renewal():
            waiting = {job_id: place.position for job_id, place in answer.waiting.items()}
            return waiting, answer.lost, answer.unknown, answer.workers, answer.due
    return answer


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            # What a history that fails is shrunk to comes first.
            ["rest"]
            + ["enqueue"] * 6
            + ["settle"] * 4
            + ["requeue", "refused", "cancel", "register", "renew", "reap", "open", "close"]
            + ["worker", "remove", "route", "advance", "advance", "return", "die"]
        ),
        st.sampled_from(JOB_IDS),
        st.sampled_from(sorted(WORKERS)),
        st.sampled_from(list(Band)),
        st.booleans(),
        st.integers(0, 3),
    ),
    min_size=HISTORY_STEPS,
    max_size=HISTORY_STEPS,
)


def job_of(step: tuple[str, str, str, Band, bool, int]) -> QueuedJob:
    """The job that is enqueued: one of few ids, which are met again in every state."""
    verb, job_id, worker, band, flag, number = step
    place = JOB_IDS.index(job_id)
    # A waiting job may learn its pin later, and a job may be met running with another revision.
    pin = WORKERS[worker][-1] if flag and number > 1 else ""
    job = make_job(
        job_id,
        tenant=f"t{number}",
        band=band,
        timeout_s=20.0 if flag else 3_600.0,
        # One that comes back after a loss has waited, and takes its old place.
        waited_s=1.0 + number if verb == "return" else 0.0,
        cost=50 + 25 * place,
        limits=TENANTS[number],
        # Some more than any worker has.
        slots=(1, 1, 2, 1, 4)[place % 5],
    )
    return replace(job, pin=pin, used_tokens=5 * number if pin else 0)


async def take(twins: Twins, step: tuple[str, str, str, Band, bool, int]) -> None:
    """Performs one step of a history."""
    verb, job_id, worker, _, flag, number = step
    nonces = twins.nonces.get(job_id, ("none", "none"))
    match verb:
        case "enqueue" | "return":
            job = job_of(step)
            await twins.same(lambda queue, _: queue.enqueue(job))
        case "settle":
            await twins.same(lambda q, i: q.settle(MODEL, job_id, nonces[i], Outcome.FINISHED, 15 * number))
        case "requeue":
            used, pin = 15 * number, WORKERS[worker][0] if flag else ""
            await twins.same(lambda q, i: q.requeue(MODEL, job_id, nonces[i], pin=pin, used_tokens=used))
        case "refused":
            await twins.same(lambda q, i: q.refused(MODEL, job_id, nonces[i], hold_s=float(number)))
        case "cancel":
            name = f"submission-of-{job_id}" if flag else "another"
            outcome = list(Outcome)[number]
            await twins.same(
                lambda queue, _: queue.cancel(MODEL, job_id, name, used_tokens=20 * number, outcome=outcome)
            )
        case "register":
            await register(twins, job_id, worker, number, flag=flag)
        case "renew":
            named = {name: pair for name, pair in twins.nonces.items() if flag or name != job_id}
            rest = frozenset(JOB_IDS) - named.keys() - ({job_id} if flag else set())
            places = frozenset(sorted(rest)[::number]) if number else None
            await twins.same(
                lambda q, i: q.renew(MODEL, {n: p[i] for n, p in named.items()}, rest, places=places)
            )
        case "reap":
            await twins.same(lambda queue, _: queue.reap(MODEL))
        case _:
            await befall(twins, verb, worker, number, flag=flag)


async def register(twins: Twins, job_id: str, worker: str, number: int, *, flag: bool) -> None:
    """Enters a job that runs already under a nonce of its own, also where another attempt is known."""
    line = twins.memory._line(MODEL)
    # One submission is of one tenant, and of one size.
    known = line.find(job_id)
    job = make_job(job_id, tenant=f"t{number}", limits=TENANTS[number]) if known is None else known.job
    job = replace(job, used_tokens=5 * number, pin=WORKERS[worker][0] if number > 1 else "")
    grant = Grant(job_id, 1, f"registered-{number}", worker, f"{worker}:1", WORKERS[worker][0], 1)
    await twins.same(lambda queue, _: queue.register(job, grant, instead=flag))
    if line.current(job_id, grant.nonce) is not None:
        twins.nonces[job_id] = (grant.nonce, grant.nonce)


async def befall(twins: Twins, verb: str, worker: str, number: int, *, flag: bool) -> None:
    """Time passes; Redis is emptied, and the controller writes at once or later; or somebody else writes."""
    if verb == "advance":
        twins.world.advance(number * 4.0)
    elif verb == "die":
        twins.flush()
        if flag:
            await write(twins, "worker", worker, number, flag=False)
            await write(twins, "route", "", number, flag=True)
    elif verb != "rest":
        await write(twins, verb, worker, number, flag=flag)


def board(queue: JobQueue) -> BreakerBoard:
    """The other face of either queue."""
    assert isinstance(queue, RedisJobQueue | MemoryJobQueue)
    return queue


async def write(twins: Twins, verb: str, worker: str, number: int, *, flag: bool) -> None:
    """Turns a breaker, or performs one of the controller's writes, on both sides."""
    if verb == "open":
        sleep_s = None if flag and number == 0 else 2.0 + number
        await twins.same(lambda q, _: board(q).list_open(MODEL, worker, sleep_s))
    elif verb == "close":
        await twins.same(lambda q, _: board(q).list_closed(MODEL, worker))
    elif verb == "worker":
        ready = WORKERS[worker]
        await twins.world.add_worker(worker, slots=number + 1, ready=ready, draining=flag and number == 0)
        twins.memory.set_worker(
            MODEL,
            QueueWorker(worker, f"{worker}:1", number + 1, frozenset(ready), draining=flag and number == 0),
        )
    elif verb == "remove":
        await twins.world.routes.remove_worker(MODEL, worker, 1)
        twins.memory.remove_worker(MODEL, worker)
    else:
        weights = {"r1": number, "r2": 1} if flag else {"r1": 1}
        await twins.world.routes.write_route(MODEL, number, 1, weights)
        twins.memory.set_route(MODEL, number, weights)


@pytest.mark.timeout(900)
@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=STEPS)
async def test_redis_and_memory_agree_step_by_step(
    empty_world: QueueWorld, history: list[tuple[str, str, str, Band, bool, int]]
) -> None:
    """Every answer, error, grant, position, count and account is the same, and every index is true."""
    empty_world.client.flushall()
    await empty_world.gateway("g1", LIMITS).length(MODEL)
    clock = RedisClock(empty_world)
    twins = Twins(empty_world, clock, MemoryJobQueue(clock, LIMITS))
    await write(twins, "route", "", 1, flag=False)
    await write(twins, "worker", "w1", 1, flag=False)
    for number, step in enumerate(history, start=1):
        await take(twins, step)
        if number % AUDITED_EVERY == 0:
            await twins.same_books(audit(empty_world.client), f"t{step[-1]}")
    empty_world.client.flushall()
