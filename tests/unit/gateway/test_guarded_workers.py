"""Workers behind breakers: when a trial is over, and what its end counts for after that."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.adapters import breakers
from services.gateway.adapters.breakers import Breakers
from services.gateway.adapters.guarded_workers import GuardedWorkerPool
from services.gateway.core.attempts import Loss, Output, RefusalReason
from services.gateway.core.breaker import BreakerLimits, State, Verdict
from services.gateway.core.events import FinishReason
from services.gateway.core.ports import Attempt
from services.gateway.core.retry import RetryBudget
from tests.fakes.controller_ports import FakeClock
from tests.fakes.gateway_ports import FakeWorkerPool, work_order

LIMITS = BreakerLimits(calls_min=2, failed_percent=50, sleep_s=5.0)
ORDER = work_order()


class Sink:
    """Who is told of the attempts."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.refusals: list[RefusalReason] = []
        self.losses: list[Loss] = []

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        self.outputs.append(output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        del message
        self.refusals.append(reason)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        del cause
        self.losses.append(loss)


class Board:
    """Remembers what it was told of the worker."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def list_open(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """See `BreakerBoard.list_open`."""
        del model, worker_id, sleep_s
        self.told.append("open")

    async def list_closed(self, model: str, worker_id: str) -> None:
        """See `BreakerBoard.list_closed`."""
        del model, worker_id
        self.told.append("closed")


class World:
    """A guarded pool over one that does nothing by itself."""

    def __init__(self) -> None:
        self.clock, self.fake, self.sink, self.board = FakeClock(), FakeWorkerPool(), Sink(), Board()
        self.breakers, self.budget = Breakers(self.clock, LIMITS), RetryBudget()
        self.breakers.use_board(self.board)
        self.pool = GuardedWorkerPool(self.fake, self.breakers, self.budget, self.clock)

    def start(self) -> Attempt:
        """Starts an attempt."""
        return self.pool.start("w1", "127.0.0.1:1", ORDER, self.sink)

    def speak(self, attempt: int = -1) -> None:
        """The worker says a token."""
        self.fake.attempts[attempt].sink.output(Output(0, (7,)))

    def lose(self, attempt: int = -1) -> None:
        """The worker gives an attempt up."""
        self.fake.attempts[attempt].sink.lost("test", Loss.JOB)

    def begin_trial(self) -> Attempt:
        """The breaker opens, sleeps, and lets one attempt through."""
        for _ in range(2):
            self.start()
            self.lose()
        assert self.state is State.OPEN
        self.clock.seconds += LIMITS.sleep_s
        return self.start()

    @property
    def state(self) -> State:
        """The breaker's state."""
        return self.breakers.worker("w1", "m").breaker.state

    @property
    def counted(self) -> tuple[int, int]:
        """Calls and failures in the window."""
        tally = self.breakers.worker("w1", "m").breaker.tally(self.clock.seconds)
        return tally.calls, tally.failures


async def test_a_trial_is_over_with_its_first_tokens() -> None:
    """Others are let through while it goes on, by the queue as well; until then they are not."""
    world = World()
    world.begin_trial()
    world.start()
    await asyncio.sleep(0)
    assert world.sink.refusals == [RefusalReason.BREAKER_OPEN]
    # Sequences that end, or a word without tokens, are no sign that it generates.
    world.fake.attempts[-1].sink.output(Output(0, (), FinishReason.STOP, others=1))
    assert world.state is State.HALF_OPEN
    world.speak()
    assert (world.state, world.counted) == (State.CLOSED, (0, 0))
    await asyncio.sleep(0)
    assert world.board.told[-1] == "closed"
    world.start()
    assert len(world.fake.attempts) == 4


@pytest.mark.parametrize(
    ("end", "counted"),
    [("finished", (1, 0)), ("lost", (1, 1)), ("cancelled", (0, 0)), ("broken", (1, 1)), ("stopped", (1, 0))],
)
async def test_how_a_trial_ends_after_that_is_an_ordinary_call_s_end(
    end: str, counted: tuple[int, int]
) -> None:
    """Counted once, however often it is told, and none of it opens the breaker alone."""
    world = World()
    trial = world.begin_trial()
    earned = world.budget.tokens
    world.speak()
    world.speak()
    match end:
        case "finished":
            world.fake.attempts[-1].sink.output(Output(2, (7,), FinishReason.STOP))
        case "lost":
            world.lose()
        case "cancelled":
            await trial.cancel()
        case "broken":
            await trial.cancel(Verdict.FAILURE)
        case _:
            await trial.cancel(Verdict.SUCCESS)
    await trial.cancel(Verdict.FAILURE)
    assert (world.state, world.counted) == (State.CLOSED, counted)
    assert (world.budget.tokens > earned) == (counted == (1, 0))


@pytest.mark.parametrize("verdict", [Verdict.NEUTRAL, Verdict.FAILURE])
async def test_a_trial_that_ends_before_it_speaks_opens_the_breaker_again(verdict: Verdict) -> None:
    """As it did: nobody has seen the worker generate."""
    world = World()
    trial = world.begin_trial()
    await trial.cancel(verdict)
    assert world.state is State.OPEN
    world.speak()
    assert world.state is State.OPEN


async def test_what_the_gateway_lost_itself_is_held_against_no_worker() -> None:
    """It stood still, and every worker let go of it: its requests go on, at no cost, and no breaker opens."""
    world = World()
    left = world.budget.tokens
    for _ in range(LIMITS.calls_min):
        world.start()
        world.fake.attempts[-1].sink.lost("test", Loss.ABSENCE)
    assert (world.state, world.counted, world.budget.tokens) == (State.CLOSED, (0, 0), left)
    world.budget.tokens = 0.0
    world.start()
    world.fake.attempts[-1].sink.lost("test", Loss.ABSENCE)
    assert world.sink.losses == [Loss.ABSENCE] * (LIMITS.calls_min + 1)


async def test_a_trial_that_is_overtaken_decides_nothing() -> None:
    """An operator holds the breaker meanwhile: neither its tokens nor its end count."""
    world = World()
    world.begin_trial()
    world.breakers.worker("w1", "m").force(State.FORCED_OPEN)
    world.speak()
    world.lose()
    assert (world.state, world.counted[1]) == (State.FORCED_OPEN, 2)


async def test_who_gets_no_calls_is_told_with_what_is_left_of_the_sleep() -> None:
    """For a queue that begins to lend: a worker that is tried sleeps as the trial's grant has listed it."""
    world = World()
    assert world.breakers.opened("m") == {}
    for _ in range(2):
        world.start()
        world.lose()
    world.clock.seconds += 2.0
    assert world.breakers.opened("m") == {"w1": pytest.approx(3.05)}
    assert world.breakers.opened("other") == {}
    world.clock.seconds += 3.5
    world.start()
    assert world.breakers.opened("m") == {"w1": 5.0}
    world.speak()
    assert world.breakers.opened("m") == {}
    world.breakers.hold({"w1": State.FORCED_OPEN})
    assert world.breakers.opened("m") == {"w1": None}
    await world.breakers.close()


async def test_a_board_that_fails_unforeseen_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stayed listed as open would get no calls any more."""
    monkeypatch.setattr(breakers, "TELL_AGAIN_S", 0.0)
    world = World()
    world.begin_trial()
    listed, fails = world.board.list_closed, [RuntimeError()]

    async def list_closed(model: str, worker_id: str) -> None:
        if fails:
            raise fails.pop()
        await listed(model, worker_id)

    monkeypatch.setattr(world.board, "list_closed", list_closed)
    world.speak()
    async with asyncio.timeout(5):
        while world.board.told[-1:] != ["closed"]:  # noqa: ASYNC110 - the board tells nobody
            await asyncio.sleep(0)
