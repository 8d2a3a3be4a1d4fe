"""Several sequences of one job: they share its prompt, take a slot each, and end one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from interlock.v1 import worker_service_pb2

from services.common.system_clock import SystemClock
from services.worker.adapters.job_messages import read_job, unserved
from services.worker.core.admission import JobStart, Reason, Refusal
from services.worker.core.format import Format, FormatKind
from services.worker.core.revision import Phase, Residency
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart
from services.worker.engine import Engine, EngineSession, EngineSettings
from tests.fakes.worker_ports import FACTS, FakeCompiler, FakeRunner, continuation

PROMPT = tuple(range(40, 140))
SHAPE = Format(FormatKind.REGEX, ("a+",))
SLOTS = 3


class Bench:
    """An engine of three slots with one active revision, a session, and what it has said."""

    def __init__(self) -> None:
        residency = Residency()
        settings = EngineSettings(SLOTS, chunk_tokens=64, shared_chunk_tokens=16, prefix_cache_share=0.5)
        self.engine = Engine(residency, settings, SystemClock(), pytest.fail)
        self.runner = FakeRunner()
        self.compiler = FakeCompiler()
        self.outputs: list[Output] = []
        self.refusals: list[Refusal] = []
        residency.begin("m", "r1")
        for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
            residency.enter("r1", phase)
        residency.activate("r1", 5)
        self.session: EngineSession = self.engine.open_session()

    def ends(self, job: str) -> dict[int, Finish]:
        """How the sequences of a job have ended."""
        return {one.key.sequence: one.finish for one in self.outputs if one.key.job == job and one.finish}

    def tokens(self, job: str, sequence: int) -> list[int]:
        """A sequence's tokens, told without a gap."""
        said = [one for one in self.outputs if (one.key.job, one.key.sequence) == (job, sequence)]
        found: list[int] = []
        for one in said:
            assert one.index == said[0].index + len(found)
            found.extend(one.token_ids)
        return found

    async def read(self, job: str, ends: int, tokens: int = 0) -> None:
        """Receives until so many sequences of a job have ended, or it has so many tokens."""
        async with asyncio.timeout(10):
            while len(self.ends(job)) < ends or self._count(job) < tokens:
                letter = await self.session.receive()
                assert letter is not None
                self.outputs += letter.outputs
                self.refusals += letter.refusals

    async def refused(self) -> Refusal:
        """Receives until something was refused."""
        async with asyncio.timeout(10):
            while not self.refusals:
                letter = await self.session.receive()
                assert letter is not None
                self.outputs += letter.outputs
                self.refusals += letter.refusals
        return self.refusals.pop()

    def _count(self, job: str) -> int:
        return sum(len(one.token_ids) for one in self.outputs if one.key.job == job)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """An engine that is stopped afterwards."""
    made = Bench()
    made.engine.start()
    made.engine.host("r1", made.runner, made.compiler)
    yield made
    await made.engine.stop()


def job(
    bench: Bench,
    name: str,
    n: int,
    max_tokens: int = 6,
    *,
    credit: int = 1_000,
    emitted: dict[int, tuple[int, ...]] | None = None,
    prompt: tuple[int, ...] = PROMPT,
    form: Format | None = None,
) -> JobStart:
    """A job of so many sequences."""
    first = SequenceStart(SequenceKey(bench.session.number, name), prompt, max_tokens, (), credit)
    starts = [
        replace(first, key=replace(first.key, sequence=at), emitted_ids=(emitted or {}).get(at, ()))
        for at in range(n)
    ]
    return JobStart("m", "r1", 5, tuple(starts), f"req-{name}", form)


async def test_the_prompt_is_computed_once(bench: Bench) -> None:
    """Three sequences get their tokens, and the prompt has passed the model little more than once."""
    bench.session.start(job(bench, "a", 3))
    await bench.read("a", 3)
    assert bench.ends("a") == dict.fromkeys(range(3), Finish.LENGTH)
    assert [bench.tokens("a", at) for at in range(3)] == [continuation(PROMPT, 6)] * 3
    assert bench.runner.computed_tokens < len(PROMPT) + 3 * 6 + 3
    cached = [one.cached_prompt_tokens for one in bench.outputs if one.key.sequence == 0]
    assert set(cached) == {0}, "the first sequence found nothing: its prompt is what the others share"
    assert bench.session.idle
    assert bench.engine.pulse.free_slots == SLOTS


async def test_all_sequences_have_a_slot_or_none(bench: Bench) -> None:
    """With two of three slots free, a job of three is BUSY as a whole; one of two runs."""
    bench.session.start(job(bench, "held", 1, credit=0))
    bench.session.start(job(bench, "three", 3))
    refusal = await bench.refused()
    assert (refusal.key.job, refusal.reason) == ("three", Reason.BUSY)
    bench.session.start(job(bench, "two", 2))
    await bench.read("two", 2)
    assert not bench.ends("three")


async def test_more_sequences_than_slots_are_refused_in_words(bench: Bench) -> None:
    """INVALID names the field and the slots: waiting would not help."""
    bench.session.start(job(bench, "a", 4))
    refusal = await bench.refused()
    assert refusal.reason is Reason.INVALID
    assert refusal.message == "n: 4 sequences at once are more than the 3 slots of this worker."
    assert bench.session.idle


