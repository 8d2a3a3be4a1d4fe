"""What the queue does when messages, gateways or Redis itself go missing."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

import pytest

from services.common.errors import RequestExists, StoreUnavailable
from services.common.queue_keys import request_key
from services.common.redis_client import connect
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.events import Chunk, Finished, FinishReason
from services.gateway.core.jobs import Grant, Outcome
from services.gateway.core.log import AppendOutcome, Claim, Entry, LogTail, log_bounds
from services.gateway.core.queue_limits import QueueLimits
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job
from tests.fixtures.redis_server import RedisServer


async def test_a_lost_grant_is_found_by_the_next_renewal(world: QueueWorld) -> None:
    """The renewal names the job as waiting and hears that it runs; its lease begins anew."""
    running = await world.grant("a")
    await world.wait("b", gateway="g2")
    await world.finish(running)
    world.advance(4)
    renewal = await world.gateway("g2").renew(MODEL, {}, frozenset("b"))
    (grant,) = renewal.granted
    assert (grant.job_id, grant.worker_id) == ("b", "w1")
    world.advance(4)
    await world.gateway().reap(MODEL)
    assert world.running() == {"b"}
    await world.finish(grant, gateway="g2")


async def test_renew_prolongs_and_tells_what_is_lost_and_what_is_unknown(world: QueueWorld) -> None:
    """Both ways are compared: a wrong fence and a stranger's job are lost, an unnamed job is unknown."""
    await world.add_worker("w2")
    first, _ = await world.grant("a"), await world.grant("b")
    await world.wait("c")
    await world.wait("theirs", gateway="g2")
    renewal = await world.gateway().renew(
        MODEL, {"a": first.nonce, "b": "wrong", "gone": "x"}, frozenset({"theirs"})
    )
    assert renewal.lost == {"b", "gone", "theirs"}
    assert renewal.unknown == {"c"}


async def test_a_renewal_does_not_judge_a_job_whose_call_is_under_way(world: QueueWorld) -> None:
    """Calls overlap: a job that is being enqueued is neither lost nor unknown."""
    gateway = world.gateway()
    answers = await asyncio.gather(
        gateway.enqueue(make_job("a")),
        gateway.renew(MODEL, {}, frozenset()),
        gateway.renew(MODEL, {}, frozenset("b")),
        gateway.enqueue(make_job("b")),
    )
    assert [renewal.unknown | renewal.lost for renewal in answers[1:3]] == [set(), set()]


async def test_the_jobs_of_a_vanished_gateway_are_reaped(world: QueueWorld) -> None:
    """Running and waiting ones end, the slot is free, and the next job takes it."""
    await world.grant("a", gateway="dead")
    await world.wait("b", gateway="dead")
    world.advance(3)
    await world.wait("c")
    world.advance(3)
    await world.gateway().reap(MODEL)
    assert [grant.job_id for grant in world.received["g1"]] == ["c"]
    assert world.client.hget(KEYS.job("a"), "state") == "failed"
    assert world.client.hget(KEYS.job("b"), "state") == "failed"


async def test_jobs_on_a_worker_that_was_removed_are_reaped_too(world: QueueWorld) -> None:
    """Leases are found by their end, not by their worker."""
    await world.grant("a", gateway="dead")
    await world.routes.remove_worker(MODEL, "w1", 1)
    world.advance(6)
    await world.gateway().reap(MODEL)
    assert world.running() == set()


async def test_a_gateway_that_slept_does_not_reap_itself(world: QueueWorld) -> None:
    """Its own jobs are skipped; the renewal that follows prolongs them."""
    grant = await world.grant("a")
    world.advance(10)
    await world.gateway().reap(MODEL)
    renewal = await world.gateway().renew(MODEL, {"a": grant.nonce}, frozenset())
    assert renewal.lost == set()
    assert world.running() == {"a"}


async def test_a_gateway_that_slept_too_long_learns_what_it_lost(world: QueueWorld) -> None:
    """Another gateway reaped its job; its late settle frees nobody's slot."""
    grant = await world.grant("a", gateway="sleeper")
    world.advance(10)
    await world.gateway().reap(MODEL)
    other = await world.grant("b")
    await world.finish(grant, gateway="sleeper")
    renewal = await world.gateway("sleeper").renew(MODEL, {"a": grant.nonce}, frozenset())
    assert renewal.lost == {"a"}
    assert world.running() == {other.job_id}


