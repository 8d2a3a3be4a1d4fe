"""The engine: sessions, credit, cancellation, failures and the watchdog, over a runner without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from services.common.clock import Clock
from services.common.errors import ArgumentInvalid
from services.common.system_clock import SystemClock
from services.worker.core.admission import JobStart, Reason
from services.worker.core.format import Format, FormatBusy, FormatKind
from services.worker.core.outbox import Letter
from services.worker.core.revision import Phase, Residency
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart
from services.worker.engine import Engine, EngineSession, EngineSettings
from tests.fakes.turned_clock import TurnedClock
from tests.fakes.worker_ports import FakeCompiler, FakeRunner, continuation

PROMPT = (3, 1, 4, 1, 5)
SHAPE = Format(FormatKind.REGEX, ("a+",))


class Bench:
    """An engine with one active revision, and what it told."""

    def __init__(self, settings: EngineSettings, clock: Clock | None = None) -> None:
        self.residency = Residency()
        self.deaths: list[str] = []
        self.died = asyncio.Event()
        self.engine = Engine(self.residency, settings, clock or SystemClock(), self._die)
        self.runner = FakeRunner()

    def host(self, revision: str) -> FakeRunner:
        """Takes in another revision and activates it."""
        runner = FakeRunner()
        self.engine.host(revision, runner)
        activate(self.residency, revision)
        return runner

    def _die(self, cause: str) -> None:
        self.deaths.append(cause)
        self.died.set()


def activate(residency: Residency, revision: str, epoch: int = 5) -> None:
    """Brings a revision through its phases."""
    residency.begin("m", revision)
    for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
        residency.enter(revision, phase)
    residency.activate(revision, epoch)


@pytest.fixture
def clock() -> Clock:
    """The time of the bench."""
    return SystemClock()


@pytest.fixture
async def bench(clock: Clock) -> AsyncIterator[Bench]:
    """An engine that is stopped afterwards."""
    made = Bench(EngineSettings(slots=2, chunk_tokens=64, shared_chunk_tokens=16, watchdog_s=0.5), clock)
    made.engine.start()
    made.engine.host("r1", made.runner)
    activate(made.residency, "r1")
    yield made
    if made.runner.gate is not None:
        made.runner.gate.set()
    await made.engine.stop()


def job(
    session: EngineSession,
    name: str,
    max_tokens: int = 4,
    *,
    credit: int = 1_000,
    revision: str = "r1",
    attempt: int = 1,
    epoch: int = 5,
    form: Format | None = None,
) -> JobStart:
    """A job with the usual prompt."""
    key = SequenceKey(session.number, name, attempt)
    start = SequenceStart(key, PROMPT, max_tokens, (), credit)
    return JobStart("m", revision, epoch, (start,), f"req-{name}", form)


async def read_until_finish(session: EngineSession, names: set[str]) -> list[Output]:
    """Receives until each named job has its finish."""
    outputs: list[Output] = []
    open_names = set(names)
    async with asyncio.timeout(10):
        while open_names:
            letter = await session.receive()
            assert letter is not None
            outputs.extend(letter.outputs)
            open_names -= {output.key.job for output in letter.outputs if output.finish}
    return outputs


async def read_refusal(session: EngineSession) -> Letter:
    """Receives until something was refused."""
    async with asyncio.timeout(10):
        while (letter := await session.receive()) is not None:
            if letter.refusals:
                return letter
    raise AssertionError("the session was closed")


def tokens_of(outputs: list[Output], name: str) -> list[int]:
    """A job's tokens."""
    return [token for output in outputs if output.key.job == name for token in output.token_ids]


async def test_jobs_of_a_session_run_together(bench: Bench) -> None:
    """Two jobs get their own tokens, and the slots are free at the end."""
    session = bench.engine.open_session()
    session.start(job(session, "a", 6))
    session.start(job(session, "b", 9))
    outputs = await read_until_finish(session, {"a", "b"})
    assert tokens_of(outputs, "a") == continuation(PROMPT, 6)
    assert tokens_of(outputs, "b") == continuation(PROMPT, 9)
    assert bench.engine.pulse.free_slots == 2
    assert session.idle


async def test_a_job_beyond_the_slots_is_refused_busy(bench: Bench) -> None:
    """The third job of two slots is BUSY; the others go on."""
    session = bench.engine.open_session()
    for name in ("a", "b", "c"):
        session.start(job(session, name, 5, credit=0))
    letter = await read_refusal(session)
    assert [(one.key.job, one.reason) for one in letter.refusals] == [("c", Reason.BUSY)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"revision": "r9"}, Reason.REVISION_NOT_READY),
        ({"epoch": 4}, Reason.EPOCH_STALE),
        ({"max_tokens": 0}, Reason.INVALID),
        ({"max_tokens": 1_000}, Reason.INVALID),
    ],
)
async def test_what_cannot_run_is_refused(bench: Bench, change: dict[str, int], reason: Reason) -> None:
    """Each cause has its reason, and nothing is generated."""
    session = bench.engine.open_session()
    session.start(job(session, "a", **change))  # type: ignore[arg-type] # parametrized
    letter = await read_refusal(session)
    assert letter.refusals[0].reason is reason
    assert session.idle


