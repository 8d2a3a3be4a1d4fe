"""The operations of the queue in Redis, one by one."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from services.common.errors import (
    DeadlineExceeded,
    QueueFull,
    RequestCancelled,
    RequestExists,
    StoreUnavailable,
    WorkerLost,
)
from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, Waiting
from services.gateway.core.queue_limits import QueueLimits
from tests.fixtures.queue_audit import Shelf
from tests.fixtures.queue_world import KEYS, MODEL, REVISION, QueueWorld, make_job


async def test_a_free_slot_is_granted_in_the_call_that_enqueues(world: QueueWorld) -> None:
    """The grant names worker, address, revision, epoch and the first attempt."""
    await world.set_route(epoch=1_795_416_462_360)
    grant = await world.grant("a")
    assert (grant.job_id, grant.attempt, grant.worker_id, grant.worker_address) == ("a", 1, "w1", "w1:1")
    assert (grant.revision, grant.epoch) == (REVISION, 1_795_416_462_360)
    assert world.running() == {"a"}


async def test_jobs_beyond_the_slots_wait_and_start_in_their_order(world: QueueWorld) -> None:
    """Positions count the jobs before, and each settle starts the oldest."""
    first = await world.grant("a")
    assert [(await world.wait(name)).position for name in "bcd"] == [0, 1, 2]
    assert await world.gateway().length(MODEL) == 3
    await world.finish(first)
    assert await world.finish_all() == ["b", "c", "d"]
    assert await world.gateway().length(MODEL) == 0


async def test_nobody_overtakes_a_job_that_waits(empty_world: QueueWorld) -> None:
    """A job that finds a free slot waits nevertheless, if an older one takes it."""
    await empty_world.set_route()
    await empty_world.wait("old")
    await empty_world.add_worker()
    await empty_world.wait("new")
    assert [grant.job_id for grant in empty_world.received["g1"]] == ["old"]


async def test_a_full_queue_refuses_with_its_length(world: QueueWorld) -> None:
    """The bound counts jobs that wait; the next job is accepted once one has gone."""
    gateway = world.gateway("g1", QueueLimits(waiting_jobs_max=2))
    running = await world.grant("a")
    await world.wait("b")
    await world.wait("c")
    with pytest.raises(QueueFull, match="2 requests wait") as refusal:
        await gateway.enqueue(make_job("d"))
    assert refusal.value.retry_after_s is not None
    await world.finish(running)
    await world.wait("d")


async def test_a_job_that_comes_back_takes_its_old_place_whatever_the_bound(world: QueueWorld) -> None:
    """After a loss in Redis accepted jobs are enqueued again with the time they have waited."""
    gateway = world.gateway("g1", QueueLimits(waiting_jobs_max=1))
    running = await world.grant("a")
    await world.wait("young")
    assert await gateway.enqueue(make_job("old", waited_s=30.0)) == Waiting(0)
    await world.finish(running)
    assert await world.finish_all() == ["old", "young"]


async def test_an_id_in_use_is_refused(world: QueueWorld) -> None:
    """Another submission of a live job's id is ALREADY_EXISTS, from any gateway, waiting or running."""
    await world.grant("a")
    await world.wait("b")
    for job_id in "ab":
        for gateway in ("g1", "g2"):
            with pytest.raises(RequestExists):
                await world.gateway(gateway).enqueue(make_job(job_id, submission="another"))


async def test_a_repeated_submission_gets_its_own_job_back(world: QueueWorld) -> None:
    """A call whose answer was lost has the same answer again, and queues nothing twice."""
    grant = await world.grant("a")
    await world.wait("b")
    assert await world.gateway().enqueue(make_job("a")) == grant
    assert (await world.wait("b")).position == 0
    assert await world.gateway().length(MODEL) == 1


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome.FINISHED, RequestExists),
        (Outcome.FAILED, WorkerLost),
        (Outcome.CANCELLED, RequestCancelled),
        (Outcome.EXPIRED, DeadlineExceeded),
    ],
)
@pytest.mark.parametrize("verb", ["settle", "cancel"])
async def test_a_submission_never_runs_twice(
    world: QueueWorld, outcome: Outcome, error: type[Exception], verb: str
) -> None:
    """Repeated after its end it learns how it ended; a new submission of the same id runs."""
    grant = await world.grant("a")
    if verb == "settle":
        await world.gateway().settle(MODEL, "a", grant.nonce, outcome, 1)
    else:
        await world.gateway().cancel(MODEL, "a", "submission-of-a", outcome=outcome)
    with pytest.raises(error):
        await world.gateway().enqueue(make_job("a"))
    assert isinstance(await world.gateway().enqueue(make_job("a", submission="new")), Grant)