async def test_every_call_is_a_sign_of_life(world: QueueWorld) -> None:
    """A gateway whose renewals are lost, but whose other calls arrive, keeps its jobs."""
    await world.grant("a", gateway="busy")
    for _ in range(3):
        world.advance(4)
        await world.gateway("busy").length(MODEL)
        await world.gateway().reap(MODEL)
    assert world.running() == {"a"}


async def test_a_vanished_gateways_job_at_the_head_blocks_nobody(world: QueueWorld) -> None:
    """The grant that meets it ends it on the spot and goes on to the next."""
    running = await world.grant("a")
    await world.wait("dead", gateway="dead")
    world.advance(3)
    await world.wait("b")
    world.advance(3)
    await world.finish(running)
    assert [grant.job_id for grant in world.received["g1"]] == ["b"]


async def test_a_gateway_that_restarts_under_its_name_frees_what_it_forgot(world: QueueWorld) -> None:
    """Nobody else may reap a living gateway's jobs, so that unnamed ones end by its own renewals."""
    await world.grant("a")
    await world.wait("b")
    renewal = await world.gateway().renew(MODEL, {}, frozenset())
    assert renewal.unknown == {"a", "b"}
    assert world.running() == {"a"}
    world.advance(6)
    await world.gateway().renew(MODEL, {}, frozenset())
    assert world.running() == set()
    assert await world.gateway().length(MODEL) == 0


async def test_naming_a_job_prolongs_its_lease(world: QueueWorld) -> None:
    """What was named four seconds ago is not forgotten yet, running or waiting; two later it is."""
    grant = await world.grant("a")
    await world.wait("b")
    world.advance(4)
    await world.gateway().renew(MODEL, {"a": grant.nonce}, frozenset("b"))
    for seconds, kept in ((4, {"a", "b"}), (2, set())):
        world.advance(seconds)
        await world.gateway().renew(MODEL, {}, frozenset())
        assert world.client.hkeys(KEYS.prefix + "owned:g1") == sorted(kept)


async def test_a_pause_of_redis_expires_nothing(world: QueueWorld) -> None:
    """A jump of the machine's clock between two calls counts as one tick, a step back as none."""
    await world.grant("a", gateway="g2")
    for jump_ms in (-600_000, 600_000):
        world.client.hincrby(KEYS.clock, "real", jump_ms)
        before = int(world.client.hget(KEYS.clock, "logical") or 0)
        await world.gateway().reap(MODEL)
        assert 0 <= int(world.client.hget(KEYS.clock, "logical") or 0) - before <= 1_100
    assert world.running() == {"a"}


async def test_after_redis_was_emptied_jobs_are_registered_and_enqueued_again(world: QueueWorld) -> None:
    """The running one holds its slot under its old nonce, the waiting one its place."""
    grant = await world.grant("a")
    await world.wait("b")
    world.client.flushall()
    await world.set_route(epoch=2)
    await world.add_worker()
    renewal = await world.gateway().renew(MODEL, {"a": grant.nonce}, frozenset("b"))
    assert renewal.lost == {"a", "b"}
    assert await world.gateway().register(make_job("a"), grant)
    await world.wait("b", waited_s=3.0)
    assert world.running() == {"a"}
    await world.finish(grant)
    assert await world.finish_all() == ["b"]


async def test_register_gives_way_to_what_redis_knows(world: QueueWorld) -> None:
    """An attempt under another nonce, a namesake or an end wins; the same attempt is confirmed."""
    first = await world.grant("a")
    assert await world.gateway().register(make_job("a"), first)
    await world.gateway().refused(MODEL, "a", first.nonce, hold_s=0.0)
    (second,) = world.received["g1"]
    assert not await world.gateway().register(make_job("a"), first)
    await world.finish(second)
    assert not await world.gateway().register(make_job("a"), second)
    await world.grant("b", gateway="g2")
    assert not await world.gateway().register(make_job("b", submission="another"), first)


async def test_register_takes_the_place_of_a_forgotten_grant(world: QueueWorld) -> None:
    """Redis lost its last second: what runs still waits there, and is not granted again."""
    blocker = await world.grant("blocker")
    await world.wait("a")
    lost = Grant("a", 1, "nonce", "w2", "w2:1", "r1", 1)
    assert await world.gateway().register(make_job("a"), lost)
    await world.finish(blocker)
    assert world.received["g1"] == []
    assert world.running("w2") == {"a"}
    await world.finish(lost)


