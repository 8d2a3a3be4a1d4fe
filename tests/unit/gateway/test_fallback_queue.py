"""A queue with a fallback: nobody waits for a store that is gone, and it learns the truth when it is back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from services.common.errors import QueueFull, StoreUnavailable
from services.gateway.core.breaker import State
from services.gateway.core.jobs import Band, Outcome, QueuedJob, Waiting
from services.gateway.core.queue_errors import WorkersBarred
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.fallback_world import MODEL, World, job


@pytest.fixture
def world() -> World:
    """A world in which all is well."""
    return World()


async def test_while_the_store_answers_nothing_is_degraded(world: World) -> None:
    """Grants are the store's own; the book is empty once all has ended."""
    grant = await world.granted("a")
    assert not grant.degraded
    await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10)
    await world.queue.enqueue(job("b"))
    await world.queue.cancel(MODEL, "b", "s-b")
    assert not tuple(world.queue._book)
    assert world.at_store() == {}


async def test_a_new_job_is_served_at_once_when_the_store_is_gone(world: World) -> None:
    """The very call that finds it out is answered with a degraded grant; the store is not asked again."""
    world.store.down = True
    grant = await world.granted("a")
    assert grant.degraded
    assert world.circuit.breaker.state is State.OPEN
    world.store.down = False
    assert isinstance(await world.queue.enqueue(job("b")), Waiting)
    assert world.at_store() == {}


async def test_its_own_queue_is_bounded_and_lends_its_share(world: World) -> None:
    """Of two slots that two gateways share it lends one; three jobs wait, and the next is refused."""
    world.store.down = True
    await world.granted("a")
    for name in "bcd":
        assert isinstance(await world.queue.enqueue(job(name)), Waiting)
    with pytest.raises(QueueFull):
        await world.queue.enqueue(job("e"))
    assert len(tuple(world.queue._book)) == 4


@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
async def test_its_own_queue_lends_by_the_route_that_the_controller_told_last(
    world: World, *, late: bool
) -> None:
    """The controller reaches it though the store does not; workers refuse grants of an old epoch."""
    world.store.down = True
    if late:
        grant = await world.granted("a")
        assert grant.epoch == 1
        await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 1)
    world.activated[MODEL] = ("r1", 5)
    assert (await world.granted("b")).epoch == 5


async def test_its_own_queue_lends_nothing_of_a_revision_that_was_replaced(world: World) -> None:
    """A gateway that is cut off from the store alone follows the switch that the controller told it of."""
    world.store.down = True
    world.activated[MODEL] = ("r2", 5)
    assert isinstance(await world.queue.enqueue(job("a")), Waiting)


async def test_a_hold_of_its_own_queue_ends_by_itself(world: World) -> None:
    """The job that was refused is granted when the hold is over, though nobody calls."""
    world.store.down = True
    grant = await world.granted("a")
    world.heard.clear()
    await world.queue.refused(MODEL, "a", grant.nonce, hold_s=0.02)
    assert world.heard == []
    world.clock.turn(0.02)
    async with asyncio.timeout(5):
        while not world.heard:  # noqa: ASYNC110 - the queue tells a list
            await asyncio.sleep(0.005)
    assert world.heard[0].job_id == "a"


