"""Breakers of a gateway's process over a real Redis, with a real controller: by themselves, and held."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
from interlock.v1.worker_pb2 import (
    BREAKER_STATE_CLOSED,
    BREAKER_STATE_FORCED_CLOSED,
    BREAKER_STATE_FORCED_OPEN,
)

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore
from services.gateway import __main__ as gateway_main
from services.gateway.adapters import redis_fleet
from services.gateway.core.queue_limits import QueueLimits
from tests.fixtures.fleet_world import ANSWER, GATEWAY, MODEL, FleetWorld, open_fleet
from tests.fixtures.gateway_world import joined
from tests.fixtures.redis_server import RedisServer

# Who has the breaker of `w1` open, as the queue's grants obey it.
BOARD = f"{ModelKeys(MODEL).prefix}open:w1"


@pytest.fixture
async def fleet(
    tmp_path: Path,
    redis_process: RedisServer,
    redis_client: redis.Redis,
    redis_store: RedisStore,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[FleetWorld]:
    """A mesh without a worker. What failed is used again at once, so that its calls are in one window."""
    monkeypatch.setattr(gateway_main, "QueueLimits", functools.partial(QueueLimits, suspect_s=0.005))
    monkeypatch.setattr(redis_fleet, "LOOK_S", 0.1)
    async with open_fleet(tmp_path, redis_process.url, redis_store) as found:
        yield found
    # Other gateways would forget them, a minute after this one's end.
    redis_client.delete(BOARD, f"{ModelKeys(MODEL).prefix}opened")


async def answers(fleet: FleetWorld, count: int = 1) -> None:
    """So many clients at once are answered, whatever happens to their first attempts."""
    found = await asyncio.gather(*(fleet.ask() for _ in range(count)))
    assert set(map(joined, found)) == {ANSWER}


async def test_it_opens_at_twenty_calls_and_half_of_them_and_tries_once_after_its_sleep(
    fleet: FleetWorld,
) -> None:
    """Of twenty clients at half-open one is the trial, 5 s later; the fleet sees it open and close."""
    worker = await fleet.add_worker("w1")
    for _ in range(10):
        # A call that fails, and one that does not: ten failures of nineteen do not keep the twentieth away.
        worker.script.failures = 1
        await answers(fleet)
    assert len(worker.starts) == 20
    await fleet.until_shown("w1", state="OPEN", calls=20, failures=10)
    other = await fleet.add_worker("w2", slots=1)
    worker.script.opening = asyncio.Event()
    await asyncio.sleep(worker.starts_s[19] + 3.5 - time.monotonic())

    async def ask_until_tried() -> None:
        while len(worker.starts) == 20:
            await answers(fleet)

    began_s = time.monotonic()
    callers = [asyncio.create_task(ask_until_tried()) for _ in range(20)]
    async with asyncio.timeout(10):
        # One of them waits for the first token of the trial; the others are answered by the other worker.
        while sum(caller.done() for caller in callers) < 19:
            await asyncio.wait(callers, timeout=0.01)
    assert other.starts
    assert len(worker.starts) == 21
    due_s = worker.starts_s[19] + 5
    assert due_s <= worker.starts_s[20] <= max(due_s, began_s) + 2
    worker.script.opening.set()
    await asyncio.gather(*callers)
    await fleet.until_shown("w1", state="CLOSED")
    await answers(fleet, 4)
    assert len(worker.starts) > 21


async def test_forty_nine_per_cent_open_nothing(fleet: FleetWorld) -> None:
    """Of fifty-one calls twenty-five have failed, and the next one is made."""
    worker = await fleet.add_worker("w1")
    await answers(fleet, 2)
    for _ in range(25):
        worker.script.failures = 1
        await answers(fleet)
    assert len(worker.starts) == 52
    await fleet.until_shown("w1", state="CLOSED", calls=52, failures=25)


async def test_what_an_administrator_holds_is_what_the_gateway_does(
    fleet: FleetWorld, redis_client: redis.Redis
) -> None:
    """Forced open: nobody is sent there. Forced closed: everybody, whatever happens. Released: it judges."""
    worker = await fleet.add_worker("w1")
    await fleet.add_worker("w2")

    async def until_listed(told: str | None) -> None:
        async with asyncio.timeout(5):
            while redis_client.hget(BOARD, GATEWAY) != told:  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.02)

    await answers(fleet, 8)
    asked = len(worker.starts)
    assert asked > 0
    await fleet.force("w1", BREAKER_STATE_FORCED_OPEN)
    await until_listed("forced")
    await answers(fleet, 8)
    assert len(worker.starts) == asked
    worker.script.failing = True
    await fleet.force("w1", BREAKER_STATE_FORCED_CLOSED)
    await until_listed(None)
    async with asyncio.timeout(10):
        while len(worker.starts) < asked + 40:
            await answers(fleet, 8)
    assert (await fleet.breaker("w1"))["state"] == "FORCED_CLOSED"
    await fleet.force("w1", BREAKER_STATE_CLOSED)
    async with asyncio.timeout(10):
        while (await fleet.breaker("w1"))["state"] != "OPEN":
            await answers(fleet, 8)
    asked = len(worker.starts)
    await answers(fleet, 8)
    assert len(worker.starts) == asked
