"""Jobs that have waited long: which of them count one band higher, and what they do not overtake."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.gateway.core.jobs import Band
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import audit, left_over
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job


async def test_a_job_that_waited_long_counts_one_band_higher(world: QueueWorld) -> None:
    """Old BATCH goes before new INTERACTIVE of a tenant that was served more, and never before SYSTEM."""
    running = await world.grant("running", tenant="i")
    await world.wait("batch", tenant="b", band=Band.BATCH)
    world.advance(31)
    for number in range(3):
        await world.wait(f"i{number}", tenant="i")
    await world.wait("system", tenant="s", band=Band.SYSTEM)
    await world.finish(running, used=100)
    assert (await world.finish_all())[:2] == ["system", "batch"]


async def test_an_aged_backlog_is_not_before_what_its_tenant_asks_for_now(world: QueueWorld) -> None:
    """One aged job goes before the tenant's chat, which came later; the other ones come behind it."""
    running = await world.grant("running")
    for number in range(6):
        await world.wait(f"b{number}", band=Band.BATCH)
    world.advance(31)
    await world.gateway().reap(MODEL)
    assert (await world.wait("chat")).position == 1
    await world.finish(running)
    assert await world.finish_all() == ["b0", "chat", "b1", "b2", "b3", "b4", "b5"]


async def test_aged_jobs_keep_the_turn_of_their_band_and_their_order(world: QueueWorld) -> None:
    """Behind SYSTEM work INTERACTIVE has each eighth grant and BATCH another one; the oldest goes first."""
    running = await world.grant("running", tenant="s")
    for number in range(6):
        await world.wait(f"b{number}", tenant="b", band=Band.BATCH)
        world.advance(12)
    for number in range(20):
        await world.wait(f"s{number}", tenant="s", band=Band.SYSTEM)
        await world.wait(f"i{number}", tenant=f"i{number % 4}")
    await world.finish(running)
    order = await world.finish_all()
    # The running job was the first grant; the fourth is the first turn of INTERACTIVE.
    assert "".join(name[0] for name in order[:23]) == "ssb" + "sssb" + "sssi" + "sssb" + "sssi" + "sssb"
    assert [name for name in order if name.startswith("b")] == [f"b{number}" for number in range(6)]


@pytest.mark.parametrize("behind", [0, 1])
async def test_an_aged_job_keeps_the_turn_of_its_band_whatever_is_behind_it(
    world: QueueWorld, behind: int
) -> None:
    """In INTERACTIVE its tenant, which runs a large request, comes behind the backlogs of all others."""
    await world.add_worker("w2")
    large = await world.grant("large", tenant="a", cost=8_000)
    running = await world.grant("running")
    for number in range(1 + behind):
        await world.wait(f"b{number}", tenant="a", band=Band.BATCH)
    for number in range(24):
        await world.wait(f"i{number}", tenant=f"t{number % 8}", cost=10)
    world.advance(31)
    await world.gateway().reap(MODEL)
    audit(world.client)
    await world.finish(running)
    assert (await world.finish_all()).index("b0") < 8
    await world.finish(large)
    assert left_over(world.client) == set()


async def test_aged_jobs_have_the_turn_of_their_band_as_their_tenants_were_served(world: QueueWorld) -> None:
    """Neither a tenant that has more in line there nor one that has no more goes first for it."""
    running = await world.grant("b0", tenant="b", band=Band.BATCH, cost=500)
    for number in range(30):
        await world.wait(f"i{number}", tenant="i")
    for name in ("b1", "a1", "a2", "a3", "a4", "c1"):
        await world.wait(name, tenant=name[0], band=Band.BATCH)
    world.advance(31)
    await world.finish(running, used=500)
    order = []
    while world.received["g1"]:
        grant = world.received["g1"].pop(0)
        order.append(grant.job_id)
        await world.finish(grant, used=0 if grant.job_id.startswith("i") else 100)
    assert order[6::8] == ["a1", "c1", "a2", "a3"]


