"""Where every breaker is open: who is turned away, and who waits; in Redis and in memory alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Grant, QueuedJob, Waiting
from services.gateway.core.queue_errors import RETRY_WHEN_HELD_S, WorkersBarred
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_twins import RedisClock
from tests.fixtures.queue_world import MODEL, REVISION, QueueWorld, make_job

LIMITS = QueueLimits(waiting_jobs_max=2, lease_ttl_s=1e5)


@dataclass
class Either:
    """A queue of either kind, and what it hears of workers."""

    world: QueueWorld
    queue: RedisJobQueue | MemoryJobQueue
    clock: RedisClock

    async def add_worker(
        self, name: str, *, slots: int = 4, ready: tuple[str, ...] = (REVISION,), draining: bool = False
    ) -> None:
        """Writes a worker."""
        await self.world.add_worker(name, slots=slots, ready=ready, draining=draining)
        if isinstance(self.queue, MemoryJobQueue):
            record = QueueWorker(name, f"{name}:1", slots, frozenset(ready), draining=draining)
            self.queue.set_worker(MODEL, record)

    async def open(self, **sleeps: float | None) -> None:
        """Opens breakers."""
        for name, sleep_s in sleeps.items():
            await self.queue.list_open(MODEL, name, sleep_s)

    async def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.world.advance(seconds)
        # A call that moves the clock which the queue in memory reads.
        await self.world.gateway("clock").length(MODEL)
        self.clock.read()

    async def refusal(self, job: QueuedJob) -> float:
        """When a job that is turned away may come again."""
        with pytest.raises(WorkersBarred) as caught:
            await self.queue.enqueue(job)
        assert caught.value.reason == "NO_WORKER"
        assert caught.value.retry_after_s is not None
        audit(self.world.client)
        return caught.value.retry_after_s


@pytest.fixture(params=["redis", "memory"])
async def either(request: pytest.FixtureRequest, empty_world: QueueWorld) -> AsyncIterator[Either]:
    """A queue with a route, and no worker yet."""
    await empty_world.set_route()
    await empty_world.gateway("clock").length(MODEL)
    clock = RedisClock(empty_world)
    clock.read()
    if request.param == "redis":
        yield Either(empty_world, empty_world.gateway("g1", LIMITS), clock)
        return
    memory = MemoryJobQueue(clock, LIMITS)
    memory.set_route(MODEL, 1, {REVISION: 100})
    yield Either(empty_world, memory, clock)
    memory.close()


@pytest.mark.parametrize(
    ("sleeps", "expected_s"),
    [
        pytest.param({"w1": 5.0, "w2": 3.0}, 3.0, id="the-shorter-sleep"),
        pytest.param({"w1": None, "w2": None}, RETRY_WHEN_HELD_S, id="both-held"),
        pytest.param({"w1": None, "w2": 8.0}, 8.0, id="one-held"),
    ],
)
async def test_a_new_job_is_turned_away_while_every_breaker_is_open(
    either: Either, sleeps: dict[str, float | None], expected_s: float
) -> None:
    """With the least of what is left of the sleeps, before any bound is asked; another gateway's is not."""
    for name in sleeps:
        await either.add_worker(name)
    await either.open(**sleeps)
    for name in ("a", "b", "c"):
        assert await either.refusal(make_job(name)) == pytest.approx(expected_s, abs=0.5)
    assert await either.queue.length(MODEL) == 0
    await either.world.grant("theirs", gateway="g2")


@pytest.mark.parametrize("other", ["closed", "full", "suspect", "due", "draining", "of-another-revision"])
async def test_a_job_is_taken_where_one_worker_may_have_it(either: Either, other: str) -> None:
    """Now or in a moment; a worker that drains, or has none of the route's revisions, takes none of them."""
    await either.add_worker("w1")
    await either.add_worker(
        "w2",
        slots=1,
        draining=other == "draining",
        ready=("r9",) if other == "of-another-revision" else (REVISION,),
    )
    await either.open(w1=60.0)
    if other in {"draining", "of-another-revision"}:
        assert await either.refusal(make_job("new")) > 0
        return
    if other in {"full", "suspect"}:
        grant = await either.queue.enqueue(make_job("first"))
        assert isinstance(grant, Grant)
        if other == "suspect":
            await either.queue.refused(MODEL, "first", grant.nonce, hold_s=1.0)
    elif other == "due":
        await either.open(w2=1.0)
        await either.advance(2)
    answer = await either.queue.enqueue(make_job("new"))
    if other in {"full", "suspect"}:
        assert isinstance(answer, Waiting)
    else:
        assert isinstance(answer, Grant)
        assert (answer.worker_id, answer.trial) == ("w2", other == "due")


async def test_nobody_is_turned_away_where_no_worker_is(either: Either) -> None:
    """One that was lost may be on its way back: that is waited for."""
    await either.open(w1=None)
    assert isinstance(await either.queue.enqueue(make_job("a")), Waiting)
    await either.queue.list_closed(MODEL, "w1")


async def test_a_job_that_was_accepted_once_waits(either: Either) -> None:
    """What the store lost and what has a text are no new jobs; nor is a submission that is repeated."""
    await either.add_worker("w1", draining=True)
    await either.queue.enqueue(make_job("before"))
    await either.add_worker("w1")
    await either.open(w1=5.0)
    for job in (
        make_job("before"),
        make_job("lost", waited_s=1.0),
        replace(make_job("begun", waited_s=1.0), pin=REVISION, used_tokens=7),
    ):
        assert isinstance(await either.queue.enqueue(job), Waiting)
    assert await either.refusal(make_job("new")) == pytest.approx(5.0, abs=0.5)


async def test_while_the_one_trial_is_under_way_new_jobs_are_turned_away(either: Either) -> None:
    """It is a new job that tries; the next is told the sleep that began with it, until the breaker closes."""
    await either.add_worker("w1")
    await either.open(w1=5.0)
    assert await either.refusal(make_job("early")) == pytest.approx(5.0, abs=0.5)
    await either.advance(6)
    trial = await either.queue.enqueue(make_job("trial"))
    assert isinstance(trial, Grant)
    assert trial.trial
    assert await either.refusal(make_job("beside")) == pytest.approx(5.0, abs=0.5)
    await either.queue.list_closed(MODEL, "w1")
    after = await either.queue.enqueue(make_job("after"))
    assert isinstance(after, Grant)
    assert not after.trial


async def test_a_renewal_tells_who_may_be_used_and_who_is_due(either: Either) -> None:
    """Barred workers do not count as workers; those whose sleep is over are told apart."""
    for number in range(1, 5):
        await either.add_worker(f"w{number}", slots=1, ready=("r9",))
    await either.queue.enqueue(make_job("a"))
    for sleeps, expected in (
        ({}, (4, 0)),
        ({"w1": None, "w2": 60.0}, (2, 0)),
        ({"w3": 1.0, "w4": 60.0}, (0, 1)),
    ):
        await either.open(**sleeps)
        await either.advance(2)
        renewal = await either.queue.renew(MODEL, {}, frozenset("a"))
        assert (renewal.workers, renewal.due) == expected
    await either.queue.cancel(MODEL, "a", make_job("a").submission)
    renewal = await either.queue.renew(MODEL, {}, frozenset())
    assert (renewal.workers, renewal.due) == (None, 0)