async def test_the_record_of_an_ended_job_ends_too(world: QueueWorld) -> None:
    """It has a time to live of the configured length."""
    await world.finish(await world.grant("a"))
    assert 0 < world.client.pttl(KEYS.job("a")) <= 60_000
    assert world.client.hget(KEYS.job("a"), "used") == "10"


async def test_settle_needs_the_current_nonce(world: QueueWorld) -> None:
    """An attempt that was fenced off cannot end the one that followed it."""
    first = await world.grant("a")
    await world.gateway().refused(MODEL, "a", first.nonce, hold_s=0.0)
    (second,) = world.received["g1"]
    assert second.nonce != first.nonce
    await world.finish(first)
    assert world.running() == {"a"}
    await world.finish(second)
    assert world.running() == set()


async def test_requeue_keeps_the_place_and_counts_the_attempt(world: QueueWorld) -> None:
    """A job whose worker failed goes before those that came after it."""
    first = await world.grant("a")
    await world.wait("b")
    assert await world.gateway().requeue(MODEL, "a", first.nonce)
    world.advance(1)
    await world.gateway().reap(MODEL)
    (second,) = world.received["g1"]
    assert (second.job_id, second.attempt) == ("a", 2)


async def test_requeue_of_a_fenced_attempt_is_refused(world: QueueWorld) -> None:
    """The caller learns that the job is not its own any more, and nothing changes."""
    grant = await world.grant("a")
    assert not await world.gateway().requeue(MODEL, "a", "another")
    assert not await world.gateway().refused(MODEL, "a", "another", hold_s=0.0)
    await world.finish(grant)
    assert not await world.gateway().requeue(MODEL, "a", grant.nonce)


@pytest.mark.parametrize("verb", ["requeue", "refused"])
async def test_putting_back_is_safe_to_repeat(world: QueueWorld, verb: str) -> None:
    """The second call says the same as the first, and brings the grant that the first answer held."""
    await world.add_worker("w2")
    gateway, first = world.gateway(), await world.grant("a")

    async def put_back() -> bool:
        if verb == "requeue":
            return await gateway.requeue(MODEL, "a", first.nonce)
        return await gateway.refused(MODEL, "a", first.nonce, hold_s=60.0)

    assert await put_back()
    assert await put_back()
    assert len(world.received["g1"]) == 2
    assert len(set(world.received["g1"])) == 1
    assert world.running("w1") | world.running("w2") == {"a"}


async def test_a_refusal_costs_no_attempt_and_holds_the_worker(world: QueueWorld) -> None:
    """The job waits while its only worker is held, and goes again as attempt 1 by itself."""
    first = await world.grant("a")
    assert await world.gateway().refused(MODEL, "a", first.nonce, hold_s=0.05)
    assert world.received["g1"] == []
    assert world.running() == set()
    for look in tuple(world.gateway()._looks):
        await look
    (second,) = world.received["g1"]
    assert second.attempt == 1


async def test_cancel_ends_a_job_that_waits(world: QueueWorld) -> None:
    """It leaves the queue, and never gets a slot."""
    running = await world.grant("a")
    await world.wait("b")
    await world.gateway().cancel(MODEL, "b", "submission-of-b")
    assert await world.gateway().length(MODEL) == 0
    await world.finish(running)
    assert world.received["g1"] == []


async def test_cancel_cannot_end_a_namesake(world: QueueWorld) -> None:
    """It names the submission that was withdrawn, not the id alone."""
    await world.grant("a")
    await world.wait("b")
    await world.gateway().cancel(MODEL, "b", "another")
    assert await world.gateway().length(MODEL) == 1