async def test_running_jobs_keep_their_slots_and_waiting_ones_their_turn(world: World) -> None:
    """Two run and one waits as the store goes: the slots are not lent twice, and the third gets the first."""
    first, second = await world.granted("a"), await world.granted("b")
    await world.queue.enqueue(job("c"))
    world.store.down = True
    renewal = await world.queue.renew(MODEL, {"a": first.nonce, "b": second.nonce}, frozenset("c"))
    assert (renewal.lost, list(renewal.waiting)) == (frozenset(), ["c"])
    renewal = await world.queue.renew(MODEL, {"a": first.nonce}, frozenset("c"), places=frozenset())
    assert (renewal.lost, renewal.waiting, renewal.degraded) == (frozenset(), {}, True)
    await world.queue.settle(MODEL, "a", first.nonce, Outcome.FINISHED, 10)
    assert not world.heard
    await world.queue.settle(MODEL, "b", second.nonce, Outcome.FINISHED, 10)
    (grant,) = world.heard
    assert (grant.job_id, grant.degraded) == ("c", True)


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "as-it-was"])
async def test_the_store_learns_the_truth_when_it_is_back(world: World, empty: bool) -> None:  # noqa: FBT001 - a parameter of the table
    """One job ran before, one began meanwhile, one waits, one ended: it knows the others."""
    before = await world.granted("a")
    ended = await world.granted("e")
    world.store.down = True
    await world.queue.settle(MODEL, "e", ended.nonce, Outcome.FINISHED, 10)
    await world.queue.requeue(MODEL, "a", before.nonce, pin=before.revision)
    world.clock.turn(0.8)
    during = next((grant for grant in world.heard if grant.job_id == "a"), None)
    during = during or (await world.queue.renew(MODEL, {}, frozenset("a"))).granted[0]
    assert during.degraded
    await world.queue.enqueue(job("w"))
    await world.come_back(empty=empty)
    renewal = await world.queue.renew(MODEL, {"a": during.nonce}, frozenset("w"))
    assert not world.queue.degraded
    assert (renewal.lost, renewal.degraded) == (frozenset(), False)
    known = world.at_store()
    assert known["a"] == during.nonce
    assert set(known) == {"a", "w"}
    # The store has a second slot: what waited here runs there now.
    assert known["w"] == world.heard[-1].nonce
    assert not world.heard[-1].degraded


@pytest.mark.parametrize("back", [False, True], ids=["ends-meanwhile", "ends-after"])
async def test_what_was_produced_before_a_loss_is_charged_at_the_store(world: World, *, back: bool) -> None:
    """The worker is lost while the store is gone, and so is the job's end, or it comes after the return."""
    before = await world.granted("a")
    world.store.down = True
    await world.queue.requeue(MODEL, "a", before.nonce, pin=before.revision, used_tokens=7)
    if not back:
        await world.queue.cancel(MODEL, "a", "s-a", used_tokens=7)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset("a"))
    if back:
        await world.queue.cancel(MODEL, "a", "s-a")
    assert world.at_store() == {}
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 7


async def test_a_call_whose_answer_was_lost_is_undone(world: World) -> None:
    """The store granted a slot that nobody heard of; the job runs there once, under its own grant."""
    world.store.loses_answers = True
    grant = await world.granted("a")
    assert grant.degraded
    assert world.at_store()["a"] != grant.nonce
    await world.come_back(empty=False)
    renewal = await world.queue.renew(MODEL, {"a": grant.nonce}, frozenset())
    assert renewal.lost == frozenset()
    assert world.at_store() == {"a": grant.nonce}
    await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10)
    assert world.at_store() == {}


async def test_it_comes_back_by_itself_and_not_before_the_sleep_is_over(world: World) -> None:
    """A renewal at once does not ask; one after the sleep does; one that is still gone is left alone."""
    world.store.down = True
    await world.granted("a")
    world.store.down = False
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.queue.degraded
    world.store.down = True
    world.clock.turn(1)
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.queue.degraded
    await world.come_back(empty=True)
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded


async def test_without_knowledge_there_is_no_fallback(world: World) -> None:
    """A gateway that never saw a worker of a model refuses, as it cannot lend anything."""
    world.store.down = True
    other = QueuedJob("a", "other", "alice", Band.INTERACTIVE, 10, 60.0, "s")
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await world.queue.enqueue(other)
    assert not tuple(world.queue._book)


async def test_who_is_refused_without_the_store_learns_when_to_ask_again(world: World) -> None:
    """By the call that finds out that the store is not asked, and by each one after it."""
    world.circuit.force(State.FORCED_OPEN)
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as refused:
            await world.queue.length("other")
        assert refused.value.retry_after_s == 1.0


async def steps_of(work: Awaitable[object]) -> int:
    """How many functions are called until something is done: its cost, whatever else the machine does."""
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        await work
    finally:
        sys.setprofile(None)
    return steps


