"""Jobs of several slots: who is kept from which worker for them, and who goes before them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.gateway.core.jobs import Band, Grant, Waiting
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job


async def test_a_job_of_several_slots_waits_until_one_worker_has_them(world: QueueWorld) -> None:
    """Slots of two workers do not add up; what is free meanwhile is kept for it, and goes on behind it."""
    await world.add_worker("w1", slots=2)
    await world.add_worker("w2", slots=2)
    first, second = await world.grant("a"), await world.grant("b")
    assert {first.worker_id, second.worker_id} == {"w1", "w2"}
    await world.wait("pair", slots=2)
    await world.wait("small")
    await world.finish(first)
    assert [(one.job_id, one.worker_id) for one in world.received["g1"]] == [
        ("pair", first.worker_id),
        ("small", second.worker_id),
    ]
    assert world.running(first.worker_id) == {"pair", "pair#2"}
    await world.finish(world.received["g1"][0])
    assert world.running(first.worker_id) == set()


async def test_a_pinned_job_of_several_slots_keeps_those_of_its_revision(empty_world: QueueWorld) -> None:
    """What comes later goes to other revisions' workers, or waits, rather than take the slots one by one."""
    world = empty_world
    await world.set_route(r1=1, r2=1)
    await world.add_worker("w1", slots=3, ready=("r1",))
    await world.add_worker("w2", slots=1, ready=("r2",))
    pair = await world.grant("pair", slots=2)
    beside = await world.grant("beside")
    while beside.worker_id != "w1":
        await world.finish(beside)
        beside = await world.grant("beside" + beside.job_id)
    assert pair.worker_id == "w1", "the other one has too few slots for it"
    await world.gateway().requeue(MODEL, "pair", pair.nonce, pin=pair.revision)
    await world.add_worker("w1", slots=2, ready=("r1",))
    world.advance(1.0)
    assert (await world.grant("elsewhere")).worker_id == "w2"
    await world.wait("later")
    await world.finish(beside)
    assert [one.job_id for one in world.received["g1"]] == ["pair"]


async def test_a_job_larger_than_every_worker_is_given_a_whole_one(world: QueueWorld) -> None:
    """Waiting would not help it: the worker says so. It is not given one that others use."""
    await world.add_worker("w1", slots=2)
    small = await world.grant("small")
    await world.wait("huge", slots=4)
    await world.finish(small)
    (grant,) = world.received["g1"]
    assert grant.job_id == "huge"
    assert len(world.running("w1")) == 4


async def test_the_time_of_several_slots_is_counted_for_each(world: QueueWorld) -> None:
    """Four slots for ten seconds are forty seconds of slots: later estimates do not take them for ten."""
    await world.add_worker("w1", slots=4)
    grant = await world.grant("quad", slots=4, cost=400)
    for _ in range(10):
        world.advance(1.0)
    await world.finish(grant)
    await world.grant("quad-2", slots=4, cost=400)
    place = await world.wait("next", cost=100)
    assert place.estimated_wait_s == pytest.approx(10.0, rel=0.1)


@pytest.fixture
async def unequal(empty_world: QueueWorld) -> QueueWorld:
    """A worker of four slots, and two of two, which come after it in the alphabet."""
    await empty_world.set_route()
    for name, slots in (("big", 4), ("s1", 2), ("s2", 2)):
        await empty_world.add_worker(name, slots=slots)
    return empty_world


async def fill(world: QueueWorld, *workers: str) -> dict[str, list[Grant]]:
    """Takes every slot, and returns the grants of these workers."""
    grants = [await world.grant(f"first-{number}", tenant="x") for number in range(8)]
    return {name: [grant for grant in grants if grant.worker_id == name] for name in workers}


@pytest.mark.parametrize("barrier", ["busy", "open", "suspect"])
async def test_workers_too_small_for_a_job_go_to_those_behind_it(unequal: QueueWorld, barrier: str) -> None:
    """Of its own tenant and of others; what is free of the large one, which runs one long answer, is kept."""
    world = unequal
    long = await world.grant("long")
    if barrier == "open":
        await world.gateway().list_open(MODEL, "big", None)
    elif barrier == "suspect":
        await world.gateway().requeue(MODEL, "long", long.nonce)
        (long,) = world.received["g1"]
    await world.wait("quad", slots=4)
    tenants = ("tenant", "other", "tenant", "third")[: 3 if barrier == "suspect" else 4]
    grants = [await world.grant(f"small-{number}", tenant=name) for number, name in enumerate(tenants)]
    assert {grant.worker_id for grant in grants} == {"s1", "s2"}
    await world.wait("small", tenant="other")
    audit(world.client)
    world.received["g1"].clear()
    if barrier == "open":
        await world.finish(long)
        await world.gateway().list_closed(MODEL, "big")
    elif barrier == "suspect":
        world.advance(1.0)
        await world.gateway().reap(MODEL)
    else:
        await world.finish(long)
    assert [(grant.job_id, grant.worker_id) for grant in world.received["g1"]] == [("quad", "big")]
    assert not world.client.exists(KEYS.prefix + "due")


