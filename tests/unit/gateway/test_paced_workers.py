"""Tokens that are told in turns: what waits, what never does, and that nothing is lost or mixed up by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.adapters.pace import PAUSE_MAX_S, TURN_S, Pace
from services.gateway.adapters.paced_workers import PacedWorkerPool
from services.gateway.core.attempts import Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.events import FinishReason, TokenLogprob
from services.gateway.core.params import SamplingParams
from services.gateway.core.ports import Attempt
from tests.fakes.gateway_ports import FakeAttempt, FakeWorkerPool

# At this rate even one stream pauses as long as any may.
RARE = 0.001
ORDER = WorkOrder(
    job_id="j",
    attempt=1,
    request_id="q",
    model="m",
    revision="r1",
    epoch=1,
    prompt_ids=(1,),
    emitted=((), ()),
    max_tokens=100,
    sampling=SamplingParams(),
    credit_tokens=16,
)


class ByHand(Pace):
    """Turns come when the test says so."""

    def __init__(self) -> None:
        super().__init__(RARE)
        self.waiting: dict[Callable[[], None], None] = {}
        self.open = False

    def await_turn(self, told_s: float, come: Callable[[], None]) -> bool:
        """See `Pace.await_turn`."""
        assert 0 < told_s <= asyncio.get_running_loop().time()
        if not self.open:
            self.waiting[come] = None
        return self.open

    def forgo(self, come: Callable[[], None]) -> None:
        """See `Pace.forgo`."""
        self.waiting.pop(come, None)

    def turn(self) -> None:
        """It is one now."""
        waiting, self.waiting = self.waiting, {}
        for come in waiting:
            come()


class World:
    """An attempt at a worker that the test plays."""

    def __init__(self, pace: Pace | None = None, order: WorkOrder = ORDER) -> None:
        self.pace = ByHand() if pace is None else pace
        self.heard: list[Output] = []
        self.ends: list[str] = []
        self.reaction: Callable[[Output], None] = lambda _: None
        self.fake = FakeWorkerPool()
        pool = PacedWorkerPool(self.fake, self.pace)
        self.attempt: Attempt = pool.start("w", "h:1", order, self)

    @property
    def below(self) -> FakeAttempt:
        """The attempt, as the worker has it."""
        return self.fake.attempts[0]

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        self.heard.append(output)
        self.reaction(output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        self.ends.append(f"refused {reason} {message}")

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        self.ends.append(f"lost {loss} {cause}")

    def say(self, *ids: int, sequence: int = 0) -> None:
        """The worker generates tokens; each is its own index."""
        for token_id in ids:
            self.below.sink.output(Output(token_id, (token_id,), sequence=sequence))

    def turn(self) -> None:
        """A turn by hand."""
        assert isinstance(self.pace, ByHand)
        self.pace.turn()

    def told(self, sequence: int = 0) -> list[tuple[int, ...]]:
        """The tokens of each output of a sequence."""
        return [output.token_ids for output in self.heard if output.sequence == sequence]


async def test_the_first_token_does_not_wait_and_the_next_ones_come_together() -> None:
    """Of each sequence."""
    world = World()
    world.say(0, 1, 2)
    world.say(0, 1, sequence=1)
    assert (world.told(), world.told(1)) == ([(0,)], [(0,)])
    world.turn()
    assert (world.told(), world.told(1)) == ([(0,), (1, 2)], [(0,), (1,)])
    assert [output.index for output in world.heard] == [0, 0, 1, 1]


async def test_an_end_tells_what_waits_with_it() -> None:
    """As one output, with what the end says; the other sequence waits on."""
    world = World()
    world.say(0, 1)
    world.say(0, 1, sequence=1)
    world.below.sink.output(Output(2, (2,), FinishReason.LENGTH, others=1))
    assert world.heard[-1] == Output(1, (1, 2), FinishReason.LENGTH, others=1)
    assert world.told(1) == [(0,)]
    world.turn()
    assert world.told(1) == [(0,), (1,)]


async def test_an_end_without_tokens_tells_what_waits() -> None:
    """A worker may end a text after its last token."""
    world = World()
    world.say(0, 1, 2)
    world.below.sink.output(Output(3, (), FinishReason.STOP))
    assert world.heard[-1] == Output(1, (1, 2), FinishReason.STOP)


@pytest.mark.parametrize("end", ["lost", "refused"])
async def test_what_waits_is_told_before_a_loss(end: str) -> None:
    """It was generated: who goes on elsewhere goes on behind it."""
    world = World()
    world.say(0, 1, 2)
    if end == "lost":
        world.below.sink.lost("it died", Loss.PROCESS)
    else:
        world.below.sink.refused(RefusalReason.DRAINING, "it leaves")
    assert world.told() == [(0,), (1, 2)]
    assert len(world.ends) == 1
    world.turn()
    assert world.told() == [(0,), (1, 2)]


def cancel(world: World) -> None:
    """The request ends its attempt."""
    world.attempt.cancel()


def fail() -> None:
    """A defect."""
    raise ValueError("a defect")


async def test_who_cancels_hears_nothing_more() -> None:
    """What waits is dropped; nor is a loss told that its last words made the request cancel."""
    world = World()
    world.say(0, 1)
    world.attempt.cancel()
    world.turn()
    assert (world.told(), world.below.cancelled) == ([(0,)], True)
    other = World()
    other.say(0, 1)
    other.reaction = lambda _: cancel(other)
    other.below.sink.lost("it died", Loss.PROCESS)
    assert (other.told(), other.ends) == ([(0,), (1,)], [])


async def test_a_sequence_that_is_ended_is_told_no_more() -> None:
    """The other one goes on; also where the first one's last words end it."""
    world = World()
    world.say(0, 1)
    world.say(0, 1, sequence=1)
    world.reaction = lambda output: world.attempt.end(1) if output.sequence == 0 else None
    world.turn()
    assert (world.told(), world.told(1)) == ([(0,), (1,)], [(0,)])
    assert world.below.ended == [1]


