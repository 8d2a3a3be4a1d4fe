"""Golden prompts of a revision that serves: asked beside other jobs, and told where there is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from services.common.system_clock import SystemClock
from services.worker.core.admission import JobStart
from services.worker.core.revision import BecameProven, GoldenPrompt, Phase, Residency, RevisionSpec
from services.worker.core.sequence import SequenceKey, SequenceStart
from services.worker.engine import Engine, EngineSettings
from services.worker.engine.proofs import Proofs
from tests.fakes.worker_ports import FakeRunner, continuation

SLOTS = 2


class Tokenizer:
    """An id a character; an answer is its ids, with commas between them."""

    def encode_user(self, text: str) -> tuple[int, ...]:
        """See `ChatTokenizer.encode_user`."""
        return tuple(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `ChatTokenizer.decode`."""
        return ",".join(map(str, token_ids))


def prompt(text: str, expected: str = "") -> GoldenPrompt:
    """A prompt that the fake model answers, or another answer than it gives."""
    said = ",".join(map(str, continuation([ord(one) for one in text], 5)))
    return GoldenPrompt(text, expected or said, 5)


class World:
    """An engine with one active revision, and what was told of its proofs."""

    def __init__(self) -> None:
        self.residency = Residency()
        self.engine = Engine(self.residency, EngineSettings(SLOTS), SystemClock(), lambda _: None)
        self.runner = FakeRunner()
        self.told: asyncio.Queue[BecameProven] = asyncio.Queue()
        self.proofs = Proofs(self.engine, lambda: self.residency.epoch, self.told.put_nowait)

    def serve(self, *prompts: GoldenPrompt) -> None:
        """Activates the revision with these prompts."""
        self.engine.host("r1", self.runner)
        self.residency.begin("m", "r1")
        for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
            self.residency.enter("r1", phase)
        self.residency.activate("r1", 5)
        self.proofs.keep(RevisionSpec("m", "r1", golden_prompts=prompts), Tokenizer())

    async def heard(self) -> str:
        """The reason that is told next."""
        async with asyncio.timeout(10):
            return (await self.told.get()).reason

    async def ended(self) -> None:
        """Returns when nothing is asked any more."""
        async with asyncio.timeout(10):
            while self.proofs._tasks:
                await asyncio.gather(*self.proofs._tasks.values(), return_exceptions=True)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """One whose step thread is ended afterwards."""
    made = World()
    made.engine.start()
    yield made
    await made.proofs.stop()
    await made.engine.stop()


async def test_a_revision_that_serves_is_asked_again(world: World) -> None:
    """Each time anew, one proof at a time; nothing of it is left in the engine."""
    world.serve(prompt("one"), prompt("two"))
    world.proofs.ask("r1")
    world.proofs.ask("r1")
    assert await world.heard() == ""
    await world.ended()
    assert world.told.empty()
    world.proofs.ask("r1")
    assert await world.heard() == ""
    await world.ended()
    assert (world.engine._sessions, world.engine.pulse.running) == ({}, 0)


async def test_an_answer_that_falls_short_is_told_by_its_number(world: World) -> None:
    """Neither what was asked nor what was answered is told."""
    world.serve(prompt("one"), prompt("secret", "forty-two"))
    world.proofs.ask("r1")
    assert await world.heard() == "Golden prompt 2 of 2: its answer does not contain what it must."


async def test_a_revision_that_cannot_answer_falls_short(world: World) -> None:
    """Numbers that are not finite end a sequence in error."""
    world.serve(prompt("one"))
    world.runner.poisoned = frozenset({ord("o")})
    world.proofs.ask("r1")
    assert await world.heard() == "Golden prompt 1: the revision fails to answer it."


async def test_a_worker_without_a_free_slot_says_nothing(world: World) -> None:
    """Requests come first, and being full is no shortcoming; later it is asked again."""
    world.serve(prompt("one", "never said"))
    session = world.engine.open_session()
    for number in range(SLOTS):
        key = SequenceKey(session.number, f"job-{number}")
        session.start(JobStart("m", "r1", 5, (SequenceStart(key, (1, 2), 9, credit_tokens=0),)))
    world.proofs.ask("r1")
    await world.ended()
    assert world.told.empty()
    session.close()
    world.proofs.ask("r1")
    assert "Golden prompt 1 of 1" in await world.heard()


async def test_a_revision_that_leaves_or_has_no_prompts_says_nothing(world: World) -> None:
    """Whoever asks too late, or for nothing, hears nothing."""
    world.serve(prompt("one", "never said"))
    world.proofs.ask("r1")
    world.proofs.drop("r1")
    world.proofs.ask("r1")
    world.proofs.ask("r2")
    await world.ended()
    assert world.told.empty()