async def test_cancel_frees_the_slot_of_a_grant_that_nobody_heard_of(world: QueueWorld) -> None:
    """A submission that is withdrawn while its grant is on the way leaves no slot behind."""
    await world.grant("a")
    await world.wait("b")
    await world.gateway().cancel(MODEL, "a", "submission-of-a")
    assert world.running() == {"b"}


@pytest.mark.parametrize("runs", [False, True], ids=["waits", "runs"])
async def test_stopping_is_safe_to_repeat(world: QueueWorld, *, runs: bool) -> None:
    """A call that the connection sent twice says that it stopped the job; a later one, that it had ended."""
    running, other = await world.grant("a"), world.gateway("g2")
    await world.wait("b")
    counted, other._scripts._calls = other._scripts._calls, itertools.count(99, 0)
    assert await other.stop(MODEL, "a" if runs else "b")
    if runs:
        # Its gateway has heard of it before the call is repeated.
        await world.finish(running)
    assert await other.stop(MODEL, "a" if runs else "b")
    other._scripts._calls = counted
    assert not await other.stop(MODEL, "a" if runs else "b")


async def test_a_waiting_job_expires_on_time_wherever_it_stands(world: QueueWorld) -> None:
    """The deadline index finds it behind others; its gateway learns of it by renewal."""
    running = await world.grant("a")
    await world.wait("b")
    await world.wait("c", timeout_s=5.0)
    world.advance(6)
    renewal = await world.gateway().renew(MODEL, {"a": running.nonce}, frozenset("bc"))
    assert renewal.lost == {"c"}
    assert renewal.waiting.keys() == {"b"}
    with pytest.raises(DeadlineExceeded):
        await world.gateway().enqueue(make_job("c"))


async def test_a_renewal_prolongs_every_lease_and_tells_the_places_that_are_asked_for(
    world: QueueWorld,
) -> None:
    """More leases than are written at once; a place of nobody who was not named is told."""
    gateway = world.gateway("g1", QueueLimits(lease_ttl_s=5.0, tenant_waiting_jobs_max=600))
    running = await world.grant("a")
    names = [f"w{number}" for number in range(520)]
    await asyncio.gather(*(gateway.enqueue(make_job(name)) for name in names))
    world.advance(2)
    places = frozenset({names[0], names[-1], "unheard-of"})
    renewal = await gateway.renew(MODEL, {"a": running.nonce}, frozenset(names), places=places)
    assert {job_id: place.position for job_id, place in renewal.waiting.items()} == {
        names[0]: 0,
        names[-1]: 519,
    }
    assert (renewal.lost, renewal.unknown, renewal.workers) == (frozenset(), frozenset(), 1)
    leases = Shelf(world.client).scores("lease")
    assert leases.keys() == {"a", *names}
    assert set(leases.values()) == {float(world.client.hget(KEYS.clock, "logical") or 0) + 5_000}


async def test_a_place_that_nobody_asked_for_hides_nothing(world: QueueWorld) -> None:
    """A lost message, an end and another's job are told all the same."""
    running = await world.grant("a")
    await world.wait("b")
    await world.wait("c", timeout_s=5.0)
    await world.wait("d", gateway="g2")
    await world.gateway("g2").cancel(MODEL, "a", "submission-of-a")
    world.advance(6)
    renewal = await world.gateway().renew(
        MODEL, {"a": running.nonce}, frozenset("bcde"), places=frozenset("d")
    )
    assert [grant.job_id for grant in renewal.granted] == ["b"]
    assert (renewal.lost, renewal.waiting) == (frozenset("acde"), {})


async def test_a_repetition_that_comes_too_late_swallows_no_grant(world: QueueWorld) -> None:
    """The job has ended, and what else the call would have lent is lent by one whose answer tells of it."""
    grant = await world.grant("a")
    await world.gateway().requeue(MODEL, "a", grant.nonce)
    # Its worker is suspect for a second, so that both wait.
    await world.wait("b", timeout_s=5.0)
    world.advance(6.0)
    with pytest.raises(DeadlineExceeded):
        await world.gateway().enqueue(make_job("b"))
    assert world.running() == set()
    (renewed,) = (await world.gateway().renew(MODEL, {}, frozenset({"a"}))).granted
    assert (renewed.job_id, world.running()) == ("a", {"a"})