async def test_the_same_id_on_two_gateways_at_once_has_one_owner(world: QueueWorld) -> None:
    """One gets the job, the other RequestExists."""
    answers = await asyncio.gather(
        *(world.gateway(name).enqueue(make_job("a", submission=name)) for name in ("g1", "g2")),
        return_exceptions=True,
    )
    assert {type(answer) for answer in answers} == {Grant, RequestExists}


async def test_gateways_that_stay_silent_are_forgotten(world: QueueWorld) -> None:
    """After a minute they are no longer counted as members."""
    await world.gateway("gone").length(MODEL)
    world.advance(61)
    await world.gateway().reap(MODEL)
    assert set(world.client.zrange(KEYS.prefix + "gateways", 0, -1)) == {"g1"}


async def test_no_end_is_taken_before_the_log_that_redis_lost_is_whole_again(world: QueueWorld) -> None:
    """A tail alone would leave a finished job without its beginning; the same end with all of it is taken."""
    job = replace(make_job("a"), digest="d", payload="p")
    grant = await world.gateway().enqueue(job)
    assert isinstance(grant, Grant)
    log = RedisGenerationLog(world.store, "g1")
    first, last = Entry(Chunk(0, "a ", (1,))), Entry(Finished(FinishReason.STOP))
    await log.append(MODEL, "a", grant.nonce, 0, [first], log_bounds(10, None))
    world.client.flushall()
    await world.add_worker()
    await world.set_route()
    assert await world.gateway().register(replace(job, waited_s=1), grant)
    ends = [LogTail(1, (last,)), LogTail(0, (first, last))]
    taken = [await world.gateway().settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 2, end) for end in ends]
    assert taken == [False, True]
    page = await log.read(MODEL, "a", 0)
    assert page is not None
    assert (page.entries, page.outcome) == ((first, last), Outcome.FINISHED)


@pytest.mark.parametrize("payload", ["", "p"], ids=["named", "resumable"])
@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_what_redis_lost_is_entered_again_with_its_id(
    world: QueueWorld, state: str, payload: str
) -> None:
    """For as long as it may last, and its record after that; what is new was given its id before."""
    job = replace(make_job("a", timeout_s=100.0), digest="d", payload=payload)
    gateway, directory = world.gateway(), RedisRequestDirectory(world.store)
    grant = await gateway.enqueue(job)
    assert isinstance(grant, Grant)
    assert await directory.find("a") is None
    world.client.flushall()
    if state == "running":
        assert await gateway.register(replace(job, waited_s=1.0), grant)
    else:
        await gateway.enqueue(replace(job, waited_s=1.0))
    assert await directory.find("a") == Claim(MODEL, "d")
    limits = QueueLimits()
    kept_s = limits.resume_ttl_s if payload else limits.record_ttl_s
    assert 0 <= 100.0 + kept_s - world.client.ttl(request_key("a")) < 10


@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_no_end_overtakes_the_call_that_enters_a_job_again(world: QueueWorld, state: str) -> None:
    """Also where its id is entered with it: else it would stay, with its slot, until its lease has passed."""
    job = replace(make_job("a"), digest="d")
    gateway, again = world.gateway(), replace(job, waited_s=1.0)
    grant = await gateway.enqueue(job)
    assert isinstance(grant, Grant)
    # Redis shall know the scripts: what it does not know it is told in a second call.
    assert await gateway.register(job, grant)
    world.client.flushall()
    await world.set_route()
    await world.add_worker()
    if state == "running":
        settled = gateway.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 1)
        assert list(await asyncio.gather(gateway.register(again, grant), settled)) == [True, True]
    else:
        await asyncio.gather(gateway.enqueue(again), gateway.cancel(MODEL, "a", job.submission))
    assert world.running() == set()
    assert world.client.hget(KEYS.job("a"), "state") in {"finished", "cancelled"}
    assert await RedisRequestDirectory(world.store).find("a") == Claim(MODEL, "d")


