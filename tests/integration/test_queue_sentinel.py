"""The queue over Redis Sentinel: the primary is killed, and the same store goes on with its replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import pytest

from services.common.errors import StoreUnavailable
from services.common.redis_client import connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Grant, Outcome, Waiting
from tests.fixtures.queue_world import MODEL, make_job
from tests.fixtures.redis_sentinel import RedisSentinels, redis_sentinels

__all__ = ["redis_sentinels"]

T = TypeVar("T")

# The sentinels need a second or two; a client that holds on to the dead primary needs for ever.
FAILOVER_LIMIT_S = 15.0


async def until_answered(call: Callable[[], Awaitable[T]]) -> T:
    """The answer of the first call that is not told that the store is away."""
    async with asyncio.timeout(FAILOVER_LIMIT_S):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def test_the_queue_goes_on_with_another_primary(redis_sentinels: RedisSentinels) -> None:
    """What was replicated is known there; what one gateway frees is granted to the other one by a message."""
    async with AsyncExitStack() as exits:
        store = connect(redis_sentinels.url)
        exits.push_async_callback(store.close)
        routes = RedisRouteStore(store)
        record = WorkerRecord("w1", "w1:1", "i1", 1, draining=False, ready=frozenset({"r1"}), lease_ttl_s=1e6)
        await routes.write_worker(MODEL, record, 1)
        await routes.write_route(MODEL, 1, 1, {"r1": 100})
        first, second = RedisJobQueue(store, "g1"), RedisJobQueue(store, "g2")
        heard: asyncio.Queue[Grant] = asyncio.Queue()
        second.on_grant(heard.put_nowait)
        for queue in (first, second):
            exits.push_async_callback(queue.close)
            await queue.start()
            await queue.wait_subscribed()
        grant = await first.enqueue(make_job("a"))
        assert isinstance(grant, Grant)
        assert isinstance(await second.enqueue(make_job("b")), Waiting)
        old = redis_sentinels.primary()
        await asyncio.to_thread(redis_sentinels.await_replicated)
        redis_sentinels.kill(old)
        with pytest.raises(StoreUnavailable):
            await first.length(MODEL)
        await asyncio.to_thread(redis_sentinels.await_other_primary, old)
        assert await until_answered(lambda: first.length(MODEL)) == 1
        async with asyncio.timeout(FAILOVER_LIMIT_S):
            while not await asyncio.to_thread(redis_sentinels.hears, 2):  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.05)
        assert await first.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 1)
        async with asyncio.timeout(FAILOVER_LIMIT_S):
            assert (await heard.get()).job_id == "b"
