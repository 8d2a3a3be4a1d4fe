"""Who follows a resumable request at a gateway that did not begin it, over two gateways and a real Redis."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
from interlock import resume
from interlock.v1 import gateway_service_pb2 as pb

from services.common.errors import StoreUnavailable
from services.common.redis_client import RedisStore
from services.controller.adapters.redis_route import RedisRouteStore
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, REVISION, bearer, joined
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.resumption_world import ResumptionWorld, open_resumption_world
from tests.integration.test_gateway_resumption import KEYS, asked, begin, follow, stub, take

TEXT = "Whoever follows hears each word of it."
SLOW = Script(answer=TEXT, interval_s=0.05)
# Many pauses of the worker, for a busy machine; less than the second after which a lost notice is made good.
GAP_MAX_S = 0.6


@pytest.fixture
async def world(redis_process: RedisServer, redis_store: RedisStore) -> AsyncIterator[ResumptionWorld]:
    """Two gateways, and a worker that takes about two seconds for its answer."""
    async with open_resumption_world(redis_process.url, redis_store) as world:
        await world.add_worker("w1", SLOW)
        await world.add_gateway("g1")
        await world.add_gateway("g2")
        yield world


async def until_exists(client: redis.Redis, key: str) -> None:
    """Returns once Redis has a key."""
    async with asyncio.timeout(5):
        while not client.exists(key):  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.01)


async def empty(world: ResumptionWorld, client: redis.Redis) -> None:
    """Redis comes back without anything, and the controller has written the route; no worker is there yet."""
    client.flushall()
    await RedisRouteStore(world.store).write_route(MODEL, 2, 1, {REVISION: 100})


async def test_an_emptied_redis_knows_again_what_can_be_resumed(
    world: ResumptionWorld, redis_client: redis.Redis
) -> None:
    """At any gateway, while it runs and after its end; who followed meanwhile has noticed nothing."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    call = begin(g1)
    events = [event for event in await take(call, 3) if not event.HasField("queued")]
    (job_id,) = g1.dispatcher._live
    there = asyncio.create_task(follow(g2, 0))
    await until_exists(redis_client, f"{KEYS.prefix}followers:{job_id}")
    g1.store.awake.clear()
    await empty(world, redis_client)
    await world.add_worker("w1", SLOW)
    # It finds nothing at all, for the request's own gateway has not told yet what it knows.
    g2.dispatcher._resumption.notice(job_id)
    await asyncio.sleep(0.2)
    g1.store.awake.set()
    await until_exists(redis_client, KEYS.job(job_id))
    assert joined(events + await follow(g2, events[-1].cursor)) == TEXT
    assert joined(await there) == TEXT
    assert joined(await follow(g1, 0)) == joined([event async for event in begin(g2)]) == TEXT
    assert len(world.workers["w1"].starts) == 1
    call.cancel()


async def test_an_emptied_redis_ends_no_request_whose_client_is_elsewhere(
    world: ResumptionWorld, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway asks who follows it when the store knows the request again, and not yet its followers."""
    script = Script(answer=TEXT, interval_s=0.1)
    await world.add_worker("w1", SLOW, draining=True)
    await world.add_worker("w2", script)
    g2, g3 = world.peers["g2"], await world.add_gateway("g3", detach_grace_s=0.3)
    call = begin(g3)
    await take(call, 1)
    (job_id,) = g3.dispatcher._live
    there = asyncio.create_task(follow(g2, 0))
    await until_exists(redis_client, f"{KEYS.prefix}followers:{job_id}")
    g2.store.awake.clear()
    await empty(world, redis_client)
    await world.add_worker("w2", script)
    await until_exists(redis_client, KEYS.job(job_id))
    asked_for, log = asyncio.Event(), g3.dispatcher._resumption.log
    ask = log.unattended_s

    async def answered(model: str, job_id: str) -> float | None:
        try:
            return await ask(model, job_id)
        finally:
            asked_for.set()

    monkeypatch.setattr(log, "unattended_s", answered)
    call.cancel()
    await asyncio.wait_for(asked_for.wait(), 5)
    g2.store.awake.set()
    script.interval_s = 0.005
    assert joined(await there) == TEXT


async def test_a_request_whose_id_could_not_be_claimed_is_resumed_by_it(
    world: ResumptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node of its id was away for a moment, and the one of its queue was not."""
    g1, g2 = world.peers["g1"], world.peers["g2"]

    async def away(*_: object) -> None:
        raise StoreUnavailable("The node is away.")

    monkeypatch.setattr(g1.dispatcher._resumption._directory, "claim", away)
    call = begin(g1)
    await take(call, 2)
    assert joined(await follow(g2, 0)) == TEXT
    call.cancel()


async def test_the_log_of_a_silent_stream_is_there_again_before_its_next_word(
    world: ResumptionWorld, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may read a prompt for longer than clients elsewhere wait for a log that was lost."""
    g1, worker = world.peers["g1"], world.workers["w1"]
    call = begin(g1)
    events = await take(call, 2)
    monkeypatch.setattr(worker, "script", Script(answer=TEXT, interval_s=60.0))
    (job_id,) = g1.dispatcher._live
    log, before = f"{KEYS.prefix}log:{job_id}", -1
    while before != (before := redis_client.llen(log)):  # noqa: ASYNC110 - Redis tells nobody
        # What was sent before it fell silent is on its way.
        await asyncio.sleep(0.3)
    await empty(world, redis_client)
    async with asyncio.timeout(5):
        while redis_client.llen(log) < before:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.02)
    assert before >= len([event for event in events if not event.HasField("queued")])
    call.cancel()


async def timed(events: AsyncIterator[Any]) -> list[tuple[float, Any]]:
    """The events of a log, and when they came."""
    return [(time.monotonic(), event) async for event in events if not event.HasField("queued")]


@pytest.mark.parametrize("end", ["dies", "drains"])
async def test_clients_at_the_heir_of_a_request_hear_each_token_as_it_comes(
    world: ResumptionWorld, redis_client: redis.Redis, end: str
) -> None:
    """One was there before; one came as its gateway went, before the other one had taken the request up."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    events = resume.generate_async([g1.channel, g2.channel], asked(), metadata=bearer())
    came = asyncio.create_task(timed(events))
    await world.workers["w1"].wait_until(lambda: bool(world.workers["w1"].sent))
    (job_id,) = g1.dispatcher._live
    request = pb.ResumeGenerationRequest(request_id="r")
    was = asyncio.create_task(timed(stub(g2).ResumeGeneration(request, metadata=bearer())))
    await until_exists(redis_client, f"{KEYS.prefix}followers:{job_id}")
    # Another worker goes on: the scripted one cannot tell two sessions' jobs of one name apart.
    await world.add_worker("w2", SLOW)
    await world.add_worker("w1", SLOW, draining=True)
    if end == "dies":
        await g1.die()
    else:
        await g1.dispatcher.drain(0)
    for told in await asyncio.gather(came, was):
        assert joined([event for _, event in told]) == TEXT
        _, again = (place for place, (_, event) in enumerate(told) if event.HasField("started"))
        times = [at_s for at_s, _ in told[again:]]
        assert len(times) > len(TEXT) // 2
        assert max(after - before for before, after in itertools.pairwise(times)) < GAP_MAX_S