async def test_a_job_is_entered_again_where_its_id_cannot_be(world: QueueWorld) -> None:
    """In a cluster the id may be a node's that is away, and keeps no gateway from the others."""
    job = replace(make_job("a"), digest="d")
    gateway = world.gateway()
    grant = await gateway.enqueue(job)
    assert isinstance(grant, Grant)
    world.client.flushall()
    await world.add_worker()
    await world.set_route()
    # Every call that names it fails.
    world.client.rpush(request_key("a"), "of another type")
    with pytest.raises(StoreUnavailable):
        await RedisRequestDirectory(world.store).find("a")
    assert await gateway.register(replace(job, waited_s=1.0), grant)
    await world.finish(grant)
    assert isinstance(await gateway.enqueue(replace(job, submission="b", waited_s=1.0)), Grant)
    world.client.delete(request_key("a"))


async def test_a_job_that_is_to_end_is_so_under_its_new_attempt_as_well(world: QueueWorld) -> None:
    """Its gateway had another slot for it, and has not heard that its subject stopped it."""
    grant, other = await world.grant("a"), world.gateway("g2")
    other._scripts._calls = itertools.count(99, 0)
    assert await other.stop(MODEL, "a")
    own = replace(grant, nonce="own")
    assert await world.gateway().register(replace(make_job("a"), waited_s=1.0), own, instead=True)
    renewal = await world.gateway().renew(MODEL, {"a": "own"}, frozenset())
    assert renewal.cancelled == {"a"}
    assert not renewal.lost
    await world.finish(own)
    # A call that the connection sent twice still says that it stopped the job.
    assert await other.stop(MODEL, "a")


async def test_no_log_is_lost_before_the_route_is_back(world: QueueWorld) -> None:
    """Whoever has it can write it again only then. Of what was never there nothing is lost."""
    log = RedisGenerationLog(world.store, "g1", None, lambda model: model == MODEL)
    world.client.flushall()
    with pytest.raises(StoreUnavailable):
        await log.read(MODEL, "a", 0, known=True)
    assert await log.read(MODEL, "a", 0) is None
    assert await log.read("another", "a", 0, known=True) is None
    await world.set_route()
    assert await log.read(MODEL, "a", 0, known=True) is None


async def test_without_redis_every_call_says_so_at_once(redis_server: RedisServer) -> None:
    """StoreUnavailable, not a hang; and the same object works when Redis is back."""
    store = connect(redis_server.url)
    queue = RedisJobQueue(store, "g1")
    await queue.length(MODEL)
    redis_server.stop()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await queue.enqueue(make_job("a"))
    with pytest.raises(StoreUnavailable):
        await queue.renew(MODEL, {}, frozenset())
    assert time.monotonic() - began < 5
    redis_server.start()
    assert await queue.length(MODEL) == 0
    await queue.close()
    await store.close()


async def test_a_silent_redis_is_given_up_after_its_timeout(redis_server: RedisServer) -> None:
    """A server that holds its connections and does not answer costs a second, not for ever."""
    store = connect(redis_server.url)
    queue = RedisJobQueue(store, "g1")
    await queue.length(MODEL)
    with redis_server.client() as client:
        client.execute_command("CLIENT", "PAUSE", 60_000, "ALL")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await queue.length(MODEL)
    assert time.monotonic() - began < 4
    await queue.close()
    await store.close()


async def test_a_log_whose_job_is_lost_is_told_from_another_gateways(world: QueueWorld) -> None:
    """An emptied store is as good as away; who has lost a job to another one is to say nothing more."""
    grant = await world.gateway().enqueue(replace(make_job("a"), digest="d", payload="p"))
    assert isinstance(grant, Grant)
    log, entry = RedisGenerationLog(world.store, "g1"), Entry(Chunk(0, "a", (7,)))
    bounds = log_bounds(100, None)
    for job_id, nonce, outcome in (
        ("a", grant.nonce, AppendOutcome.WRITTEN),
        ("a", "another", AppendOutcome.STALE),
        ("b", grant.nonce, AppendOutcome.LOST),
    ):
        assert (await log.append(MODEL, job_id, nonce, 0, (entry,), bounds)).outcome is outcome


async def test_the_subscription_comes_back_with_redis(redis_server: RedisServer) -> None:
    """After a restart grants by others are heard again, without a new object."""
    store = connect(redis_server.url)
    queue = RedisJobQueue(store, "g1")
    await queue.start()
    await queue.wait_subscribed()
    redis_server.stop()
    while queue._listener.subscribed.is_set():  # noqa: ASYNC110 - an event tells when it is set, not when cleared
        await asyncio.sleep(0.01)
    redis_server.start()
    await asyncio.wait_for(queue.wait_subscribed(), 10)
    await queue.close()
    await store.close()
