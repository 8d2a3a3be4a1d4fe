"""Preparations that are given up and asked for again, while the thread of the first one has not ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from services.common.system_clock import SystemClock
from services.worker.core.revision import (
    BecameReady,
    BecameRetired,
    BecameStaged,
    LoadStage,
    Phase,
    PreparationFailed,
    Progressed,
    Report,
    Residency,
    RevisionSpec,
)
from services.worker.engine import Engine, EngineSettings, Preparation
from tests.fakes.worker_ports import FakeLoader, FakeStore

SPEC = RevisionSpec("m", "r1")


class World:
    """A worker's preparation; its loads stand at a gate."""

    def __init__(self) -> None:
        residency, clock = Residency(), SystemClock()
        engine = Engine(residency, EngineSettings(2), clock, pytest.fail)
        self.loader = FakeLoader()
        self.loader.told = [(LoadStage.MAP, 1, 2)]
        self.gate = self.loader.gate = threading.Event()
        self.told: asyncio.Queue[Report] = asyncio.Queue()
        self.answers: dict[type[Report], Callable[[], None]] = {}
        self.preparation = Preparation(
            engine,
            residency,
            FakeStore(),
            self.loader,
            clock,
            report=self.hear,
            on_change=lambda: None,
        )

    def hear(self, report: Report) -> None:
        """Notes a report; what was prepared as an answer to its kind comes in the same turn of the loop."""
        self.told.put_nowait(report)
        if (answer := self.answers.pop(type(report), None)) is not None:
            asyncio.get_running_loop().call_soon(answer)

    async def load(self) -> None:
        """Asks for the revision, and returns when its load stands at the gate."""
        self.loader.entered.clear()
        self.preparation.prepare(SPEC)
        assert await asyncio.to_thread(self.loader.entered.wait, 10)

    def drained(self) -> list[Report]:
        """What was told so far."""
        return [self.told.get_nowait() for _ in range(self.told.qsize())]

    async def heard(self) -> Report:
        """The next report that is no mere progress."""
        async with asyncio.timeout(10):
            while isinstance(report := await self.told.get(), Progressed):
                pass
        return report


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A preparation, which is stopped afterwards."""
    world = World()
    yield world
    world.gate.set()
    assert await world.preparation.stop()


async def test_what_is_asked_again_begins_when_the_thread_has_ended(world: World) -> None:
    """A controller that lost patience asks again after seconds; the thread may take longer to end."""
    await world.load()
    world.preparation.abort("r1")
    await asyncio.sleep(0)
    world.preparation.prepare(SPEC)
    await asyncio.sleep(0)
    assert not world.loader.runners
    world.gate.set()
    assert isinstance(await world.heard(), BecameReady)
    assert len(world.loader.runners) == 1


async def test_what_is_asked_again_and_given_up_again_stays_away(world: World) -> None:
    """The last word counts; that it is gone is told once, when its memory is free."""
    await world.load()
    world.preparation.abort("r1")
    world.preparation.prepare(SPEC)
    world.preparation.abort("r1")
    await asyncio.sleep(0.01)
    assert all(isinstance(one, Progressed) for one in world.drained())
    world.gate.set()
    assert await world.heard() == BecameRetired("r1")
    assert not world.loader.runners


async def test_two_aborts_wait_for_the_thread_as_one_does(world: World) -> None:
    """Whoever attaches again says it twice; the next load must not begin beside the first one's thread."""
    await world.load()
    world.preparation.abort("r1")
    await asyncio.sleep(0)
    world.preparation.abort("r1")
    await asyncio.sleep(0)
    world.loader.entered.clear()
    world.preparation.prepare(RevisionSpec("m", "r2"))
    assert not await asyncio.to_thread(world.loader.entered.wait, 0.05)
    world.gate.set()
    assert await world.heard() == BecameRetired("r1")
    ready = await world.heard()
    assert isinstance(ready, BecameReady)
    assert ready.revision == "r2"


async def test_its_files_alone_can_be_what_is_asked_again(world: World) -> None:
    """As where a load is given up for a swap, which begins with the files."""
    await world.load()
    world.preparation.abort("r1")
    world.preparation.stage(SPEC)
    world.gate.set()
    assert await world.heard() == BecameStaged("r1")


async def test_an_abort_in_the_same_breath_is_answered(world: World) -> None:
    """Nothing has begun yet, and the controller waits for the word that it is gone."""
    world.preparation.prepare(SPEC)
    world.preparation.abort("r1")
    assert await world.heard() == BecameRetired("r1")


async def test_nothing_begins_again_at_the_end(world: World) -> None:
    """A process that stops does not go on with what was asked for behind a load."""
    await world.load()
    world.preparation.abort("r1")
    world.preparation.prepare(SPEC)
    world.gate.set()
    assert await world.preparation.stop()
    assert await world.heard() == BecameRetired("r1")
    assert not world.preparation._tasks


async def test_an_abort_in_the_turn_of_the_last_word_is_answered(world: World) -> None:
    """An operator ends a rollout just as the files are whole: the controller waits until they are let go."""
    world.answers[BecameStaged] = lambda: world.preparation.abort("r1")
    world.preparation.stage(SPEC)
    assert await world.heard() == BecameStaged("r1")
    assert await world.heard() == BecameRetired("r1")
    world.preparation.stage(SPEC)
    assert isinstance(await world.told.get(), Progressed)
    assert await world.heard() == BecameStaged("r1")


async def test_an_abort_in_the_turn_of_a_failure_is_answered(world: World) -> None:
    """There is nothing to stop any more, and the controller waits for the word all the same."""
    world.loader.flaw = "broken"
    world.answers[PreparationFailed] = lambda: world.preparation.abort("r1")
    world.preparation.stage(SPEC)
    assert await world.heard() == PreparationFailed("r1", Phase.VERIFY, "broken")
    assert await world.heard() == BecameRetired("r1")


async def test_what_is_asked_in_the_turn_of_the_last_word_is_done(world: World) -> None:
    """Staged, and to be loaded before the task that staged it has left."""
    world.gate.set()
    world.answers[BecameStaged] = lambda: world.preparation.prepare(SPEC)
    world.preparation.stage(SPEC)
    assert await world.heard() == BecameStaged("r1")
    assert isinstance(await world.heard(), BecameReady)