async def test_those_that_pass_a_job_do_not_put_it_off(unequal: QueueWorld) -> None:
    """They are charged to its tenant, so that the other's turn comes; but its own had come before."""
    world = unequal
    running = await fill(world, "big", "s1")
    await world.wait("quad", tenant="a", slots=4)
    for name, tenant in (("behind", "a"), ("other-1", "b"), ("other-2", "b"), ("pair", "b")):
        await world.wait(name, tenant=tenant, slots=2 if name == "pair" else 1)
    await world.finish(running["s1"][0])
    for grant in running["big"][:-1]:
        await world.finish(grant)
        audit(world.client)
    assert [(grant.job_id, grant.worker_id) for grant in world.received["g1"]] == [("behind", "s1")]
    await world.finish(running["big"][-1])
    assert [(grant.job_id, grant.worker_id) for grant in world.received["g1"][1:]] == [("quad", "big")]
    await world.finish(world.received["g1"][1])
    assert [grant.job_id for grant in world.received["g1"][2:]] == ["other-1", "other-2", "pair"]


async def test_a_job_that_ends_while_it_is_due_is_in_nobodys_way(unequal: QueueWorld) -> None:
    """The slots that were kept for it go to the others, and the next one that needs several is due."""
    world = unequal
    running = await fill(world, "big", "s1")
    await world.wait("quad", slots=4)
    await world.wait("quad-2", slots=4)
    await world.finish(running["big"][0])
    # Who waits behind it has lost nothing yet.
    assert not world.client.exists(KEYS.prefix + "due")
    await world.finish(running["s1"][0])
    assert world.client.get(KEYS.prefix + "due") == "quad"
    await world.gateway().cancel(MODEL, "quad", "submission-of-quad")
    assert world.client.get(KEYS.prefix + "due") == "quad-2"
    await world.gateway().cancel(MODEL, "quad-2", "submission-of-quad-2")
    grants = [await world.grant(f"small-{number}") for number in range(2)]
    assert {grant.worker_id for grant in grants} == {"big", "s1"}


async def test_a_tenant_at_its_cap_has_no_turn_for_what_is_due(unequal: QueueWorld) -> None:
    """What passed the job counts; as it ends, the job is the next."""
    world, one = unequal, TenantLimits(concurrency=1)
    long = await world.grant("long", tenant="x")
    await world.wait("quad", tenant="a", slots=4, limits=one)
    passed = await world.grant("passed", tenant="a", limits=one)
    await world.finish(long)
    assert world.received["g1"] == []
    await world.finish(passed)
    assert [grant.job_id for grant in world.received["g1"]] == ["quad"]


async def test_a_line_of_large_jobs_hides_no_other_tenant(unequal: QueueWorld) -> None:
    """However many of them wait before the small ones, these are found."""
    await unequal.grant("long", tenant="x")
    for number in range(40):
        await unequal.wait(f"quad-{number}", tenant="a", slots=4)
    assert (await unequal.grant("small", tenant="b")).worker_id == "s1"


async def test_a_pinned_job_of_several_slots_leaves_small_workers_to_those_behind_it(
    unequal: QueueWorld,
) -> None:
    """They are pinned as well, and of its revision."""
    await unequal.grant("long")
    gateway = unequal.gateway()
    quad, small = make_job("quad", slots=4), make_job("small")
    assert isinstance(await gateway.enqueue(replace(quad, pin="r1")), Waiting)
    answer = await gateway.enqueue(replace(small, pin="r1"))
    assert isinstance(answer, Grant)
    assert answer.worker_id == "s1"


async def test_a_worker_whose_lease_lapsed_is_not_waited_for(empty_world: QueueWorld) -> None:
    """The largest that is there refuses the job and says why, which would wait until its deadline else."""
    await empty_world.set_route()
    await empty_world.add_worker("big", slots=4, lease_ttl_s=5.0)
    await empty_world.add_worker("s1", slots=2)
    empty_world.advance(6)
    assert (await empty_world.grant("quad", slots=4)).worker_id == "s1"


@pytest.mark.parametrize("stale", ["first", "nobody"])
async def test_a_name_that_is_due_and_waits_no_more_is_dropped(world: QueueWorld, stale: str) -> None:
    """A gateway of an earlier version leaves it: the job is not granted twice, and nobody waits for it."""
    await world.add_worker("w1", slots=5)
    await world.grant("first", slots=2)
    world.client.set(KEYS.prefix + "due", stale)
    assert (await world.grant("second")).job_id == "second"
    assert not world.client.exists(KEYS.prefix + "due")
    assert world.running("w1") == {"first", "first#2", "second"}


async def test_where_all_workers_are_large_enough_the_bands_go_before_it(world: QueueWorld) -> None:
    """Nobody is given what it could have had, so that nothing has to make up for that."""
    for name in ("w1", "w2"):
        await world.add_worker(name, slots=2)
    grants = [await world.grant(f"first-{number}") for number in range(4)]
    await world.wait("pair", slots=2, band=Band.BATCH)
    for name in ("w1", "w2"):
        await world.finish(next(grant for grant in grants if grant.worker_id == name))
    for number in range(2):
        assert (await world.grant(f"system-{number}", band=Band.SYSTEM)).job_id == f"system-{number}"
