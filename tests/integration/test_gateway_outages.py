"""Resumable streams while the store takes nothing, from all gateways or from the one that runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import redis

from services.common.errors import StoreUnavailable
from services.common.redis_client import RedisStore
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import joined, reason_of
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.resumption_world import ResumptionWorld, open_resumption_world
from tests.integration.test_gateway_resumption import TEXT, begin, follow, take

# So little that a worker soon waits for whoever does not tell its tokens.
CREDIT_TOKENS = 16
# Told while the store is away: several times as much.
TOLD_TOKENS = 60


@pytest.fixture
async def outage(redis_process: RedisServer, redis_store: RedisStore) -> AsyncIterator[ResumptionWorld]:
    """A worker, and no gateway yet."""
    async with open_resumption_world(redis_process.url, redis_store) as world:
        await world.add_worker("w1", Script(answer=TEXT, interval_s=0.01))
        yield world


async def read_until(call: Any, events: list[Any], tokens: int) -> None:
    """Reads on until so many tokens have come."""
    async with asyncio.timeout(10):
        while sum(len(event.chunk.token_ids) for event in events) < tokens:
            events.append(await call.read())


async def test_a_stream_goes_on_without_the_store_and_its_log_is_whole_afterwards(
    outage: ResumptionWorld, redis_client: redis.Redis
) -> None:
    """Far beyond the worker's credit; then the other gateway tells the same events by the same cursors."""
    g1, g2 = [
        await outage.add_gateway(name, credit_tokens=CREDIT_TOKENS, limits=QueueLimits())
        for name in ("g1", "g2")
    ]
    call = begin(g1)
    events = await take(call, 2)
    redis_client.config_set("maxmemory", 1)
    try:
        await read_until(call, events, TOLD_TOKENS)
    finally:
        redis_client.config_set("maxmemory", 0)
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    events = [event for event in events if not event.HasField("queued")]
    assert joined(events) == TEXT
    again = await follow(g2, 0, timeout=20)
    assert [(event.cursor, event.chunk) for event in again] == [
        (event.cursor, event.chunk) for event in events
    ]


async def test_who_was_cut_off_does_not_speak_beside_the_one_that_took_its_stream(
    outage: ResumptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on alone; once the store says whose the stream is, its client is told, and asks anew."""
    g1, g2 = await outage.add_gateway("g1"), await outage.add_gateway("g2")
    # Its answer takes some seconds.
    outage.workers["w1"].script.interval_s = 0.05
    call = begin(g1)
    events = await take(call, 2)
    other = await outage.add_worker("w2", Script(answer=TEXT))
    await outage.add_worker("w1", Script(), draining=True)
    (generation,) = g1.dispatcher._live.values()
    assert generation.chronicle is not None
    with monkeypatch.context() as cut:
        cut.setattr(g1.store, "run_script", away)
        async with asyncio.timeout(10):
            while not (generation.chronicle.is_torn and other.starts):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - it fails at any read
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
    assert reason_of(caught.value) == "WORKER_LOST"
    told = joined([event for event in events if not event.HasField("queued")])
    assert TEXT.startswith(told)
    assert joined(await follow(g2, 0, timeout=20)) == TEXT


async def away(*_: object) -> None:
    """A store that cannot be reached from here."""
    raise StoreUnavailable("gone")
