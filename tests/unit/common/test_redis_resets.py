"""Connections to Redis that are reset, with either event loop, or lead to what is no primary any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from redis.exceptions import ReadOnlyError

from services.common.errors import StoreUnavailable
from services.common.redis_client import RedisStore, Script, connect
from tests.fakes.resetting_redis import ResettingRedis, resetting_redis

SCRIPT = Script("return 1", "abc")

Runner = Callable[[Coroutine[Any, Any, None]], None]
either_loop = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


async def write(store: RedisStore, key: str = "k") -> Any:
    """Runs a script."""
    return await store.run_script(SCRIPT, [key], [])


async def read(store: RedisStore) -> Any:
    """Runs a command that only reads."""
    return await store.fetch("GET", "k")


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[ResettingRedis, RedisStore]]:
    """A server and a client of it."""
    async with resetting_redis() as redis:
        store = connect(redis.url)
        try:
            yield redis, store
        finally:
            await store.close()


async def noticed(store: RedisStore) -> None:
    """Returns once the client's side of every connection knows of its reset."""
    pool: Any = store._client.connection_pool  # type: ignore[union-attr]
    async with asyncio.timeout(5):
        for connection in (*pool._available_connections, *pool._in_use_connections):
            while connection._reader.exception() is None:  # noqa: ASYNC110 - a stream tells only its reader
                await asyncio.sleep(0.005)


@either_loop
@pytest.mark.parametrize("call", [write, read])
def test_a_connection_that_was_reset_while_idle_is_made_anew(
    run: Runner, call: Callable[[RedisStore], Awaitable[Any]]
) -> None:
    """The next call notices nothing: its caller would lose a slot that it gives back, or a breaker's move."""

    async def check() -> None:
        async with connected() as (redis, store):
            first = await call(store)
            made = len(redis.connections)
            redis.reset()
            await noticed(store)
            assert await call(store) == first
            assert len(redis.connections) == made + 1

    run(check())


@either_loop
@pytest.mark.parametrize("call", [write, read])
def test_a_server_that_resets_every_connection_is_told_as_away(
    run: Runner, call: Callable[[RedisStore], Awaitable[Any]]
) -> None:
    """Whatever the loop says of it, callers hear of a store that does not answer."""

    async def check() -> None:
        async with connected() as (redis, store):
            await call(store)
            redis.refuses = True
            redis.reset()
            await noticed(store)
            with pytest.raises(StoreUnavailable):
                await call(store)

    run(check())


async def test_a_primary_that_was_demoted_is_left() -> None:
    """The address leads to another one by now; what was refused is sent there once."""
    async with connected() as (redis, store):
        assert await write(store, "before") == 1
        redis.is_replica = redis.leads_elsewhere = True
        made = len(redis.connections)
        assert [await write(store, "after"), await write(store, "again")] == [1, 1]
        assert (redis.scripts, len(redis.connections)) == (["before", "after", "again"], made + 1)


async def test_only_what_was_refused_is_sent_again() -> None:
    """The others of a batch have been answered before the server was demoted."""
    async with connected() as (redis, store):
        await write(store)
        redis.is_replica = redis.leads_elsewhere = True
        answered = asyncio.ensure_future(read_by_batch(store))
        assert (await write(store, "refused"), await answered) == (1, "a")
        assert redis.scripts == ["k", "refused"]


async def read_by_batch(store: RedisStore) -> Any:
    """A command that a replica answers, beside those that it refuses."""
    assert store._batcher is not None
    return await store._batcher.call("GET", "k")


async def test_a_server_that_takes_no_writes_costs_one_connection_a_call() -> None:
    """Where the address leads nowhere else, each call hears of it at once."""
    async with connected() as (redis, store):
        await write(store)
        redis.is_replica = True
        made = len(redis.connections)
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as caught:
                await write(store)
            assert isinstance(caught.value.__cause__, ReadOnlyError)
        assert len(redis.connections) <= made + 3
        redis.is_replica = False
        assert await write(store) == 1
