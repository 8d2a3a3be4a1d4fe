"""What request ids stand for, in a real Redis, and for how long; and who is known to follow a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import redis

from services.common.errors import QuotaExceeded, StoreUnavailable
from services.common.queue_keys import request_key
from services.common.redis_client import RedisStore
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.core.jobs import Grant, Waiting
from services.gateway.core.log import Claim
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_world import MODEL, QueueWorld, make_job

CLAIM = Claim("m", "digest")


@pytest.mark.parametrize(
    ("again", "ttl_s", "left_s"),
    [(CLAIM, 900.0, 900.0), (CLAIM, 60.0, 600.0), (Claim("m", "another"), 900.0, 600.0)],
    ids=["longer", "shorter", "another-body"],
)
async def test_an_id_that_is_used_again_stands_for_its_request_for_as_long_as_that(
    redis_client: redis.Redis, redis_store: RedisStore, again: Claim, ttl_s: float, left_s: float
) -> None:
    """The new one is resumed by it when the first one's time is over; another body prolongs nothing."""
    directory = RedisRequestDirectory(redis_store)
    assert await directory.claim("a", CLAIM, 600.0) is None
    for _ in range(2):
        assert await directory.claim("a", again, ttl_s) == CLAIM
        assert left_s - 60 < redis_client.pttl(request_key("a")) / 1000 <= left_s
    await directory.release("a", CLAIM)
    assert await directory.find("a") is None


@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_what_is_entered_again_is_told_before_its_id_is_answered(
    world: QueueWorld, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The id may be another node's, which is away: its claim goes on by itself, and ends with the queue."""
    gateway, job = world.gateway(), replace(make_job("a"), digest="d", payload="p")
    grant = await gateway.enqueue(job)
    assert isinstance(grant, Grant)
    world.client.flushall()
    await world.set_route()
    await world.add_worker()
    claims, ended = gateway._claims, asyncio.Event()

    async def never(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(claims._directory, "claim", never)
    # Less than any call may take.
    async with asyncio.timeout(1.5):
        if state == "running":
            assert await gateway.register(replace(job, waited_s=1.0), grant)
        else:
            assert isinstance(await gateway.enqueue(replace(job, waited_s=1.0)), Grant)
    assert len(claims._under_way) == 1
    await gateway.close()
    assert ended.is_set()
    assert not claims._under_way


async def test_an_id_that_could_not_be_claimed_before_is_with_its_job(world: QueueWorld) -> None:
    """What is refused has none; nor is another call made for a job whose id stands for it already."""
    gateway, directory = world.gateway(), RedisRequestDirectory(world.store)
    poor = TenantLimits(tokens_per_minute=1)
    jobs = {name: replace(make_job(name), digest="d", payload="p", unclaimed=True) for name in "ab"}
    with pytest.raises(QuotaExceeded):
        await gateway.enqueue(replace(jobs["a"], limits=poor))
    assert not gateway._claims._under_way
    assert isinstance(await gateway.enqueue(jobs["b"]), Grant)
    await asyncio.gather(*gateway._claims._under_way)
    assert await directory.find("b") == Claim(MODEL, "d")
    await gateway.enqueue(replace(jobs["a"], unclaimed=False))
    assert not gateway._claims._under_way
    assert await directory.find("a") is None


async def test_ids_that_are_claimed_later_take_one_call_at_a_time(
    world: QueueWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a node that is away leave the store's other calls their places."""
    gateway, answers = world.gateway(), asyncio.Event()
    claim, asked = gateway._claims._directory.claim, list[str]()

    async def slow(job_id: str, *rest: Any) -> Claim | None:
        asked.append(job_id)
        await answers.wait()
        return await claim(job_id, *rest)

    monkeypatch.setattr(gateway._claims._directory, "claim", slow)
    for name in "abc":
        await gateway.enqueue(replace(make_job(name), digest="d", payload="p", unclaimed=True))
    await asyncio.sleep(0)
    assert asked == ["a"]
    answers.set()
    await asyncio.gather(*gateway._claims._under_way)
    directory = RedisRequestDirectory(world.store)
    assert [await directory.find(name) for name in "abc"] == [Claim(MODEL, "d")] * 3


@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_a_job_that_redis_has_lost_is_not_said_to_be_followed_by_nobody(
    world: QueueWorld, state: str
) -> None:
    """Not before it is known again and whoever follows it has looked; of a new one that is said at once."""
    gateway, log = world.gateway(), RedisGenerationLog(world.store, "g1")
    job = replace(make_job("a"), digest="d", payload="p")
    grant = await gateway.enqueue(job)
    assert isinstance(grant, Grant)
    assert await log.unattended_s(MODEL, "a") is None
    world.client.flushall()
    await world.set_route()
    with pytest.raises(StoreUnavailable):
        await log.unattended_s(MODEL, "a")
    if state == "running":
        await world.add_worker()
        assert await gateway.register(replace(job, waited_s=1.0), grant)
    else:
        assert isinstance(await gateway.enqueue(replace(job, waited_s=1.0)), Waiting)
    with pytest.raises(StoreUnavailable):
        await log.unattended_s(MODEL, "a")
    world.advance(3)
    assert await log.unattended_s(MODEL, "a") is None
    await log.read(MODEL, "a", 0)
    assert await log.unattended_s(MODEL, "a") is not None
