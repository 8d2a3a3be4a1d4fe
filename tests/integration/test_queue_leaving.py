"""What the queue does with the resumable jobs of gateways that leave, and who gets those of vanished ones."""

from __future__ import annotations

from dataclasses import replace

from services.gateway.core.jobs import Grant, QueuedJob, Renewal
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job


def resumable(name: str) -> QueuedJob:
    """A job that another gateway could carry on."""
    return replace(make_job(name), digest="d", payload="p")


async def renew(world: QueueWorld, gateway: str, *, leaving: bool = False) -> Renewal:
    """The second's renewal of a gateway that knows of nothing."""
    return await world.gateway(gateway).renew(MODEL, {}, frozenset(), leaving=leaving)


def owner(world: QueueWorld, job_id: str) -> str | None:
    """Whose a job is."""
    return str(world.client.hget(KEYS.job(job_id), "owner"))


async def test_a_renewal_grants_the_job_of_a_vanished_gateway_and_take_up_tells_the_same(
    world: QueueWorld,
) -> None:
    """Met at the head of the line, before anybody has reaped: it is not among the unknown ones."""
    await world.add_worker(draining=True)
    await world.gateway("dead").enqueue(resumable("a"))
    world.advance(6)
    await world.add_worker()
    renewal = await renew(world, "g1")
    (grant,) = renewal.granted
    assert (grant.job_id, renewal.unknown) == ("a", frozenset())
    taken = await world.gateway("g1").take_up(MODEL, "a")
    assert taken is not None
    assert taken.grant == grant
    audit(world.client)


async def test_who_leaves_is_handed_nothing_until_it_is_back(world: QueueWorld) -> None:
    """Though it was heard of last; and what came to it before it hands on."""
    answer = await world.gateway("g1").enqueue(resumable("a"))
    assert isinstance(answer, Grant)
    await renew(world, "stays")
    await renew(world, "leaves", leaving=True)
    assert await world.gateway("g1").release(MODEL, "a", resumable("a").submission)
    assert owner(world, "a") == "stays"
    await renew(world, "leaves")
    assert await world.gateway("stays").release(MODEL, "a", "")
    assert owner(world, "a") == "leaves"
    audit(world.client)


async def test_nothing_is_handed_on_where_nobody_stays_or_it_is_not_the_callers(world: QueueWorld) -> None:
    """The job stays as it is, slot and submission included."""
    answer = await world.gateway("g1").enqueue(resumable("a"))
    assert isinstance(answer, Grant)
    before = world.client.hgetall(KEYS.job("a"))
    await renew(world, "g2", leaving=True)
    assert not await world.gateway("g1").release(MODEL, "a", "")
    await renew(world, "g3")
    assert not await world.gateway("g2").release(MODEL, "a", "")
    assert not await world.gateway("g1").release(MODEL, "a", "another")
    assert world.client.hgetall(KEYS.job("a")) == before
    audit(world.client)


async def test_a_gateway_that_leaves_reaps_for_one_that_stays(world: QueueWorld) -> None:
    """Running or waiting; with nobody else there the jobs are its own, until one has come."""
    await world.gateway("dead").enqueue(resumable("a"))
    await world.gateway("dead").enqueue(resumable("b"))
    await world.gateway("dead").enqueue(make_job("plain"))
    world.advance(3)
    await renew(world, "leaves", leaving=True)
    world.advance(3)
    assert await world.gateway("leaves").reap(MODEL) == ("a", "b")
    world.advance(6)
    await renew(world, "stays")
    await renew(world, "leaves", leaving=True)
    assert (owner(world, "a"), owner(world, "b")) == ("stays", "stays")
    taken = await world.gateway("stays").take_up(MODEL, "a")
    assert taken is not None
    assert taken.grant is not None
    assert world.client.hget(KEYS.job("plain"), "state") == "failed"
    audit(world.client)