async def test_a_draining_worker_refuses(bench: Bench) -> None:
    """While it drains, every new job is refused, and one that runs ends."""
    session = bench.engine.open_session()
    session.start(job(session, "a", 50))
    bench.residency.draining = True
    session.start(job(session, "b"))
    letter = await read_refusal(session)
    assert letter.refusals[0].reason is Reason.DRAINING
    reading = asyncio.create_task(read_until_finish(session, {"a"}))
    async with asyncio.timeout(10):
        await bench.engine.drained()
    reading.cancel()


async def test_a_job_that_runs_is_not_started_twice(bench: Bench) -> None:
    """The same attempt again is INVALID and the first goes on; a later attempt replaces it."""
    session = bench.engine.open_session()
    session.start(job(session, "a", 6, credit=2))
    session.start(job(session, "a", 6))
    letter = await read_refusal(session)
    assert letter.refusals[0].reason is Reason.INVALID
    session.start(job(session, "a", 6, attempt=2))
    async with asyncio.timeout(10):
        finished: dict[int, Finish] = {}
        while 2 not in finished:
            received = await session.receive()
            assert received is not None
            finished |= {one.key.attempt: one.finish for one in received.outputs if one.finish}
    assert finished[2] is Finish.LENGTH
    assert finished.get(1, Finish.CANCELLED) is Finish.CANCELLED


async def test_a_cancelled_job_ends_within_two_steps(bench: Bench) -> None:
    """After a cancellation at most one further step runs for the job, and its slot is free."""
    bench.runner.gate = threading.Event()
    session = bench.engine.open_session()
    session.start(job(session, "a", 100))
    await asyncio.to_thread(bench.runner.entered.wait, 10)
    session.cancel("a")
    steps = len(bench.runner.batches)
    bench.runner.gate.set()
    outputs = await read_until_finish(session, {"a"})
    assert outputs[-1].finish is Finish.CANCELLED
    assert len(bench.runner.batches) <= steps + 1
    assert bench.engine.pulse.free_slots == 2


async def test_closing_a_session_cancels_its_jobs_alone(bench: Bench) -> None:
    """The jobs of a session that ends are cancelled; another session's job is complete."""
    leaving, staying = bench.engine.open_session(), bench.engine.open_session()
    leaving.start(job(leaving, "a", 200, credit=3))
    staying.start(job(staying, "b", 8))
    leaving.close()
    assert await leaving.receive() is None
    outputs = await read_until_finish(staying, {"b"})
    assert tokens_of(outputs, "b") == continuation(PROMPT, 8)
    staying.start(job(staying, "c", 2))
    staying.start(job(staying, "d", 2))
    await read_until_finish(staying, {"c", "d"})
    assert bench.engine.pulse.running == 0


async def test_credit_pauses_and_resumes(bench: Bench) -> None:
    """A job without credit is paused and told so; credit lets it go on."""
    session = bench.engine.open_session()
    session.start(job(session, "a", 6, credit=2))
    found: list[Output] = []
    while len(tokens_of(found, "a")) < 2:
        letter = await session.receive()
        assert letter is not None
        found += letter.outputs
    assert session.paused_jobs == 1
    session.add_credit("a", 0, 10)
    found += await read_until_finish(session, {"a"})
    assert tokens_of(found, "a") == continuation(PROMPT, 6)


@pytest.fixture
def compiler(bench: Bench) -> FakeCompiler:
    """The compiler of revision r2, which is active."""
    made = FakeCompiler()
    bench.engine.host("r2", FakeRunner(), made)
    activate(bench.residency, "r2")
    return made


async def test_a_format_is_compiled_beside_the_steps(bench: Bench, compiler: FakeCompiler) -> None:
    """Others stream while it compiles; credit that comes meanwhile is not lost."""
    session = bench.engine.open_session()
    session.start(job(session, "shaped", 4, credit=1, revision="r2", form=SHAPE))
    session.start(job(session, "plain", 5))
    assert tokens_of(await read_until_finish(session, {"plain"}), "plain") == continuation(PROMPT, 5)
    session.add_credit("shaped", 0, 9)
    compiler.gate.set()
    assert tokens_of(await read_until_finish(session, {"shaped"}), "shaped") == continuation(PROMPT, 4)
    assert compiler.asked == [(SHAPE, ())]


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (ArgumentInvalid("format.regex: no."), Reason.INVALID, "format.regex: no."),
        (FormatBusy(), Reason.BUSY, ""),
        (RuntimeError("a path"), Reason.INVALID, "format: the worker could not compile it."),
    ],
    ids=["invalid", "busy", "crashed"],
)
async def test_a_format_that_cannot_be_compiled_is_refused(
    bench: Bench, compiler: FakeCompiler, error: Exception, reason: Reason, message: str
) -> None:
    """The refusal has its reason and words, and the session is idle again."""
    session = bench.engine.open_session()
    compiler.error = error
    compiler.gate.set()
    session.start(job(session, "a", revision="r2", form=SHAPE))
    (refusal,) = (await read_refusal(session)).refusals
    assert (refusal.reason, refusal.message) == (reason, message)
    await bench.engine.drained()


