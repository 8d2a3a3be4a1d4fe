"""The store is back: what ends on the way is told, and what waits is lent one slot, of its revision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.gateway.adapters import homecoming
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.core.jobs import Grant, Outcome, Waiting
from services.gateway.core.log import LogTail
from services.gateway.core.queue_line import QueueWorker
from tests.fixtures.fallback_world import MODEL, W1, World, job

OTHER = QueueWorker("w2", "127.0.0.1:2", 2, frozenset({"r2"}))


def wide() -> World:
    """A world of four slots, of which a gateway that is alone lends two."""
    return World((replace(W1, slots=4),))


async def finish(world: World, grant: Grant, used_tokens: int = 7) -> None:
    """Settles what runs."""
    assert await world.queue.settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, used_tokens)


@pytest.mark.parametrize("ending", ["a", "b"], ids=["another", "itself"])
async def test_an_end_that_falls_into_the_way_back_is_told(ending: str) -> None:
    """One ran before and one began alone; while the latter is on its way, one of them ends."""
    world = wide()
    grants = {"a": await world.granted("a")}
    await world.go_away()
    grants["b"] = await world.granted("b")
    ended = grants.pop(ending)
    await world.come_back(empty=False)
    world.store.meanwhile["register"] = lambda: finish(world, ended)
    ((name, staying),) = grants.items()
    assert (await world.queue.renew(MODEL, {name: staying.nonce}, frozenset())).unknown == frozenset()
    assert not world.queue.degraded
    assert world.at_store() == {name: staying.nonce}
    assert world.store._lines[MODEL].ended[ending].outcome is Outcome.FINISHED
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 7


async def test_a_job_that_waits_at_the_store_and_has_finished_here_has_finished_there() -> None:
    """The store knows no slot of it that could be settled: its waiting ends with the outcome."""
    world = World()
    grants = [await world.granted(name) for name in "xy"]
    await world.queue.enqueue(job("a"))
    await world.go_away()
    for grant in grants:
        await finish(world, grant)
    (begun,) = world.heard
    await finish(world, begun)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    ended = world.store._lines[MODEL].ended
    assert {name: ended[name].outcome for name in "axy"} == dict.fromkeys("axy", Outcome.FINISHED)


@pytest.mark.parametrize("remembered", [False, True], ids=["unknown", "ended-there"])
async def test_a_job_that_leaves_while_it_is_on_its_way_waits_for_nothing(*, remembered: bool) -> None:
    """It waited; the store has it, or remembers an end of it, when its client has gone already."""
    world = World()
    if remembered:
        await world.store.enqueue(job("a"))
        await world.store.cancel(MODEL, "a", "s-a")
    for name in "xy":
        await world.granted(name)
    await world.go_away()
    await world.queue.enqueue(job("a"))
    await world.come_back(empty=False)
    world.store.meanwhile["enqueue"] = lambda: world.queue.cancel(MODEL, "a", "s-a")
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded
    assert set(world.at_store()) == {"x", "y"}


async def test_a_job_of_an_earlier_process_that_ends_alone_ends_at_the_store() -> None:
    """It was taken up, so that no submission of this process told of it: the store knows it all the same."""
    world = World()
    grant = await world.store.enqueue(job("a"))
    assert isinstance(grant, Grant)
    await world.go_away()
    taken_up = replace(job("a"), waited_s=1.0)
    assert await world.queue.register(taken_up, grant)
    await finish(world, grant)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.at_store() == {}
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 7


@pytest.mark.parametrize("remembered", [False, True], ids=["unknown", "ended-there"])
async def test_a_job_that_is_lent_a_slot_on_the_way_back_is_lent_no_other(*, remembered: bool) -> None:
    """The own queue, in which it waited as well, has a slot free again before the way back is over."""
    world = wide()
    if remembered:
        # By another gateway's hand, so that it comes back under another submission.
        await world.store.enqueue(job("j"))
        await world.store.cancel(MODEL, "j", "s-j")
    first, _ = await world.granted("a"), await world.granted("b")
    await world.go_away()
    for name in "jk":
        assert isinstance(await world.queue.enqueue(job(name)), Waiting)
    await world.come_back(empty=False)

    async def finish_once_lent() -> None:
        if any(grant.job_id == "j" for grant in world.heard):
            await finish(world, first)
        else:
            world.store.meanwhile["enqueue"] = finish_once_lent

    world.store.meanwhile["enqueue"] = finish_once_lent
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded
    (grant,) = (grant for grant in world.heard if grant.job_id == "j")
    assert world.at_store()["j"] == grant.nonce
    assert "a" not in world.at_store()


async def test_a_slot_that_an_end_frees_on_the_way_back_is_taken() -> None:
    """The store lends it to a job that waits there; to give it back would hold its worker for a moment."""
    world = World()
    first, second = await world.granted("a"), await world.granted("b")
    await world.queue.enqueue(job("j"))
    await world.go_away()
    await finish(world, first)
    assert world.heard == []
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {"b": second.nonce}, frozenset("j"))
    (grant,) = world.heard
    assert (grant.job_id, grant.degraded, grant.attempt) == ("j", False, 1)
    assert world.at_store() == {"b": second.nonce, "j": grant.nonce}


async def test_a_slot_that_the_store_lent_as_it_went_is_not_lent_twice() -> None:
    """Its answer comes when the own queue has lent one, which counts; the store hears of it later."""
    world = World()
    alone: list[Grant] = []

    async def go_away() -> None:
        world.store.down = True
        other = replace(job("other"), model=MODEL)
        await world.queue.enqueue(other)
        alone.extend(world.heard)

    world.store.meanwhile["enqueue"] = go_away
    answer = await world.queue.enqueue(job("a"))
    assert [grant.job_id for grant in alone] == ["a"]
    assert answer == alone[0]
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {"a": alone[0].nonce}, frozenset(("other",)))
    assert world.at_store()["a"] == alone[0].nonce


async def test_a_slot_that_a_renewal_of_the_store_lent_as_it_went_is_not_lent_twice() -> None:
    """The same, where the job had waited: the renewal that comes too late tells of no grant."""
    world = World()
    world.store.remove_worker(MODEL, "w1")
    await world.queue.enqueue(job("a"))
    world.store.set_worker(MODEL, W1)

    async def go_away() -> None:
        world.store.down = True
        await world.queue.enqueue(job("other"))

    world.store.meanwhile["renew"] = go_away
    assert (await world.queue.renew(MODEL, {}, frozenset("a"))).granted == ()
    (alone,) = world.heard
    assert (alone.job_id, alone.degraded) == ("a", True)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {"a": alone.nonce}, frozenset(("other",)))
    assert world.at_store()["a"] == alone.nonce


async def lost_with_text(world: World, name: str = "a") -> str:
    """A job that has begun to answer loses its worker; returns the revision of its text."""
    grant = await world.granted(name)
    await world.queue.requeue(MODEL, name, grant.nonce, pin=grant.revision, used_tokens=3)
    return grant.revision


async def test_the_own_queue_goes_on_with_the_revision_of_a_text() -> None:
    """The store goes while the job waits, and the route has left its revision since."""
    world = World((W1, OTHER), frozenset({"r1", "r2"}))
    revision = await lost_with_text(world)
    await world.go_away()
    world.activated[MODEL] = ("r2" if revision == "r1" else "r1", 5)
    renewal = await world.queue.renew(MODEL, {}, frozenset("a"))
    (grant,) = {*world.heard, *renewal.granted}
    assert (grant.revision, grant.degraded) == (revision, True)


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "as-it-was"])
async def test_the_store_goes_on_with_the_revision_of_a_text_that_began_without_it(*, empty: bool) -> None:
    """As it was it knows the job as waiting for any revision."""
    world = World((W1, replace(OTHER, slots=1)))
    first, second = await world.granted("x"), await world.granted("y")
    await world.queue.enqueue(job("a"))
    await world.go_away()
    for grant in first, second:
        await finish(world, grant)
    (begun,) = world.heard
    await world.queue.requeue(MODEL, "a", begun.nonce, pin="r1", used_tokens=3)
    world.store.set_route(MODEL, 2, {"r2": 1})
    world.store.remove_worker(MODEL, "w1")
    await world.come_back(empty=empty)
    await world.queue.renew(MODEL, {}, frozenset("a"))
    assert not world.queue.degraded
    assert world.at_store() == {"a": ""}, "the other revision would continue somebody else's sentence"
    world.store.set_worker(MODEL, W1)
    (grant,) = (await world.queue.renew(MODEL, {}, frozenset("a"))).granted
    assert grant.revision == "r1"
    await world.queue.cancel(MODEL, "a", "s-a")
    # Of the two that it forgot, it is told what they used.
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 3 + 14


async def test_a_return_that_the_store_did_not_hear_of_ends_the_attempt_there() -> None:
    """It goes with that very call: when it is back, the job waits there with its text's revision."""
    world = World()
    first, second = await world.granted("a"), await world.granted("b")
    world.store.down = True
    await world.queue.requeue(MODEL, "a", first.nonce, pin="r1", used_tokens=3)
    await world.come_back(empty=False)
    world.store.remove_worker(MODEL, "w1")
    await world.queue.renew(MODEL, {"b": second.nonce}, frozenset("a"))
    assert world.at_store() == {"a": "", "b": second.nonce}
    assert world.store._lines[MODEL].jobs.by_id["a"].pin == "r1"