async def test_more_sequences_than_the_cache_holds_are_refused_in_words(bench: Bench) -> None:
    """Each would fit alone, all of them never: INVALID."""
    narrow = FakeRunner(replace(FACTS, kv_tokens=400))
    bench.engine.host("r1", narrow)
    bench.session.start(job(bench, "a", 3, max_tokens=80))
    refusal = await bench.refused()
    assert refusal.reason is Reason.INVALID
    assert refusal.message.startswith("n: ")


async def test_each_sequence_has_its_own_credit(bench: Bench) -> None:
    """Credit for one lets that one run on; the other waits, and says so."""
    bench.session.start(job(bench, "a", 2, credit=2))
    await bench.read("a", 0, tokens=4)
    assert bench.session.paused_jobs == 2
    bench.session.add_credit("a", 1, 100)
    await bench.read("a", 1)
    assert bench.ends("a") == {1: Finish.LENGTH}
    assert len(bench.tokens("a", 0)) == 2
    bench.session.add_credit("a", 0, 100)
    await bench.read("a", 2)
    assert bench.tokens("a", 0) == bench.tokens("a", 1) == continuation(PROMPT, 6)


async def test_one_sequence_is_cancelled_and_the_others_go_on(bench: Bench) -> None:
    """Its slot is free at once; a cancelled job ends all that are left."""
    bench.session.start(job(bench, "a", 3, max_tokens=100, credit=2))
    await bench.read("a", 0, tokens=6)
    bench.session.cancel("a", 1)
    await bench.read("a", 1)
    assert bench.ends("a") == {1: Finish.CANCELLED}
    bench.session.start(job(bench, "b", 1))
    await bench.read("b", 1)
    bench.session.cancel("a")
    await bench.read("a", 3)
    assert bench.ends("a") == dict.fromkeys(range(3), Finish.CANCELLED)
    assert bench.session.idle


async def test_cancelling_the_last_sequence_ends_the_job(bench: Bench) -> None:
    """Whoever cancels one after the other has cancelled the job."""
    bench.session.start(job(bench, "a", 2, max_tokens=100, credit=1))
    bench.session.cancel("a", 1)
    bench.session.cancel("a", 0)
    await bench.read("a", 2)
    assert bench.session.idle


async def test_sequences_go_on_where_other_workers_stopped(bench: Bench) -> None:
    """Each has its own tokens behind it, and none of them is told again."""
    whole = continuation(PROMPT, 9)
    emitted = {0: tuple(whole[:4]), 1: (), 2: tuple(whole[:7])}
    bench.session.start(job(bench, "a", 3, max_tokens=9, emitted=emitted))
    await bench.read("a", 3)
    for at, before in emitted.items():
        assert [*before, *bench.tokens("a", at)] == whole


async def test_each_sequence_has_its_own_constraint(bench: Bench) -> None:
    """A shape is compiled for each; what is cancelled meanwhile does not start, credit is not lost."""
    bench.session.start(job(bench, "a", 3, credit=1, form=SHAPE))
    bench.session.cancel("a", 1)
    bench.session.add_credit("a", 2, 9)
    bench.session.add_credit("a", 0, 2)
    bench.compiler.gate.set()
    await bench.read("a", 2)
    assert bench.ends("a") == {1: Finish.CANCELLED, 2: Finish.LENGTH}
    assert len(bench.compiler.asked) == 3
    await bench.read("a", 2, tokens=6 + 3)
    assert bench.tokens("a", 0) == continuation(PROMPT, 3)
    bench.session.cancel("a")
    await bench.read("a", 3)


def order(**fields: Any) -> worker_service_pb2.StartJob:
    """An order of three sequences; the second has emitted two tokens, the third has ended."""
    emitted = [
        worker_service_pb2.EmittedTokens(sequence=1, token_ids=[7, 8]),
        worker_service_pb2.EmittedTokens(sequence=2, token_ids=[9], ended=True),
    ]
    values: dict[str, Any] = {"job": "a", "prompt_ids": PROMPT, "max_tokens": 4, "n": 3, "emitted": emitted}
    return worker_service_pb2.StartJob(**(values | fields))


def test_an_order_names_the_sequences_that_go_on() -> None:
    """Those that ended are left out; each of the others has what it emitted."""
    read = read_job(order(), 5)
    assert [(one.key.sequence, one.emitted_ids) for one in read.starts] == [(0, ()), (1, (7, 8))]
    assert unserved(order()) is None
    assert [one.key.sequence for one in read_job(order(n=0, emitted=[]), 5).starts] == [0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 5}, "n"),
        ({"n": 2}, "emitted"),
        ({"emitted": [worker_service_pb2.EmittedTokens(token_ids=[1])] * 2}, "emitted"),
        ({"n": 1, "emitted": [worker_service_pb2.EmittedTokens(ended=True)]}, "emitted"),
    ],
    ids=["too many", "of no sequence", "told twice", "nothing left"],
)
def test_an_order_that_makes_no_sense_is_refused(fields: dict[str, Any], named: str) -> None:
    """The refusal names the field."""
    assert unserved(order(**fields)) == f"Not served by this worker: {named}."
