"""How long requests wait whose workers are all barred, and what a worker that is tried changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from services.common.errors import NoWorker
from services.gateway.core.attempts import Loss, Output
from services.gateway.core.jobs import Renewal, Waiting
from services.gateway.dispatcher.streams import AnswerStream
from tests.fakes.gateway_ports import grant
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.dispatcher_world import World, dispatcher_world, job

# The dispatcher's own bound in this world.
WAIT_S = 0.05


@dataclass
class Barred:
    """A dispatcher by a clock that is turned; of its workers none may be used."""

    world: World
    clock: TurnedClock

    async def submit(self, name: str) -> AnswerStream:
        """A request that waits."""
        self.world.queue.answer = Waiting(0)
        stream = await self.world.dispatcher.submit(job(name))
        await asyncio.sleep(0)
        return stream

    async def renew(self, after_s: float = 0.0, *, workers: int | None = 0, due: int = 0) -> None:
        """Lets time pass, and then compares notes."""
        self.clock.turn(after_s)
        self.world.queue.renewal = Renewal(workers=workers, due=due)
        await self.world.dispatcher.renew()

    async def begin_trial(self, name: str) -> None:
        """Lends a request the slot of a worker that is tried."""
        attempts = len(self.world.workers.attempts)
        self.world.queue.receive(replace(grant(f"n-{name}", name), trial=True))
        await self.world.workers.wait_started(attempts + 1)

    async def fail_trial(self, name: str) -> None:
        """The worker is lost as it is tried."""
        self.world.workers.attempts[-1].sink.lost("gone", Loss.JOB)
        await self.world.queue.wait_for("requeue", f"n-{name}")
        await asyncio.sleep(0)


@pytest.fixture
async def barred() -> AsyncIterator[Barred]:
    """It begins with nobody."""
    async with dispatcher_world() as world:
        clock = TurnedClock()
        world.dispatcher._rounds._clock = clock
        yield Barred(world, clock)


@pytest.mark.parametrize("due", [0, 1])
async def test_a_worker_that_is_tried_is_waited_for_longer_but_not_for_ever(barred: Barred, due: int) -> None:
    """It may be well again; where one trial follows another, requests end after twice the time."""
    await barred.submit("j")
    await barred.submit("t")
    await barred.begin_trial("t")
    waits = barred.world.dispatcher._live["j"]
    await barred.renew(due=due)
    await barred.renew(1.5 * WAIT_S, due=due)
    assert waits.error is None
    await barred.renew(0.6 * WAIT_S, due=due)
    assert isinstance(waits.error, NoWorker)


async def test_a_trial_that_has_just_been_granted_counts_as_one(barred: Barred) -> None:
    """Who waits already for longer than without one is not dropped as it begins."""
    await barred.submit("j")
    await barred.submit("t")
    waits = barred.world.dispatcher._live["j"]
    await barred.renew()
    barred.clock.turn(1.5 * WAIT_S)
    trial = replace(grant("n-t", "t"), trial=True)
    barred.world.queue.renewal = Renewal(granted=(trial,), workers=0)
    await barred.world.dispatcher.renew()
    assert waits.error is None


async def test_time_stands_still_while_a_worker_is_due_and_has_no_room(barred: Barred) -> None:
    """Nothing could be tried, however long the others' answers are; what was waited before still counts."""
    await barred.submit("j")
    waits = barred.world.dispatcher._live["j"]
    await barred.renew()
    await barred.renew(0.9 * WAIT_S)
    for _ in range(32):
        await barred.renew(WAIT_S, due=1)
    assert waits.error is None
    await barred.renew(0.2 * WAIT_S)
    assert isinstance(waits.error, NoWorker)


@pytest.mark.parametrize("due", [0, 1])
async def test_who_comes_late_is_not_dropped_for_how_long_others_waited(barred: Barred, due: int) -> None:
    """Other gateways' requests have waited all the while, so that the queue looked after its workers."""
    for _ in range(32):
        await barred.renew(WAIT_S, due=due)
    await barred.submit("late")
    waits = barred.world.dispatcher._live["late"]
    await barred.renew(WAIT_S, due=due)
    assert waits.error is None


async def test_each_request_waits_for_its_own_time(barred: Barred) -> None:
    """The first one ends; the one that came meanwhile has as long as it had."""
    await barred.submit("first")
    first = barred.world.dispatcher._live["first"]
    await barred.renew()
    await barred.renew(0.8 * WAIT_S)
    await barred.submit("late")
    late = barred.world.dispatcher._live["late"]
    await barred.renew(0.3 * WAIT_S)
    assert isinstance(first.error, NoWorker)
    assert late.error is None
    await barred.renew(1.1 * WAIT_S)
    assert isinstance(late.error, NoWorker)


async def test_once_the_trial_has_failed_who_waited_long_enough_is_told(barred: Barred) -> None:
    """The time that it took counts; who failed with it waits on as the others do, and ends with them."""
    await barred.submit("j")
    await barred.submit("t")
    live = dict(barred.world.dispatcher._live)
    await barred.renew()
    await barred.begin_trial("t")
    await barred.renew(1.5 * WAIT_S)
    await barred.fail_trial("t")
    await barred.renew()
    assert [type(one.error) for one in live.values()] == [NoWorker, NoWorker]


async def test_the_only_request_does_not_begin_its_wait_anew_with_each_trial(barred: Barred) -> None:
    """While it tries, nobody waits, and the queue says nothing of workers."""
    await barred.submit("t")
    waits = barred.world.dispatcher._live["t"]
    await barred.renew()
    await barred.begin_trial("t")
    await barred.renew(1.1 * WAIT_S, workers=None)
    await barred.fail_trial("t")
    await barred.renew()
    assert isinstance(waits.error, NoWorker)


async def test_a_wait_before_a_trial_that_spoke_counts_for_nobody_later(barred: Barred) -> None:
    """The worker was well; whoever waits for the next one begins anew."""
    await barred.submit("t")
    await barred.renew()
    await barred.begin_trial("t")
    barred.world.workers.attempts[-1].sink.output(Output(0, (97,)))
    await barred.renew(9.0, workers=None)
    await barred.submit("j")
    waits = barred.world.dispatcher._live["j"]
    await barred.renew()
    assert waits.error is None
