"""Preparation: for how long it holds on to the files of a revision."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from services.common.system_clock import SystemClock
from services.worker.core.revision import LoadStage, Report, Residency, RevisionSpec
from services.worker.engine import Engine, EngineSettings, Preparation
from tests.fakes.worker_ports import FakeLoader, FakeStore

SPEC = RevisionSpec("m", "r1")


class World:
    """A preparation between fakes, and what it reports."""

    def __init__(self) -> None:
        self.store, self.loader = FakeStore(), FakeLoader()
        self.told: asyncio.Queue[Report] = asyncio.Queue()
        residency = Residency()
        self.engine = Engine(residency, EngineSettings(2), SystemClock(), lambda _: None)
        self.preparation = Preparation(
            self.engine,
            residency,
            self.store,
            self.loader,
            SystemClock(),
            report=self.told.put_nowait,
            on_change=lambda: None,
        )

    async def hears(self, report: str) -> None:
        """Waits for a report of this class."""
        async with asyncio.timeout(10):
            while type(await self.told.get()).__name__ != report:
                pass
        # A revision that is still being worked on is not begun anew.
        await asyncio.gather(*self.preparation._tasks.values(), return_exceptions=True)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """One whose step thread is ended afterwards."""
    made = World()
    made.engine.start()
    yield made
    await made.preparation.stop()
    await made.engine.stop()


async def test_files_stay_while_their_revision_is_resident(world: World) -> None:
    """Staged, loaded, served: until it is retired."""
    world.preparation.stage(SPEC)
    await world.hears("BecameStaged")
    world.preparation.prepare(SPEC)
    await world.hears("BecameReady")
    assert world.store.held == {"r1"}
    world.preparation.retire("r1")
    await world.hears("BecameRetired")
    assert world.store.held == set()


async def test_files_of_what_failed_may_go(world: World) -> None:
    """In whichever phase it was."""
    world.loader.flaw = "It is not a model."
    world.preparation.prepare(SPEC)
    await world.hears("PreparationFailed")
    assert world.store.held == set()
    world.loader.flaw, world.store.error = "", RuntimeError()
    world.preparation.prepare(SPEC)
    await world.hears("PreparationFailed")
    assert world.store.held == set()


async def test_files_of_what_is_not_wanted_any_more_may_go(world: World) -> None:
    """Staged and forgotten, or stopped in the middle of its load."""
    world.preparation.stage(SPEC)
    await world.hears("BecameStaged")
    world.preparation.abort("r1")
    await world.hears("BecameRetired")
    assert world.store.held == set()
    world.loader.gate, world.loader.told = threading.Event(), [(LoadStage.MAP, 1, 2)]
    world.preparation.prepare(SPEC)
    assert await asyncio.to_thread(world.loader.entered.wait, 10)
    assert world.store.held == {"r1"}
    world.preparation.abort("r1")
    # The load is told before it goes on.
    await asyncio.sleep(0)
    world.loader.gate.set()
    await world.hears("BecameRetired")
    assert world.store.held == set()