async def test_a_worker_near_the_end_of_its_credit_is_not_kept_waiting() -> None:
    """A quarter of it is told whether or not it is a turn."""
    world = World()
    world.say(*range(10))
    assert world.told() == [(0,), (1, 2, 3, 4), (5, 6, 7, 8)]


async def test_what_does_not_fit_is_told_as_it_is() -> None:
    """A gap, and scores that are missing: whoever hears it judges the worker by what it said."""
    world = World()
    world.say(0, 1, 3)
    assert world.told() == [(0,), (1,)]
    world.turn()
    assert [(output.index, output.token_ids) for output in world.heard[2:]] == [(3, (3,))]
    score = TokenLogprob(-1.0, ())
    scored = World(order=replace(ORDER, logprobs=0))
    for index in range(3):
        scored.below.sink.output(Output(index, (index,), logprobs=(score,)))
    scored.below.sink.output(Output(3, (3,)))
    assert [output.logprobs for output in scored.heard] == [(score,), (score, score)]
    scored.turn()
    assert scored.heard[-1].logprobs == ()


async def test_who_ends_the_attempt_over_what_does_not_fit_hears_nothing_more() -> None:
    """Nor does it count any more: a gap tells what was before it, and that makes the request give up."""
    world = World()
    world.say(0, 1)
    world.reaction = lambda _: cancel(world)
    world.say(3)
    world.turn()
    assert world.told() == [(0,), (1,)]
    assert world.pace.pause_s == 0.0


async def test_an_end_is_told_whatever_the_last_words_do() -> None:
    """A defect in what hears them must not leave the request waiting for it."""
    world = World()
    world.say(0, 1)
    world.reaction = lambda _: fail()
    world.below.sink.lost("it died", Loss.PROCESS)
    assert len(world.ends) == 1
    assert world.pace.pause_s == 0.0


async def test_many_tokens_at_once_do_not_wait() -> None:
    """A worker that sends so many has used its credit, or will soon."""
    world = World()
    world.say(0)
    world.below.sink.output(Output(1, (1, 2, 3, 4)))
    assert world.told() == [(0,), (1, 2, 3, 4)]


async def test_an_attempt_counts_while_it_runs() -> None:
    """From its first token to its end, whatever that is, each sequence; those that wait do not count."""
    pace = ByHand()
    first, second = World(pace), World(pace)
    assert pace.pause_s == 0.0
    first.say(0)
    first.say(0, sequence=1)
    second.say(0)
    assert pace.pause_s == PAUSE_MAX_S
    first.below.sink.output(Output(1, (1,), FinishReason.STOP, others=1))
    first.attempt.cancel()
    first.attempt.cancel()
    second.below.sink.lost("it died", Loss.PROCESS)
    assert pace.pause_s == 0.0


