"""Jobs that have waited long: which of them count one band higher, and what they do not overtake."""

from __future__ import annotations

from services.gateway.core.jobs import Band
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld


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
