"""Random histories: the queue in Redis against its twin in memory, a simple model of the same rules."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import InterlockError
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, Renewal, Waiting
from services.gateway.core.ports import BreakerBoard, JobQueue
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job

# `make soak` takes several times as many histories; 350 are over 10,000 steps.
HISTORIES = 60 * int(os.environ.get("INTERLOCK_SOAK_FACTOR", "1"))
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
    """The clock inside Redis, for the twin."""

    def __init__(self, world: QueueWorld) -> None:
        self._world = world

    def monotonic(self) -> float:
        """Seconds of the scripts' clock."""
        return float(self._world.client.hget(KEYS.clock, "logical") or 0) / 1000

    def now(self) -> float:
        """The same."""
        return self.monotonic()


@dataclass
class Twins:
    """Both queues, taken through the same steps, and the nonces by which each names a grant."""

    world: QueueWorld
    memory: MemoryJobQueue
    nonces: dict[str, tuple[str, str]] = field(default_factory=dict)

    async def same(self, step: Callable[[JobQueue, int], Awaitable[object]]) -> None:
        """Takes a step in both and compares answers, errors and grants."""
        redis_queue = self.world.gateway("g1")
        heard: list[list[Grant]] = [[], []]
        redis_queue.on_grant(heard[0].append)
        self.memory.on_grant(heard[1].append)
        answers = [await attempt(step, redis_queue, 0), await attempt(step, self.memory, 1)]
        # What is scheduled would happen in one of them alone.
        await redis_queue.close()
        self.memory.close()
        for side, answer in enumerate(answers):
            heard[side] += sorted(grants_of(answer), key=lambda grant: grant.job_id)
        assert [plain(grant) for grant in heard[0]] == [plain(grant) for grant in heard[1]]
        assert comparable(answers[0]) == comparable(answers[1])
        for ours, theirs in zip(*heard, strict=True):
            self.nonces[ours.job_id] = (ours.nonce, theirs.nonce)
        assert await redis_queue.length(MODEL) == await self.memory.length(MODEL)
        for number in range(len(TENANTS)):
            assert await redis_queue.usage(MODEL, f"t{number}") == await self.memory.usage(
                MODEL, f"t{number}"
            )


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
            ["enqueue"] * 6
            + ["settle"] * 4
            + ["requeue", "refused", "cancel", "register", "renew", "reap", "open", "close"]
            + ["worker", "remove", "route", "advance", "advance"]
        ),
        st.sampled_from(JOB_IDS),
        st.sampled_from(sorted(WORKERS)),
        st.sampled_from(list(Band)),
        st.booleans(),
        st.integers(0, 3),
    ),
    min_size=5,
    max_size=60,
)


async def take(twins: Twins, step: tuple[str, str, str, Band, bool, int]) -> None:
    """Performs one step of a history."""
    verb, job_id, worker, band, flag, number = step
    nonces = twins.nonces.get(job_id, ("none", "none"))
    match verb:
        case "enqueue":
            # A waiting job may learn its pin later, and a job may be met running with another revision.
            pin = WORKERS[worker][-1] if flag and number > 1 else ""
            job = make_job(
                job_id,
                tenant=f"t{number}",
                band=band,
                timeout_s=20.0 if flag else 3_600.0,
                cost=50 + 25 * JOB_IDS.index(job_id),
                limits=TENANTS[number],
                # Some more than any worker has.
                slots=(1, 1, 2, 1, 4)[JOB_IDS.index(job_id) % 5],
            )
            job = replace(job, pin=pin, used_tokens=5 * number if pin else 0)
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
        case "advance":
            twins.world.advance(number * 4.0)
        case _:
            await write(twins, verb, worker, number, flag=flag)


async def register(twins: Twins, job_id: str, worker: str, number: int, *, flag: bool) -> None:
    """Enters a job that runs already under a nonce of its own, also where another attempt is known."""
    line = twins.memory._lines[MODEL]
    # One submission is of one tenant, and of one size.
    known = line.find(job_id)
    job = make_job(job_id, tenant=f"t{number}", limits=TENANTS[number]) if known is None else known.job
    job = replace(job, used_tokens=5 * number, pin=WORKERS[worker][0] if number > 1 else "")
    grant = Grant(job_id, 1, f"registered-{number}", worker, f"{worker}:1", WORKERS[worker][0], 1)
    await twins.same(lambda queue, _: queue.register(job, grant, instead=flag))
    if line.current(job_id, grant.nonce) is not None:
        twins.nonces[job_id] = (grant.nonce, grant.nonce)


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


@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=STEPS)
async def test_redis_and_memory_agree_step_by_step(
    empty_world: QueueWorld, history: list[tuple[str, str, str, Band, bool, int]]
) -> None:
    """Every answer, error, grant, position, count and account is the same, and every index is true."""
    empty_world.client.flushall()
    await empty_world.gateway("g1", LIMITS).length(MODEL)
    twins = Twins(empty_world, MemoryJobQueue(RedisClock(empty_world), LIMITS))
    await write(twins, "route", "", 1, flag=False)
    await write(twins, "worker", "w1", 1, flag=False)
    for step in history:
        await take(twins, step)
        audit(empty_world.client)
    empty_world.client.flushall()