@pytest.mark.parametrize("verb", ["settle", "cancel"])
async def test_what_a_log_lacks_is_brought_home_with_the_end(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that began before the store went, and ended while it was away, can be read to its end."""
    world, tail = World(), LogTail(3, ())
    grant = await world.granted("a")
    await world.go_away()
    if verb == "settle":
        assert await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 7, tail)
    else:
        await world.queue.cancel(MODEL, "a", "s-a", tail, used_tokens=7)
    brought: list[LogTail | None] = []
    settle = MemoryJobQueue.settle

    async def heard(queue: MemoryJobQueue, *told: Any) -> bool:
        brought.append(told[5])
        return await settle(queue, *told)

    monkeypatch.setattr(MemoryJobQueue, "settle", heard)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert (brought, world.at_store()) == ([tail], {})


async def test_a_bounded_number_of_ends_bring_what_logs_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are told all the same."""
    monkeypatch.setattr(homecoming, "TAILS_MAX", 1)
    world = wide()
    grants = [await world.granted(name) for name in "ab"]
    await world.go_away()
    for grant in grants:
        await world.queue.settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, 7, LogTail(3, ()))
    assert [owed.tail is not None for owed in world.queue._home._owed] == [True, False]
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.at_store() == {}


async def test_a_slot_that_was_lent_here_in_the_last_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has lent the job another one, which nobody has used: what is registered replaces it."""
    monkeypatch.setattr(homecoming, "ROUNDS_MAX", 1)
    world = World()
    await world.go_away()
    first = await world.granted("a")
    await world.queue.enqueue(job("b"))
    world.store.meanwhile["enqueue"] = lambda: finish(world, first, 1)
    await world.come_back(empty=True)
    await world.queue.renew(MODEL, {"a": first.nonce}, frozenset({"b"}))
    (lent,) = [grant for grant in world.heard if grant.job_id == "b"]
    renewal = await world.queue.renew(MODEL, {"b": lent.nonce}, frozenset())
    assert renewal.lost == frozenset({"b"})
    assert await world.queue.register(job("b"), lent)
    assert world.at_store() == {"b": lent.nonce}
