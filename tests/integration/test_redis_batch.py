"""Calls that travel together, against a real Redis."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.redis_batch import BATCH_CALLS_MAX, RedisBatcher
from tests.fixtures.redis_server import RedisServer


def connect(server: RedisServer) -> Redis:
    """A client of the server."""
    return Redis.from_url(server.url, decode_responses=True)


async def test_each_caller_gets_its_own_reply_in_few_round_trips(redis_process: RedisServer) -> None:
    """Many calls at once: every reply belongs to its command, and one connection carried them."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        count = 3 * BATCH_CALLS_MAX
        replies = await asyncio.gather(*(batcher.call("ECHO", str(number)) for number in range(count)))
        assert replies == [str(number) for number in range(count)]
        await batcher.close()
        assert len(client.connection_pool._available_connections) == 1


async def test_a_refused_command_fails_alone(redis_process: RedisServer) -> None:
    """One bad command among good ones: its caller hears of it, the others get their replies."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        first = asyncio.ensure_future(batcher.call("ECHO", "first"))
        calls = [batcher.call("ECHO", "a"), batcher.call("NO-SUCH-COMMAND"), batcher.call("ECHO", "b")]
        good, bad, other = await asyncio.gather(*calls, return_exceptions=True)
        assert (await first, good, other) == ("first", "a", "b")
        assert isinstance(bad, ResponseError)


async def test_a_connection_that_broke_while_idle_is_made_anew(redis_process: RedisServer) -> None:
    """The caller after it notices nothing."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        number = await batcher.call("CLIENT", "ID")
        await client.client_kill_filter(_id=str(number))
        assert await batcher.call("CLIENT", "ID") != number
        await batcher.close()


async def test_a_batch_that_takes_too_long_is_given_up(redis_process: RedisServer) -> None:
    """Whoever waits hears of it, nothing is tried again, and the next reply is the next caller's."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 5.0)
        assert await batcher.call("ECHO", "before") == "before"
        with pytest.raises(RedisTimeoutError):
            await batcher.call("BLPOP", "nothing", "0")
        assert await batcher.call("ECHO", "after") == "after"
        await batcher.close()


async def test_a_caller_waits_no_longer_than_it_may(redis_process: RedisServer) -> None:
    """One that is stuck behind another's batch hears after its own time; the batch goes on."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 5.0, 0.5)
        hanging = asyncio.ensure_future(batcher.call("BLPOP", "nothing", "0.8"))
        await asyncio.sleep(0)
        with pytest.raises(RedisTimeoutError):
            await batcher.call("ECHO", "behind")
        with pytest.raises(RedisTimeoutError):
            await hanging
        await asyncio.sleep(0.5)
        assert await batcher.call("ECHO", "after") == "after"
        await batcher.close()


async def test_a_caller_that_left_before_its_turn_sends_nothing(redis_process: RedisServer) -> None:
    """A call that is cancelled while it waits never reaches Redis."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        call = asyncio.ensure_future(batcher.call("SET", "left", "behind", "EX", "5"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await batcher.call("EXISTS", "left") == 0


async def test_everybody_hears_when_redis_is_gone(redis_server: RedisServer) -> None:
    """A batch that cannot be sent fails for each of its callers."""
    async with connect(redis_server) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        assert await batcher.call("PING")
        redis_server.stop()
        results = await asyncio.gather(*(batcher.call("PING") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, RedisConnectionError) for result in results)


async def test_closing_ends_the_wait_of_everybody(redis_process: RedisServer) -> None:
    """A call that hangs in Redis is told of the end; nobody waits for ever."""
    async with connect(redis_process) as client:
        batcher = RedisBatcher(client, 1.0, 2.0)
        hanging = asyncio.ensure_future(batcher.call("BLPOP", "nothing", "0"))
        behind = asyncio.ensure_future(batcher.call("PING"))
        await asyncio.sleep(0.05)
        await batcher.close()
        results = await asyncio.gather(hanging, behind, return_exceptions=True)
        assert all(isinstance(result, RedisConnectionError) for result in results)