async def test_an_expired_job_is_not_granted_and_takes_no_room(world: QueueWorld) -> None:
    """Whichever call meets it first: one that frees a slot, or one that asks for room in a full queue."""
    gateway = world.gateway("g1", QueueLimits(waiting_jobs_max=1))
    running = await world.grant("a")
    await world.wait("b", timeout_s=5.0)
    world.advance(6)
    await world.wait("c", timeout_s=5.0)
    world.advance(6)
    await world.finish(running)
    assert world.received["g1"] == []
    assert await gateway.length(MODEL) == 0


async def test_nobody_is_turned_away_while_a_slot_is_free(world: QueueWorld) -> None:
    """A hold ended, and nobody has looked since: the job that waited gets the slot, and leaves its place."""
    gateway = world.gateway("g1", QueueLimits(waiting_jobs_max=1))
    grant = await world.grant("a")
    await gateway.refused(MODEL, "a", grant.nonce, hold_s=1.0)
    with pytest.raises(QueueFull):
        await gateway.enqueue(make_job("b"))
    world.advance(2)
    await world.wait("c")
    assert [grant.job_id for grant in world.received["g1"]] == ["a"]


async def test_an_emptied_store_takes_no_job_before_its_route_is_written(empty_world: QueueWorld) -> None:
    """Who knows of a route is told that it is gone; there is nothing to lend, nothing to wait for."""
    gateway = RedisJobQueue(empty_world.store, "g1", expects_route=lambda model: model == MODEL)
    for call in (lambda: gateway.enqueue(make_job("a")), lambda: gateway.length(MODEL)):
        with pytest.raises(StoreUnavailable):
            await call()
    await empty_world.set_route()
    with pytest.raises(StoreUnavailable):
        await gateway.length(MODEL)
    await empty_world.add_worker()
    assert await gateway.length(MODEL) == 0
    assert isinstance(await gateway.enqueue(make_job("a")), Grant)


async def test_higher_bands_go_first_and_one_grant_in_eight_looks_from_the_bottom(world: QueueWorld) -> None:
    """BATCH does not starve behind any number of INTERACTIVE jobs."""
    running = await world.grant("running")
    await world.wait("batch", band=Band.BATCH)
    for number in range(9):
        await world.wait(f"i{number}")
    await world.wait("system", band=Band.SYSTEM)
    await world.finish(running)
    order = await world.finish_all()
    assert order[0] == "system"
    # The running job was the first grant; the eighth is the seventh of these.
    assert order.index("batch") == 6


async def test_tenants_take_turns_and_positions_count_their_rounds(world: QueueWorld) -> None:
    """With equal shares nobody's second job goes before anybody's first, whichever came earlier."""
    running = await world.grant("running")
    places = [
        (await world.wait(name, tenant=tenant)).position
        for name, tenant in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c"), ("b2", "b")]
    ]
    assert places == [0, 1, 1, 2, 4]
    await world.finish(running)
    assert await world.finish_all() == ["a1", "b1", "c1", "a2", "b2"]


async def test_the_estimated_wait_follows_the_mean_service_time(world: QueueWorld) -> None:
    """After one job of ten seconds, a job with one before it expects two of them."""
    first = await world.grant("a")
    assert (await world.wait("b")).estimated_wait_s is None
    world.advance(10)
    await world.finish(first)
    await world.wait("c")
    assert (await world.wait("d")).estimated_wait_s == pytest.approx(20, rel=0.05)


async def test_models_do_not_touch_each_other(world: QueueWorld) -> None:
    """Each model's keys bear its own hash tag."""
    await world.grant("a")
    assert await world.gateway().length("other") == 0
    keys = [key for key in world.client.scan_iter() if not key.startswith((KEYS.prefix, "{il:other}:"))]
    assert keys == []


async def test_a_log_says_whether_its_job_waits_for_a_slot(world: QueueWorld) -> None:
    """Until it has one there is nobody who may write."""
    log, gateway = RedisGenerationLog(world.store, "g2"), world.gateway()
    running, _ = [
        await gateway.enqueue(replace(make_job(name), digest="d", payload="p")) for name in ("a", "b")
    ]
    pages = [await log.read(MODEL, name, 0) for name in ("a", "b")]
    assert [page is not None and page.waits for page in pages] == [False, True]
    assert isinstance(running, Grant)
    await world.finish(running)
