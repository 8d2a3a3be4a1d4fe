"""A store that is closed, with a real Redis: no connection is left, whatever was under way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis

from services.common.errors import StoreUnavailable
from services.common.redis_client import CALL_TIMEOUT_S, RedisStore, connect, read_script
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.waiting import until

# The server hears of an end a moment later.
HEARD_S = 10.0


@pytest.fixture
def before(redis_client: redis.Redis) -> set[str]:
    """The connections that there are without the store's."""
    return connections(redis_client)


def connections(client: redis.Redis) -> set[str]:
    """The ids of those who are connected."""
    return {one["id"] for one in client.client_list()}


async def refuses(store: RedisStore, script: Path) -> None:
    """Raises unless every kind of call is refused, and at once: it need not wait for a bound."""
    async with asyncio.timeout(CALL_TIMEOUT_S / 2):
        with pytest.raises(StoreUnavailable):
            await store.fetch("PING")
    with pytest.raises(StoreUnavailable):
        await store.run_script(read_script(script), ["k"], [])
    with pytest.raises(redis.ConnectionError):
        await store.open_pubsub()


async def test_a_closed_store_connects_no_more(
    redis_process: RedisServer, redis_client: redis.Redis, before: set[str], tmp_path: Path
) -> None:
    """Whoever still owes it something, as a request's last errand may, hears that it is gone."""
    (script := tmp_path / "one.lua").write_text("return 1")
    store = connect(redis_process.url)
    assert await store.run_script(read_script(script), ["k"], []) == 1
    assert await store.fetch("PING")
    assert connections(redis_client) - before
    await store.close()
    await store.close()
    await refuses(store, script)
    await until(lambda: connections(redis_client) <= before, HEARD_S)


async def test_a_call_that_is_under_way_leaves_no_connection(
    redis_process: RedisServer, redis_client: redis.Redis, before: set[str]
) -> None:
    """The library connects anew where a connection is closed under a call: that one is closed as well."""
    store = connect(redis_process.url)
    call = asyncio.create_task(store.fetch("BLPOP", "nothing", "0.4"))
    await until(lambda: any(one["cmd"] == "blpop" for one in redis_client.client_list()), HEARD_S)
    await store.close()
    assert call.done()
    await until(lambda: connections(redis_client) <= before, HEARD_S)
