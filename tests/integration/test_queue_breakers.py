"""Open breakers in the queue: whom they keep from which worker, and the one call that tries it."""

from __future__ import annotations

import pytest

from services.gateway.core.queue_errors import WorkersBarred
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld


async def wait_for_open(
    world: QueueWorld, *job_ids: str, sleep_s: float | None, gateway: str = "g1", slots: int = 1
) -> None:
    """Lets jobs wait for the worker, and opens its breaker for their gateway; it has free slots then."""
    await world.add_worker(slots=slots, draining=True)
    for job_id in job_ids:
        await world.wait(job_id, gateway=gateway)
    await world.gateway(gateway).list_open(MODEL, "w1", sleep_s)
    await world.add_worker(slots=slots)


async def test_an_open_pair_keeps_one_gateways_jobs_from_one_worker(world: QueueWorld) -> None:
    """The same gateway's jobs go to another worker, and another gateway's to this one."""
    await world.add_worker("w2", slots=2)
    await world.gateway("g1").list_open(MODEL, "w1", 5.0)
    assert {(await world.grant(name)).worker_id for name in "ab"} == {"w2"}
    await world.wait("c")
    assert (await world.grant("d", gateway="g2")).worker_id == "w1"


async def test_a_barred_job_holds_up_nobody_behind_it(world: QueueWorld) -> None:
    """Its gateway may not use the free worker; the next jobs' may, of the same tenant or of another."""
    running = await world.grant("running", gateway="g2", tenant="x")
    await world.wait("barred")
    await world.gateway("g1").list_open(MODEL, "w1", 5.0)
    await world.wait("behind", gateway="g2")
    await world.wait("other", gateway="g2", tenant="y")
    await world.finish(running, gateway="g2")
    assert await world.finish_all("g2") == ["behind", "other"]


async def test_after_the_sleep_one_grant_is_a_trial(world: QueueWorld) -> None:
    """It lists the pair as open again in the same step: the second job waits for another sleep."""
    await wait_for_open(world, "a", "b", sleep_s=5.0, slots=4)
    for seconds, expected in ((3.0, []), (2.5, ["a"]), (3.0, ["a"]), (2.5, ["a", "b"])):
        world.advance(seconds)
        await world.gateway().renew(MODEL, {}, frozenset())
        renewal = await world.gateway().renew(MODEL, {}, frozenset("ab"))
        granted = sorted(renewal.granted, key=lambda grant: grant.job_id)
        assert [grant.job_id for grant in granted] == expected
        assert all(grant.trial for grant in granted)


async def test_a_closed_pair_is_granted_at_once(world: QueueWorld) -> None:
    """Closing lends the slot to what waits, without a trial."""
    await wait_for_open(world, "a", sleep_s=5.0)
    assert world.received["g1"] == []
    await world.gateway().list_closed(MODEL, "w1")
    (grant,) = world.received["g1"]
    assert not grant.trial
    assert not world.client.exists(KEYS.prefix + "opened", KEYS.prefix + "open:w1")


async def test_a_forced_pair_stays_open(world: QueueWorld) -> None:
    """No sleep ends it, and no new process of the worker."""
    await wait_for_open(world, "a", sleep_s=None)
    world.advance(3)
    await world.add_worker(incarnation="i2")
    await world.gateway().reap(MODEL)
    assert world.received["g1"] == []


@pytest.mark.parametrize("is_removed_first", [True, False])
async def test_a_new_process_starts_closed(world: QueueWorld, *, is_removed_first: bool) -> None:
    """A worker that comes back as another incarnation has done no harm yet."""
    await wait_for_open(world, "a", sleep_s=5.0)
    if is_removed_first:
        await world.routes.remove_worker(MODEL, "w1", 1)
    await world.add_worker(incarnation="i2")
    await world.gateway().reap(MODEL)
    (grant,) = world.received["g1"]
    assert not grant.trial


@pytest.mark.parametrize("is_late", [False, True])
async def test_breakers_of_a_worker_that_has_left_are_forgotten(world: QueueWorld, *, is_late: bool) -> None:
    """With its record, or by the next round where a gateway learned of its end later; grants look no more."""
    gateway = world.gateway()
    if not is_late:
        await gateway.list_open(MODEL, "w1", 5.0)
    await world.routes.remove_worker(MODEL, "w1", 1)
    if is_late:
        await gateway.list_open(MODEL, "w1", 5.0)
        await gateway.reap(MODEL)
    assert not world.client.exists(KEYS.prefix + "opened", KEYS.prefix + "open:w1")


async def test_what_was_forced_outlasts_the_worker(world: QueueWorld) -> None:
    """Who forced it meant whatever comes back by that name."""
    await world.gateway().list_open(MODEL, "w1", None)
    await world.routes.remove_worker(MODEL, "w1", 1)
    await world.gateway().reap(MODEL)
    await world.add_worker(incarnation="i2")
    with pytest.raises(WorkersBarred):
        await world.wait("a")


async def test_the_trial_of_another_gateways_call_is_flagged_in_the_message(world: QueueWorld) -> None:
    """Whoever makes the grant, its owner learns that it is a trial."""
    await wait_for_open(world, "a", gateway="g2", sleep_s=1.0)
    world.advance(2)
    await world.gateway("g1").reap(MODEL)
    (grant,) = (await world.gateway("g2").renew(MODEL, {}, frozenset("a"))).granted
    assert grant.trial


async def test_breakers_of_a_gateway_that_is_gone_are_forgotten(world: QueueWorld) -> None:
    """A minute after its last call nothing of it is listed any more."""
    await world.gateway("gone").list_open(MODEL, "w1", None)
    world.advance(61)
    await world.gateway().reap(MODEL)
    assert not world.client.exists(KEYS.prefix + "opened", KEYS.prefix + "open:w1")
