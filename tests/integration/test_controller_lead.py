"""The lead in a real Redis: who gets it, who keeps it, and what the others may no longer write."""

from __future__ import annotations

import asyncio

import pytest

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore
from services.controller.adapters.redis_lead import RedisLead
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.ports import FenceStale
from services.controller.core.records import Standing
from tests.fakes.controller_process import lead_in

pytestmark = pytest.mark.usefixtures("redis_server")

ANYTHING = {"may_found": True, "may_replace": True}
NOTHING = {"may_found": False, "may_replace": False}


async def test_one_leads(redis_store: RedisStore) -> None:
    """The first gets it; another one learns who leads, whatever it claims; the first may ask again."""
    a, b = lead_in(redis_store, "a"), lead_in(redis_store, "b")
    assert await a.take(**ANYTHING) == Standing(1, "a")
    assert await b.take(**ANYTHING) == Standing(0, "a")
    assert await a.take(**NOTHING) == Standing(2, "a")


async def test_none_is_founded_without_leave(redis_store: RedisStore) -> None:
    """A store that knows of no lease may have forgotten it."""
    assert await lead_in(redis_store).take(may_found=False, may_replace=True) == Standing(0, "")


async def test_an_earlier_process_is_replaced_only_where_asked(redis_store: RedisStore) -> None:
    """Its id is ours, its incarnation is not."""
    await lead_in(redis_store, "a").take(**ANYTHING)
    later = lead_in(redis_store, "a")
    assert await later.take(**NOTHING) == Standing(0, "a")
    assert await later.take(may_found=False, may_replace=True) == Standing(2, "a")


async def test_the_number_is_above_what_was_written(redis_store: RedisStore) -> None:
    """Also by a controller that knew nothing of leases."""
    await RedisRouteStore(redis_store).write_route("m", 1, 41, {"r": 100})
    assert (await lead_in(redis_store).take(**ANYTHING)).fence == 42


async def test_who_is_left_behind_writes_nothing(redis_store: RedisStore) -> None:
    """From the grant on, before the next leader has written a thing."""
    a, b, routes = lead_in(redis_store, "a"), lead_in(redis_store, "b"), RedisRouteStore(redis_store)
    fence = (await a.take(**ANYTHING)).fence
    await routes.write_route("m", 1, fence, {"r": 100})
    await a.leave()
    assert await b.take(**NOTHING) == Standing(fence + 1, "b")
    with pytest.raises(FenceStale):
        await routes.write_route("m", 2, fence, {"other": 100})
    with pytest.raises(FenceStale):
        await routes.remove_worker("m", "w", fence)
    with pytest.raises(FenceStale):
        await a.keep(fence + 7)
    await a.leave()
    assert await a.take(**NOTHING) == Standing(0, "b")


async def test_a_lease_that_nobody_took_goes_on(redis_store: RedisStore) -> None:
    """It ended by its time or by a goodbye; its owner may renew it, with a higher number or the same."""
    a = lead_in(redis_store, "a")
    fence = (await a.take(**ANYTHING)).fence
    await a.leave()
    await a.keep(fence + 5)
    with pytest.raises(FenceStale):
        await a.keep(fence)
    assert await lead_in(redis_store, "b").take(**ANYTHING) == Standing(0, "a")
    assert (await redis_store.fetch("HGET", ModelKeys("m").prefix + "lead", "fence")) == str(fence + 5)


async def test_a_forgotten_lease_is_founded_again_by_its_owner(redis_store: RedisStore) -> None:
    """Redis came back empty: the leader is sooner than who must wait."""
    a, b = lead_in(redis_store, "a"), lead_in(redis_store, "b")
    await a.take(**ANYTHING)
    await redis_store.fetch("FLUSHALL")
    assert await b.take(**NOTHING) == Standing(0, "")
    await a.keep(9)
    assert await b.take(**ANYTHING) == Standing(0, "a")


async def test_a_lease_ends(redis_store: RedisStore) -> None:
    """By the clock inside Redis, which runs while anybody looks."""
    a = RedisLead(redis_store, "m", "a", "1", ttl_s=0.3)
    b = RedisLead(redis_store, "m", "b", "2", ttl_s=0.3)
    await a.take(**ANYTHING)
    async with asyncio.timeout(10):
        while not (await b.take(**NOTHING)).fence:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.05)
    with pytest.raises(FenceStale):
        await a.keep(1)
