"""Random histories: the queue in Redis against its twin in memory, a simple model of the same rules."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob
from services.gateway.core.ports import JobQueue, StoreQueue
from services.gateway.core.queue_line import QueueWorker
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_twins import DYING, JOB_IDS, LIMITS, REAPING, RedisClock, Twins
from tests.fixtures.queue_world import MODEL, QueueWorld, make_job

# 10,000 steps; `make soak` takes several times as many.
HISTORY_STEPS = 40
# Every answer is compared; what an index has wrong stays wrong for a few steps.
AUDITED_EVERY = 4
HISTORIES = 250 * int(os.environ.get("INTERLOCK_SOAK_FACTOR", "1"))
# The usual leases of what a gateway leaves behind that dies lapse within this.
LAPSED_S = 6.0
TENANTS = (
    TenantLimits(),
    TenantLimits(concurrency=1),
    TenantLimits(tokens_per_minute=400, weight=3),
    TenantLimits(tokens_per_minute=600, concurrency=2, weight=2),
)
WORKERS = {"w1": ("r1",), "w2": ("r1", "r2"), "w3": ("r2",)}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            # What a history that fails is shrunk to comes first.
            ["rest"]
            + ["enqueue"] * 6
            + ["settle"] * 4
            + ["requeue", "refused", "cancel", "register", "renew", "reap", "open", "close", "book"]
            + ["worker", "remove", "lose", "route", "advance", "advance", "return", "die"]
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
    nonces, home = twins.nonces.get(job_id, ("none", "none")), twins.home(job_id)
    match verb:
        case "enqueue" | "return":
            job = job_of(step)
            await twins.same(lambda queue, _: queue.enqueue(job), home)
        case "settle":
            await twins.same(
                lambda q, i: q.settle(MODEL, job_id, nonces[i], Outcome.FINISHED, 15 * number), home
            )
        case "requeue":
            await requeue(twins, job_id, WORKERS[worker][0] if flag else "", 15 * number)
        case "refused":
            await twins.same(lambda q, i: q.refused(MODEL, job_id, nonces[i], hold_s=float(number)), home)
        case "cancel":
            name = f"submission-of-{job_id}" if flag else "another"
            outcome = list(Outcome)[number]
            await twins.same(
                lambda queue, _: queue.cancel(MODEL, job_id, name, used_tokens=20 * number, outcome=outcome),
                home,
            )
        case "register":
            await register(twins, job_id, worker, number, flag=flag)
        case "renew":
            own = twins.jobs_of(home)
            named = {n: pair for n, pair in twins.nonces.items() if n in own and (flag or n != job_id)}
            rest = own - named.keys() - ({job_id} if flag else set())
            places = frozenset(sorted(rest)[::number]) if number else None
            await twins.same(
                lambda q, i: q.renew(MODEL, {n: p[i] for n, p in named.items()}, rest, places=places), home
            )
        case "reap":
            await twins.same(lambda queue, _: queue.reap(MODEL), home)
        case "book":
            known = job_id if flag else ""
            await twins.same(
                lambda queue, _: faces(queue).book(
                    MODEL, f"t{number}", f"{worker}-{number}", 10, unless=known
                ),
                home,
            )
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
    await twins.same(lambda queue, _: queue.register(job, grant, instead=flag), twins.home(job_id))
    if line.current(job_id, grant.nonce) is not None:
        twins.nonces[job_id] = (grant.nonce, grant.nonce)


async def requeue(twins: Twins, job_id: str, pin: str, used: int) -> None:
    """The worker of a job has failed it."""
    nonces = twins.nonces.get(job_id, ("none", "none"))
    await twins.same(
        lambda q, i: q.requeue(MODEL, job_id, nonces[i], pin=pin, used_tokens=used), twins.home(job_id)
    )


async def lose_worker(twins: Twins, worker: str, number: int, *, flag: bool) -> None:
    """A worker dies: all that ran there waits again, and the controller hears of it before that or after."""
    if flag:
        await write(twins, "remove", worker, number, flag=flag)
    jobs = twins.memory._line(MODEL).jobs.by_id.values()
    ran = [one.job.job_id for one in jobs if one.grant is not None and one.grant.worker_id == worker]
    for job_id in ran:
        await requeue(twins, job_id, WORKERS[worker][0] if number else "", 15 * number)
    if not flag:
        await write(twins, "remove", worker, number, flag=flag)


async def crash(twins: Twins, *, restarts: bool) -> None:
    """The second gateway dies. Its leases lapse; its next process or the other gateway ends what it had."""
    dead = twins.second
    # The last sign of life: from now on its leases are the usual ones.
    await twins.same(lambda queue, _: queue.renew(MODEL, {}, twins.jobs_of(dead)), dead, DYING)
    # What that lent to others is theirs for longer.
    await twins.same(lambda queue, _: queue.renew(MODEL, {}, twins.jobs_of("g1")))
    twins.world.advance(LAPSED_S)

    async def come_back(queue: JobQueue, side: int) -> object:
        if side:
            # What waits for too long ends by that, before leases are looked at.
            twins.memory._expire(twins.memory._line(MODEL))
            twins.lose(dead)
        return replace(await queue.renew(MODEL, {}, frozenset()), unknown=frozenset())

    async def clear_away(queue: JobQueue, side: int) -> object:
        if side:
            twins.lose(dead)
        return await queue.reap(MODEL)

    if restarts:
        await twins.same(come_back, dead)
    else:
        await twins.same(clear_away, "g1", REAPING)
        twins.second = f"{dead}'"
    assert not twins.jobs_of(twins.second) & twins.memory._line(MODEL).jobs.by_id.keys()
    await twins.same_books(audit(twins.world.client), "t0")


async def befall(twins: Twins, verb: str, worker: str, number: int, *, flag: bool) -> None:
    """Time passes; Redis is emptied, and the controller writes at once or later; others die, or write."""
    if verb == "advance":
        twins.world.advance(number * 4.0)
        if twins.second:
            # It lives: one that is silent for a minute is forgotten.
            await twins.queue_of(twins.second, LIMITS).length(MODEL)
    elif verb == "die":
        twins.flush()
        if flag:
            await write(twins, "worker", worker, number, flag=False)
            await write(twins, "route", "", number, flag=True)
    elif verb == "lose":
        await lose_worker(twins, worker, number, flag=flag)
    elif verb in {"open", "close"} and twins.second:
        await crash(twins, restarts=verb == "close")
    elif verb != "rest":
        await write(twins, verb, worker, number, flag=flag)


def faces(queue: JobQueue) -> StoreQueue:
    """The other faces of either queue."""
    assert isinstance(queue, RedisJobQueue | MemoryJobQueue)
    return queue


async def write(twins: Twins, verb: str, worker: str, number: int, *, flag: bool) -> None:
    """Turns a breaker, or performs one of the controller's writes, on both sides."""
    if verb == "open":
        sleep_s = None if flag and number == 0 else 2.0 + number
        await twins.same(lambda q, _: faces(q).list_open(MODEL, worker, sleep_s))
    elif verb == "close":
        await twins.same(lambda q, _: faces(q).list_closed(MODEL, worker))
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
@settings(max_examples=HISTORIES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=STEPS, second=st.sampled_from(["", "g2"]))
async def test_redis_and_memory_agree_step_by_step(
    empty_world: QueueWorld, history: list[tuple[str, str, str, Band, bool, int]], second: str
) -> None:
    """Every answer, error, grant, position, count and account is the same, and every index is true.

    Breakers turn where there is one gateway, for each has its own. Where there are two, the second one dies.
    """
    empty_world.client.flushall()
    await empty_world.gateway("g1", LIMITS).length(MODEL)
    clock = RedisClock(empty_world)
    with empty_world.client.pubsub() as messages:  # type: ignore[no-untyped-call]
        messages.psubscribe("il:gateway:*")
        twins = Twins(empty_world, clock, MemoryJobQueue(clock, LIMITS), messages, second)
        await write(twins, "route", "", 1, flag=False)
        await write(twins, "worker", "w1", 1, flag=False)
        for number, step in enumerate(history, start=1):
            await take(twins, step)
            if number % AUDITED_EVERY == 0:
                await twins.same_books(audit(empty_world.client), f"t{step[-1]}")
    empty_world.client.flushall()