async def test_a_job_is_cancelled_while_its_format_compiles(bench: Bench, compiler: FakeCompiler) -> None:
    """It ends at once, by the client's word, by a later attempt or with its session; nothing starts later."""
    session = bench.engine.open_session()
    session.start(job(session, "a", revision="r2", form=SHAPE))
    session.cancel("a")
    (ended,) = await read_until_finish(session, {"a"})
    assert ended.finish is Finish.CANCELLED
    session.start(job(session, "b", revision="r2", form=SHAPE))
    session.start(job(session, "b", revision="r2", attempt=2, form=SHAPE))
    (ended,) = await read_until_finish(session, {"b"})
    assert (ended.key.attempt, ended.finish) == (1, Finish.CANCELLED)
    session.close()
    compiler.gate.set()
    other = bench.engine.open_session()
    other.start(job(other, "c"))
    await read_until_finish(other, {"c"})
    assert bench.engine.pulse.running == 0


async def test_a_revision_without_a_compiler_refuses_formats(bench: Bench) -> None:
    """INVALID names the field."""
    session = bench.engine.open_session()
    session.start(job(session, "a", form=SHAPE))
    (refusal,) = (await read_refusal(session)).refusals
    assert (refusal.reason, "format" in refusal.message) == (Reason.INVALID, True)


async def test_a_failed_step_ends_its_jobs_with_error_and_later_ones_run(bench: Bench) -> None:
    """One exception of the runner costs the running jobs, not the worker."""
    bench.runner.error = RuntimeError("boom")
    session = bench.engine.open_session()
    session.start(job(session, "a"))
    outputs = await read_until_finish(session, {"a"})
    assert outputs[-1].finish is Finish.ERROR
    session.start(job(session, "b"))
    assert tokens_of(await read_until_finish(session, {"b"}), "b") == continuation(PROMPT, 4)
    assert bench.deaths == []


async def test_a_step_that_hangs_is_fatal(bench: Bench) -> None:
    """The watchdog tells of a step that does not end, once."""
    bench.runner.gate = threading.Event()
    session = bench.engine.open_session()
    session.start(job(session, "a"))
    async with asyncio.timeout(10):
        await bench.died.wait()
    assert len(bench.deaths) == 1


@pytest.mark.parametrize("clock", [TurnedClock()])
async def test_a_step_in_which_the_process_stood_still_is_given_its_time(
    bench: Bench, clock: TurnedClock
) -> None:
    """One that was stopped for a minute has not hung; from when it goes on the watchdog judges as ever."""
    bench.runner.gate = threading.Event()
    session = bench.engine.open_session()
    session.start(job(session, "a"))
    await asyncio.to_thread(bench.runner.entered.wait, 10)
    clock.turn(60)
    # The watchdog has looked by then: its timer began before this one, and is shorter.
    await asyncio.sleep(0.1)
    assert bench.deaths == []
    async with asyncio.timeout(10):
        while not bench.died.is_set():
            clock.turn(0.1)
            await asyncio.sleep(0.01)


async def test_an_unload_that_nobody_waits_for_any_more_costs_no_other_word(bench: Bench) -> None:
    """What the same step told of other revisions is delivered, and no listener is passed over."""
    flaws: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: flaws.append(context))
    second = bench.host("r2")
    bench.runner.gate = threading.Event()
    session = bench.engine.open_session()
    session.start(job(session, "a", 2))
    await asyncio.to_thread(bench.runner.entered.wait, 10)
    unloading = asyncio.create_task(bench.engine.unload("r2"))
    await asyncio.sleep(0)
    unloading.cancel()
    await asyncio.gather(unloading, return_exceptions=True)
    bench.runner.gate.set()
    assert tokens_of(await read_until_finish(session, {"a"}), "a") == continuation(PROMPT, 2)
    assert second.closed
    assert flaws == []


async def test_two_revisions_run_side_by_side_and_one_leaves(bench: Bench) -> None:
    """Jobs of both end; an unloaded revision is closed once its last job has ended."""
    second = bench.host("r2")
    session = bench.engine.open_session()
    session.start(job(session, "a", 30))
    session.start(job(session, "b", 30, revision="r2"))
    unloading = asyncio.create_task(bench.engine.unload("r2"))
    outputs = await read_until_finish(session, {"a", "b"})
    await asyncio.wait_for(unloading, 10)
    assert second.closed
    assert tokens_of(outputs, "a") == tokens_of(outputs, "b") == continuation(PROMPT, 30)