async def steps_with_a_full_queue(waiting: int) -> dict[str, int]:
    """What it costs to lose the store while so many jobs of ten tenants wait, and to go on without it."""
    world, limits = World(), TenantLimits(concurrency=1)
    running = [await world.granted(name) for name in "xy"]
    names = [f"j{number}" for number in range(waiting)]
    for number, name in enumerate(names):
        band = list(Band)[number % 3]
        one = replace(job(name), tenant=f"t{number % 10}", band=band, waited_s=1.0, limits=limits)
        assert isinstance(await world.queue.enqueue(one), Waiting)
    world.store.down = True
    fences = {grant.job_id: grant.nonce for grant in running}
    first = running[0]
    return {
        "retreat": await steps_of(world.queue.renew(MODEL, fences, frozenset(names))),
        "renewal": await steps_of(world.queue.renew(MODEL, fences, frozenset(names))),
        "enqueue": await steps_of(world.queue.enqueue(replace(job("late"), waited_s=1.0))),
        "settle": await steps_of(world.queue.settle(MODEL, "x", first.nonce, Outcome.FINISHED, 10)),
    }


async def test_a_full_queue_does_not_hold_the_loop_when_the_store_goes() -> None:
    """Ten times the jobs cost about ten times as much to move and to renew, and one more is taken at once."""
    few, many = await steps_with_a_full_queue(100), await steps_with_a_full_queue(1_000)
    assert many["retreat"] < 20 * few["retreat"]
    assert many["renewal"] < 20 * few["renewal"]
    assert many["enqueue"] < 3 * few["enqueue"]
    assert many["settle"] < 3 * few["settle"]


async def test_a_refusal_that_comes_after_the_store_has_gone_leaves_nothing_behind(world: World) -> None:
    """The job was moved meanwhile, and would be lent a slot that nobody gives back."""
    running = {grant.job_id: grant for grant in [await world.granted(name) for name in "xy"]}
    for name in "abc":
        assert isinstance(await world.queue.enqueue(job(name)), Waiting)
    world.store.meanwhile["enqueue"] = world.go_away
    with pytest.raises(QueueFull):
        await world.queue.enqueue(job("late"))
    assert world.queue.degraded
    assert await world.queue.length(MODEL) == 3
    for grant in running.values():
        await world.queue.settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, 1)
    for name in "abc":
        await world.queue.cancel(MODEL, name, f"s-{name}")
    assert "late" not in {grant.job_id for grant in world.heard}
    assert (await world.granted("next")).degraded


async def test_a_refusal_that_comes_after_a_slot_was_lent_here_is_not_heard(world: World) -> None:
    """Its client was told of the slot already; the job goes on in it, and gives it back."""
    await world.store.enqueue(replace(job("a"), submission="another"))
    world.store.meanwhile["enqueue"] = world.go_away
    grant = await world.granted("a")
    assert grant.degraded
    assert world.heard == [grant]
    assert await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 1)
    assert (await world.granted("b")).degraded


async def test_an_operator_may_keep_the_store_out(world: World) -> None:
    """Forced open: degraded though the store is well, until it is released."""
    world.circuit.force(State.FORCED_OPEN)
    assert (await world.granted("a")).degraded
    world.clock.turn(60)
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.queue.degraded
    world.circuit.force(State.CLOSED)
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded


async def test_what_breakers_bar_is_barred_in_the_own_queue_from_the_beginning(world: World) -> None:
    """The store knows of it, and nobody says it again: a new job would be lent a slot that it cannot use."""
    world.opened["w1"] = 3.0
    await world.go_away()
    with pytest.raises(WorkersBarred) as caught:
        await world.queue.enqueue(job("a"))
    assert caught.value.retry_after_s == pytest.approx(3.0)
    assert not tuple(world.queue._book)


async def test_each_return_to_the_store_is_told(world: World) -> None:
    """Also where no renewal has found it away: a call had, and the next renewal finds it back."""
    told = [(await world.queue.renew(MODEL, {}, frozenset())).returns]
    await world.go_away()
    told.append((await world.queue.renew(MODEL, {}, frozenset())).returns)
    await world.come_back(empty=True)
    told.append((await world.queue.renew(MODEL, {}, frozenset())).returns)
    world.store.down = True
    await world.granted("a")
    await world.come_back(empty=True)
    told.append((await world.queue.renew(MODEL, {}, frozenset())).returns)
    assert told == [0, 0, 1, 2]