async def test_an_aged_job_waits_for_the_cap_of_its_tenant_in_the_turn_of_its_band_too(
    world: QueueWorld,
) -> None:
    """It comes back into that turn when a job of its tenant has ended."""
    await world.add_worker("w2")
    limits = TenantLimits(concurrency=2)
    large = await world.grant("large", tenant="a", cost=8_000, limits=limits)
    running = await world.grant("running")
    await world.wait("b", tenant="a", band=Band.BATCH, limits=limits)
    for number in range(16):
        await world.wait(f"i{number}", cost=10)
    world.advance(31)
    await world.gateway().reap(MODEL)
    other = replace(large, job_id="other", nonce="other")
    assert await world.gateway().register(make_job("other", tenant="a", limits=limits), other)
    audit(world.client)
    await world.finish(running)
    for _ in range(8):
        await world.finish(world.received["g1"].pop(0))
    assert "b" not in world.running("w1") | world.running("w2")
    await world.finish(other)
    audit(world.client)
    assert (await world.finish_all()).index("b") < 8
    await world.finish(large)


async def test_what_a_gateway_of_an_earlier_version_leaves_of_an_aged_job_is_dropped(
    world: QueueWorld,
) -> None:
    """It knows nothing of the seat that such a job has in the turn of BATCH."""
    running = await world.grant("running", tenant="a")
    await world.wait("b", tenant="a", band=Band.BATCH)
    world.advance(31)
    await world.gateway().reap(MODEL)
    (seat,) = world.client.zrange(KEYS.prefix + "tenants:lifted", 0, -1)
    lifted = world.client.hget(KEYS.prefix + "tenant:a", "lifted")
    await world.gateway().cancel(MODEL, "b", "submission-of-b")
    world.client.zadd(KEYS.prefix + "tenants:lifted", {str(seat): 0.0})
    world.client.hset(KEYS.prefix + "tenant:a", "lifted", str(lifted))
    for number in range(10):
        await world.wait(f"i{number}", tenant="a")
    await world.finish(running)
    assert await world.finish_all() == [f"i{number}" for number in range(10)]
    assert left_over(world.client) == set()


async def test_an_aged_job_that_comes_back_is_not_before_what_its_tenant_asks_for_now(
    world: QueueWorld,
) -> None:
    """Its worker failed, and the next one has been lifted in its stead."""
    running = await world.grant("running")
    for number in range(3):
        await world.wait(f"b{number}", band=Band.BATCH)
    world.advance(31)
    await world.finish(running)
    (lost,) = world.received["g1"]
    world.received["g1"].clear()
    await world.gateway().reap(MODEL)
    await world.gateway().requeue(MODEL, lost.job_id, lost.nonce)
    await world.wait("chat")
    audit(world.client)
    world.advance(1)
    await world.gateway().reap(MODEL)
    assert (lost.job_id, await world.finish_all()) == ("b0", ["b1", "chat", "b0", "b2"])


async def test_what_a_gateway_of_an_earlier_version_will_lift_is_there(world: QueueWorld) -> None:
    """It takes what it has listed for waiting jobs; whoever ends or lifts one takes it from the list."""
    running = await world.grant("running")
    for name in ("a", "b"):
        await world.wait(name, band=Band.BATCH)
        world.client.zadd(KEYS.prefix + "aging:1", {name: 0.0})
    await world.gateway().cancel(MODEL, "a", "submission-of-a")
    assert world.client.zrange(KEYS.prefix + "aging:1", 0, -1) == ["b"]
    world.advance(31)
    await world.finish(running)
    assert not world.client.exists(KEYS.prefix + "aging:1")


async def test_a_backlog_earns_nothing_by_its_age(world: QueueWorld) -> None:
    """Whoever floods a band has the oldest jobs there; who was served least goes first all the same."""
    running = await world.grant("a0", tenant="a")
    for number in range(1, 5):
        await world.wait(f"a{number}", tenant="a")
    world.advance(120)
    for number in range(2):
        await world.wait(f"b{number}", tenant="b")
    await world.finish(running, used=100)
    assert (await world.finish_all(used=100))[:3] == ["b0", "a1", "b1"]
