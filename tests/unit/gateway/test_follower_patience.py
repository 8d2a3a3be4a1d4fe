"""How long a client of a request that runs elsewhere waits for a store that is away, or has lost the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from services.common.errors import RequestUnknown, StoreUnavailable, WorkerLost
from services.gateway.adapters.breakers import STORE_LIMITS
from services.gateway.core.events import Chunk, Event, Started
from services.gateway.core.log import Entry
from services.gateway.dispatcher import chronicle
from services.gateway.dispatcher.dispatch import RENEW_S
from services.gateway.dispatcher.follower import LOST_LOG_WAIT_S, PATIENCE_S, Follower
from services.gateway.dispatcher.journal import Journal
from services.worker.adapters.controller_link import RETRY_MAX_S
from tests.fakes.gateway_logs import FakeLogs
from tests.fakes.turned_clock import TurnedClock

FIRST = [Entry(Started("r", "m", "r1", "w1", 1, 0.0)), Entry(Chunk(0, "a", (1,)), 0.25)]
NEXT = Entry(Chunk(1, "b", (2,)), 0.5)


@dataclass
class Scene:
    """A client that has heard what the log has, and asks for what comes next."""

    logs: FakeLogs
    clock: TurnedClock
    follower: Follower
    asked: asyncio.Task[Event]

    async def look(self) -> None:
        """It looks once more."""
        self.follower.notice()
        for _ in range(10):
            await asyncio.sleep(0)

    async def pass_s(self, seconds: float) -> None:
        """It looks, and once more after so long."""
        await self.look()
        self.clock.turn(seconds)
        await self.look()


@asynccontextmanager
async def followed(journal: Journal | None = None, first: Sequence[Entry] = FIRST) -> AsyncIterator[Scene]:
    """A request that runs elsewhere; with a journal it ran here before."""
    logs, clock = FakeLogs(), TurnedClock()
    logs.entries["j"] = list(first)
    follower = Follower("m", "j", 0, logs, clock, 30.0, lambda _: None)
    if journal is None:
        await follower.read_store()
    else:
        journal.extend(first)
        follower.read_journal(journal, lambda: None)
    assert [await anext(follower) for _ in first] == [entry.event for entry in first]
    scene = Scene(logs, clock, follower, asyncio.create_task(_next(follower)))
    await scene.look()
    try:
        yield scene
    finally:
        scene.asked.cancel()
        await asyncio.gather(scene.asked, return_exceptions=True)
        await follower.aclose()


async def _next(follower: Follower) -> Event:
    return await anext(follower)


async def test_a_log_that_was_lost_is_read_on_when_it_is_written_again() -> None:
    """With its record or alone; what was heard is not told again."""
    async with followed() as scene:
        del scene.logs.entries["j"]
        await scene.pass_s(LOST_LOG_WAIT_S - 0.1)
        scene.logs.entries["j"] = FIRST[:1]
        await scene.look()
        assert not scene.asked.done()
        scene.logs.entries["j"] = [*FIRST, NEXT]
        await scene.look()
        assert scene.asked.result() == NEXT.event


@pytest.mark.parametrize("first", [FIRST, []], ids=["running", "waiting"])
async def test_an_emptied_store_is_away_until_it_can_be_told_of_the_log_again(first: list[Entry]) -> None:
    """Also of a request that has no event yet; whoever asks for it only then hears that it is not known."""
    logs, clock = FakeLogs(), TurnedClock()
    async with followed(first=first) as scene:
        del scene.logs.entries["j"]
        scene.logs.emptied = True
        await scene.pass_s(PATIENCE_S - 0.1)
        scene.logs.emptied = False
        await scene.pass_s(LOST_LOG_WAIT_S - 0.1)
        assert not scene.asked.done()
        scene.logs.entries["j"] = [*first, NEXT]
        await scene.look()
        assert scene.asked.result() == NEXT.event
    logs.emptied = True
    with pytest.raises(RequestUnknown):
        await Follower("m", "j", 0, logs, clock, 30.0, lambda _: None).read_store()


def test_a_lost_log_is_waited_for_longer_than_the_way_back_takes() -> None:
    """A worker comes to the controller, the gateway looks for the store and writes: twice that."""
    way_back_s = RETRY_MAX_S + STORE_LIMITS.sleep_s + RENEW_S + chronicle.RETRY_LAST_S
    assert 2 * way_back_s <= LOST_LOG_WAIT_S < PATIENCE_S


async def test_nobody_waits_for_a_lost_log_for_ever() -> None:
    """Its gateway may have gone with it."""
    async with followed() as scene:
        del scene.logs.entries["j"]
        await scene.pass_s(LOST_LOG_WAIT_S)
        with pytest.raises(WorkerLost):
            scene.asked.result()


async def test_the_log_of_what_waits_for_a_slot_is_waited_for_from_when_it_has_one() -> None:
    """As after its worker was lost with the store: without a slot its gateway cannot write."""
    async with followed() as scene:
        scene.logs.entries["j"] = []
        scene.logs.waiting.add("j")
        await scene.pass_s(LOST_LOG_WAIT_S)
        await scene.pass_s(LOST_LOG_WAIT_S - 0.1)
        scene.logs.waiting.clear()
        await scene.look()
        assert not scene.asked.done()
        scene.logs.entries["j"] = [*FIRST, NEXT]
        await scene.look()
        assert scene.asked.result() == NEXT.event


async def test_a_lost_log_is_waited_for_from_when_the_store_answers() -> None:
    """However long it was away; and it is away for no longer because it answers in between."""
    async with followed() as scene:
        scene.logs.down = True
        await scene.pass_s(PATIENCE_S / 2)
        scene.logs.down = False
        del scene.logs.entries["j"]
        await scene.pass_s(LOST_LOG_WAIT_S - 0.1)
        scene.logs.down = True
        await scene.pass_s(2.0)
        scene.logs.down = False
        await scene.pass_s(LOST_LOG_WAIT_S - 0.1)
        assert not scene.asked.done()
        scene.logs.down = True
        await scene.pass_s(PATIENCE_S / 2)
        with pytest.raises(StoreUnavailable):
            scene.asked.result()


@pytest.mark.parametrize("ran", ["elsewhere", "here"])
async def test_no_text_is_gone_on_with_in_another_one(ran: str) -> None:
    """Whoever asked again by the id while nobody knew it had another text begun, which is as long by now."""
    journal = Journal("d") if ran == "here" else None
    async with followed(journal) as scene:
        del scene.logs.entries["j"]
        if journal is not None:
            journal.move()
        await scene.look()
        assert not scene.asked.done()
        scene.logs.entries["j"] = [FIRST[0], Entry(Chunk(0, "x", (9,))), NEXT]
        await scene.look()
        with pytest.raises(WorkerLost):
            scene.asked.result()


async def test_who_has_read_a_journal_goes_on_in_the_store() -> None:
    """Another gateway writes the log on; times in it are rounded."""
    async with followed(journal := Journal("d")) as scene:
        scene.logs.entries["j"] = [FIRST[0], Entry(FIRST[1].event, 0.2), NEXT]
        journal.move()
        await scene.look()
        assert scene.asked.result() == NEXT.event
