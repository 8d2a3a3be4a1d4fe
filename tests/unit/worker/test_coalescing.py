"""Tokens that are told together: what is held back, what never is, and that nothing is lost by it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.admission import JobStart, Reason, Refusal
from services.worker.core.outbox import Outbox
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart, TokenScore
from services.worker.core.turns import HOLD_S_MAX, Turns
from services.worker.engine.session import EngineSession
from tests.fakes.worker_ports import FakeHost

LONG_MS = 1_000
# Longer than any test takes, and than a gateway may ask for.
LONG_S = 600.0
SHORT_MS = 20
CREDIT = 40


class World:
    """A session whose turns come when the test says so, with one job of two sequences."""

    def __init__(self, hold_ms: int = LONG_MS) -> None:
        self.session = EngineSession(1, FakeHost())
        self.session.start(JobStart("m", "r", 1, tuple(map(start_of, range(2))), "q", None))
        self._hold(hold_ms)

    def step(self, *outputs: Output) -> None:
        """A step ends."""
        for output in outputs:
            self.session.put(output)
        self.session.wake()

    def say(self, *ids: int, sequence: int = 0) -> None:
        """So many steps of one sequence; each token is its own index."""
        for token_id in ids:
            self.step(Output(key_of(sequence), token_id, (token_id,)))

    def turn(self) -> None:
        """It is a turn."""
        self._hold(LONG_MS)

    def _hold(self, hold_ms: int) -> None:
        self.session.coalesce(0)
        self.session.coalesce(hold_ms)
        if hold_ms == LONG_MS:
            self.session._turns.hold_s = LONG_S

    async def read(self) -> list[Output]:
        """What is to be written now."""
        letter = await asyncio.wait_for(self.session.receive(), 10)
        assert letter is not None
        return list(letter.outputs)

    @property
    def silent(self) -> bool:
        """Whether nothing is to be written now."""
        return self.session._outbox.empty


def key_of(sequence: int, attempt: int = 1) -> SequenceKey:
    """A sequence of the job."""
    return SequenceKey(1, "j", attempt, sequence)


def start_of(sequence: int, attempt: int = 1) -> SequenceStart:
    """How it starts."""
    return SequenceStart(key_of(sequence, attempt), (1, 2), 100, (), CREDIT)


async def test_the_first_token_does_not_wait_and_the_next_ones_come_together() -> None:
    """Of each sequence."""
    world = World()
    world.say(0)
    assert await world.read() == [Output(key_of(0), 0, (0,))]
    world.say(1, 2)
    assert world.silent
    world.say(0, sequence=1)
    assert await world.read() == [Output(key_of(1), 0, (0,))]
    world.turn()
    assert await world.read() == [Output(key_of(0), 1, (1, 2))]


async def test_an_end_takes_along_what_is_held_back() -> None:
    """As one output; the other sequence waits on."""
    world = World()
    for sequence in range(2):
        world.say(0, sequence=sequence)
    await world.read()
    for sequence in range(2):
        world.say(1, sequence=sequence)
    world.step(Output(key_of(0), 2, (2,), Finish.LENGTH))
    assert await world.read() == [Output(key_of(0), 1, (1, 2), Finish.LENGTH)]
    assert world.silent
    world.step(Output(key_of(1), 2, (), Finish.STOP))
    assert await world.read() == [Output(key_of(1), 1, (1,), Finish.STOP)]
    assert world.session.idle


async def test_what_is_held_back_is_told_when_its_time_is_over() -> None:
    """Also where no step ends any more, and each time anew."""
    world = World(SHORT_MS)
    world.say(0)
    await world.read()
    for token_id in range(1, 4):
        world.say(token_id)
        assert await world.read() == [Output(key_of(0), token_id, (token_id,))]


async def test_a_step_after_a_whole_hold_is_told_at_once() -> None:
    """A worker that was slow, or stood still, keeps nobody waiting longer."""
    world = World(SHORT_MS)
    world.say(0)
    await world.read()
    await asyncio.sleep(2 * SHORT_MS / 1_000)
    world.say(1)
    assert not world.silent


async def test_a_sequence_near_the_end_of_its_credit_is_not_held_back() -> None:
    """A quarter of it is told whether or not it is a turn: it would pause with tokens nobody heard of."""
    world = World()
    world.say(0)
    await world.read()
    world.say(*range(1, CREDIT // 4))
    assert world.silent
    world.say(CREDIT // 4)
    assert await world.read() == [Output(key_of(0), 1, tuple(range(1, CREDIT // 4 + 1)))]


async def test_scores_are_told_with_their_tokens() -> None:
    """And what was found of the prompt with the first."""
    world = World()
    scores = [TokenScore(-float(index), ()) for index in range(3)]
    world.step(Output(key_of(0), 0, (0,), None, (scores[0],), 7))
    for index in (1, 2):
        world.step(Output(key_of(0), index, (index,), None, (scores[index],)))
    world.step(Output(key_of(0), 3, (), Finish.ERROR))
    outputs = await world.read()
    assert outputs == [Output(key_of(0), 0, (0, 1, 2), Finish.ERROR, tuple(scores), 7)]


async def test_what_the_writer_has_not_fetched_takes_more_along() -> None:
    """Tokens never overtake those before them."""
    world = World()
    world.say(0, 1, 2)
    assert await world.read() == [Output(key_of(0), 0, (0, 1, 2))]


async def test_a_closed_session_still_tells_what_it_held() -> None:
    """It was generated."""
    world = World()
    world.say(0)
    await world.read()
    world.say(1)
    world.session.close()
    assert await world.read() == [Output(key_of(0), 1, (1,))]
    assert await world.session.receive() is None


async def test_a_refusal_does_not_wait() -> None:
    """Nor does it take along what is held back."""
    world = World()
    world.say(0)
    await world.read()
    world.say(1)
    world.session.refuse(Refusal(SequenceKey(1, "other"), Reason.BUSY))
    letter = await world.session.receive()
    assert letter is not None
    assert (letter.outputs, len(letter.refusals)) == ((), 1)


async def test_an_attempt_that_is_replaced_is_told_before_its_end() -> None:
    """Each attempt has its own tokens."""
    world = World()
    world.say(0)
    await world.read()
    world.say(1)
    world.session.start(JobStart("m", "r", 1, (start_of(0, attempt=2),), "q", None))
    world.step(Output(key_of(0, attempt=2), 0, (7,)))
    world.step(Output(key_of(0), 2, (), Finish.CANCELLED))
    assert await world.read() == [
        Output(key_of(0, attempt=2), 0, (7,)),
        Output(key_of(0), 1, (1,), Finish.CANCELLED),
    ]


async def test_nothing_is_held_back_unless_it_is_asked_for() -> None:
    """Nor any more when it is asked for no longer."""
    world = World(0)
    for token_id in range(3):
        world.say(token_id)
        assert await world.read() == [Output(key_of(0), token_id, (token_id,))]
    world.turn()
    world.say(3)
    assert world.silent
    world.session.coalesce(0)
    assert await world.read() == [Output(key_of(0), 3, (3,))]


ACTIONS = st.tuples(st.sampled_from(["hold", "put", "release", "take"]), st.integers(0, 1), st.integers(0, 3))


@given(st.lists(ACTIONS, max_size=40))
def test_an_outbox_tells_each_sequence_whole_and_in_order(actions: list[tuple[str, int, int]]) -> None:
    """Whatever is held back, released and read in between."""
    outbox, said, heard = Outbox(), {0: 0, 1: 0}, dict[int, list[int]]({0: [], 1: []})

    def take() -> None:
        for output in outbox.take().outputs:
            told = heard[output.key.sequence]
            assert output.index == len(told)
            told.extend(output.token_ids)

    for action, sequence, count in actions:
        index = said[sequence]
        output = Output(key_of(sequence), index, tuple(range(index, index + count)))
        if action in {"hold", "put"}:
            said[sequence] += count
        match action:
            case "hold":
                outbox.hold(output, 5)
            case "put":
                outbox.put_output(output)
            case "release":
                outbox.release()
            case "take":
                take()
    outbox.release()
    take()
    assert heard == {sequence: list(range(count)) for sequence, count in said.items()}
    assert outbox.empty
    assert not outbox.holds


def test_turns_come_with_steps_and_not_much_later_than_they_are_due() -> None:
    """A step that ends right before the end of a hold is a turn: the next would be late."""
    turns = Turns()
    assert turns.is_due(5.0)
    turns.hold_ms(80)
    assert turns.is_due(5.0)
    turns.take(5.0)
    assert not turns.is_due(5.05)
    assert turns.wait_s(5.05) == pytest.approx(0.03)
    assert turns.is_due(5.075)
    assert turns.wait_s(6.0) == 0.0


def test_a_hold_is_bounded() -> None:
    """Longer would look like a worker that hangs."""
    turns = Turns()
    turns.hold_ms(2**32 - 1)
    assert turns.hold_s == HOLD_S_MAX
