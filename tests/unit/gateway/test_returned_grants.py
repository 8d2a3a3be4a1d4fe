"""News of a grant that arrives late: its slot was given back, and the queue has lent another one since."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.gateway.core.attempts import Loss, Output, RefusalReason
from services.gateway.core.events import FinishReason
from services.gateway.core.jobs import RETURNED_MAX, Outcome, Renewal
from tests.fakes.gateway_ports import grant
from tests.fixtures import fallback_world
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest
from tests.fixtures.fallback_world import MODEL


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


@pytest.mark.parametrize("told_by", ["message", "renewal"])
async def test_a_request_does_not_start_under_a_slot_that_it_gave_back(world: World, told_by: str) -> None:
    """Nor does it give the next slot back, which would end it: that is where it goes on."""
    stream = await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.refused(RefusalReason.BUSY, "full")
    if told_by == "message":
        # At once: the word of its return is still on its way.
        world.queue.receive(grant("n1"))
    else:
        await world.queue.wait_for("refused", "n1")
        world.queue.renewal = Renewal(granted=(grant("n1"),))
        await world.dispatcher.renew()
    assert len(world.workers.attempts) == 1
    world.queue.receive(grant("n2"))
    second = await world.workers.wait_started(2)
    world.queue.receive(grant("n1"))
    second.sink.output(Output(0, ids("a"), FinishReason.STOP))
    await rest(stream)
    await world.dispatcher.wait_empty()
    assert [call for call in world.queue.calls if call[0].startswith("settle")] == [("settle:finished", "n2")]


@pytest.mark.parametrize("emitted", [False, True], ids=["refused", "lost"])
async def test_a_store_that_has_forgotten_the_return_is_told_again(world: World, *, emitted: bool) -> None:
    """As one that lost its last second: for it the request runs, and it would lend it nothing any more."""
    await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    if emitted:
        sink.output(Output(0, ids("a")))
        sink.lost("test", Loss.PROCESS)
    else:
        sink.refused(RefusalReason.BUSY, "full")
    verb = "requeue" if emitted else "refused"
    await world.queue.wait_for(verb, "n1")
    world.queue.calls.clear()
    world.queue.renewal = Renewal(granted=(grant("n1"),))
    await world.dispatcher.renew()
    await world.queue.wait_for(verb, "n1")
    assert len(world.workers.attempts) == 1
    if emitted:
        assert world.queue.pins[-1] == "r1"


async def test_what_was_given_back_is_remembered_up_to_a_bound(world: World) -> None:
    """A request that is refused for minutes keeps a few names alone."""
    await world.dispatcher.submit(job())
    for number in range(2, RETURNED_MAX + 9):
        world.workers.attempts[-1].sink.refused(RefusalReason.BUSY, "full")
        world.queue.receive(grant(f"n{number}"))
    assert len(world.workers.attempts) == RETURNED_MAX + 8
    assert len(world.dispatcher._live["j"]._request.returned) == RETURNED_MAX


async def test_the_own_queue_lends_to_whom_late_news_say_has_a_slot() -> None:
    """The store goes after the news: the job waits, and is not taken for one that runs."""
    world = fallback_world.World()
    returned = await world.granted("a")
    await world.queue.refused(MODEL, "a", returned.nonce, hold_s=0.5)
    # As a renewal finds it that the store answered before.
    world.store._receive(returned)
    world.clock.turn(0.6)
    await world.go_away()
    (found,) = world.heard[1:] or (await world.queue.renew(MODEL, {}, frozenset("a"))).granted
    assert (found.job_id, found.degraded) == ("a", True)
    assert found.nonce != returned.nonce


async def test_late_news_do_not_hide_the_slot_that_a_job_runs_in() -> None:
    """The store has gone when the job ends: it is told so under the slot that the job had, and forgets it."""
    world = fallback_world.World()
    returned = await world.granted("a")
    await world.queue.refused(MODEL, "a", returned.nonce, hold_s=0.1)
    world.clock.turn(0.2)
    (held,) = (await world.queue.renew(MODEL, {}, frozenset("a"))).granted
    world.store._receive(returned)
    await world.go_away()
    assert await world.queue.settle(MODEL, "a", held.nonce, Outcome.FINISHED, 7)
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded
    assert world.at_store() == {}
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 7