ACTIONS = st.one_of(
    st.tuples(st.just("say"), st.integers(0, 1), st.integers(0, 3)),
    st.tuples(st.just("finish"), st.integers(0, 1), st.integers(0, 2)),
    st.tuples(st.sampled_from(["turn", "open", "close", "lost"]), st.just(0), st.just(0)),
)


@given(st.lists(ACTIONS, max_size=40))
async def test_whatever_happens_each_sequence_is_told_whole_and_in_order(
    actions: list[tuple[str, int, int]],
) -> None:
    """Once it has ended, or the worker was lost, nothing that was said is missing, double or late."""
    world, said, ended = World(), {0: 0, 1: 0}, set[int]()
    pace = world.pace
    assert isinstance(pace, ByHand)
    for action, sequence, count in actions:
        if action == "turn":
            pace.turn()
        elif action in {"open", "close"}:
            pace.open = action == "open"
        elif action == "lost":
            world.below.sink.lost("it died", Loss.PROCESS)
            ended |= {0, 1}
            break
        elif sequence not in ended:
            ids = tuple(range(said[sequence], said[sequence] + count))
            finish = FinishReason.STOP if action == "finish" else None
            world.below.sink.output(Output(said[sequence], ids, finish, sequence=sequence))
            said[sequence] += count
            ended |= {sequence} if finish else set()
    for sequence, count in said.items():
        told = [token_id for ids in world.told(sequence) for token_id in ids]
        assert told == list(range(len(told)))
        assert len(told) == count or (len(told) < count and sequence not in ended)


# --- the turns themselves -----------------------------------------------------------------------------------


def test_a_pause_grows_with_the_streams_up_to_its_most() -> None:
    """So many streams, so many events a second together; no bound, no pause."""
    pace = Pace(100.0)
    assert pace.pause_s == 0.0
    pace.begin(3)
    assert pace.pause_s == pytest.approx(0.03)
    pace.begin(1_000)
    assert pace.pause_s == PAUSE_MAX_S
    pace.end(1_003)
    assert pace.pause_s == 0.0
    free = Pace(0.0)
    free.begin(1_000)
    assert free.pause_s == 0.0


async def test_all_streams_have_the_same_turn() -> None:
    """The first to come after a pause begins one; those that come later wait for the next, together."""
    pace, came = Pace(RARE), asyncio.Queue[str]()
    pace.begin(1)
    loop = asyncio.get_running_loop()
    assert pace.await_turn(loop.time(), lambda: came.put_nowait("nobody"))
    await asyncio.sleep(5 * TURN_S)
    for name in ("a", "b", "c"):
        assert not pace.await_turn(loop.time(), lambda name=name: came.put_nowait(name))  # type: ignore[misc]
    async with asyncio.timeout(10.0):
        assert [await came.get() for _ in range(3)] == ["a", "b", "c"]
    assert pace.await_turn(loop.time(), lambda: came.put_nowait("nobody"))


async def test_who_was_told_nothing_for_a_pause_does_not_wait_for_a_turn() -> None:
    """A slow worker's stream among quick ones, or one that stood still."""
    pace = Pace(RARE)
    pace.begin(1)
    loop = asyncio.get_running_loop()
    assert pace.await_turn(loop.time(), lambda: None)
    await asyncio.sleep(5 * TURN_S)
    assert not pace.await_turn(loop.time(), lambda: None)
    assert pace.await_turn(loop.time() - PAUSE_MAX_S, lambda: None)


async def test_who_does_not_wait_any_more_is_not_called_nor_is_one_hurt_by_another() -> None:
    """A turn goes on where one of those that wait fails."""
    pace, came, failed = Pace(RARE), asyncio.Event(), asyncio.Event()
    pace.begin(1)
    loop = asyncio.get_running_loop()
    assert pace.await_turn(loop.time(), came.set)
    await asyncio.sleep(5 * TURN_S)
    gone = asyncio.Event()
    loop.set_exception_handler(lambda *_: failed.set())

    def fail() -> None:
        raise ValueError

    for come in (gone.set, fail, came.set):
        assert not pace.await_turn(loop.time(), come)
    pace.forgo(gone.set)
    async with asyncio.timeout(10.0):
        await came.wait()
        await failed.wait()
    assert not gone.is_set()
