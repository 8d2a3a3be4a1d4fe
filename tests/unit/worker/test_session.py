"""A session with a gateway: what of it goes on once it is closed, and what credit it goes by."""

from __future__ import annotations

import asyncio

from services.worker.core.admission import JobStart, Reason, Refusal
from services.worker.core.format import Format, FormatKind
from services.worker.core.outbox import REFUSALS_MAX
from services.worker.core.sequence import Output, SequenceKey, SequenceStart
from services.worker.core.stepper import Admit
from services.worker.core.turns import HOLD_S_MAX
from services.worker.engine.session import EngineSession
from tests.fakes.worker_ports import FakeHost

CREDIT = 40
# As long as tokens can be held back; no test here waits for its end.
LONG_MS = round(1_000 * HOLD_S_MAX)


def job_of(name: str, form: Format | None = None, credit: int = CREDIT) -> JobStart:
    """A job of two sequences."""
    starts = (SequenceStart(SequenceKey(1, name, 1, at), (1, 2), 100, (), credit) for at in range(2))
    return JobStart("m", "r", 1, tuple(starts), f"req-{name}", form)


async def test_the_refusal_that_is_one_too_many_ends_the_session_and_nothing_else() -> None:
    """What the step has to say to other sessions is still told: nothing is raised here."""
    host = FakeHost()
    session = EngineSession(1, host)
    session.start(job_of("a"))
    for number in range(REFUSALS_MAX):
        session.put(Refusal(SequenceKey(1, f"refused-{number}"), Reason.BUSY))
    session.put(Refusal(SequenceKey(1, "a"), Reason.BUSY))
    assert host.forgotten == 1
    letter = await session.receive()
    assert letter is not None
    assert len(letter.refusals) == REFUSALS_MAX
    assert await session.receive() is None


async def test_a_closed_session_begins_nothing() -> None:
    """Its reader may still have messages: a job behind the end of its session would never end."""
    host = FakeHost()
    session = EngineSession(1, host)
    session.start(job_of("a"))
    session.close()
    posted = len(host.posted)
    session.start(job_of("b"))
    session.add_credit("a", 0, 1)
    session.cancel("a")
    assert len(host.posted) == posted
    assert session.idle


async def test_what_is_compiled_for_a_closed_session_is_not_admitted() -> None:
    """Though its cancellation came too late to stop it."""
    host = FakeHost()
    session = EngineSession(1, host)
    session.start(job_of("a", Format(FormatKind.REGEX, ("a+",))))
    await asyncio.sleep(0)
    session.close()
    host.compiled.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not [command for command in host.posted if isinstance(command, Admit)]


async def test_a_sequence_that_began_with_little_credit_is_held_back_once_it_has_more() -> None:
    """A quarter of the most that it was given at once, which goes for no other sequence."""
    session = EngineSession(1, FakeHost())
    session.start(job_of("a", credit=2))
    session.coalesce(LONG_MS)

    async def told(first: int, sequence: int = 0) -> int:
        """How many tokens it takes, from that index on, until some are told."""
        for index in range(first, 100):
            session.put(Output(SequenceKey(1, "a", 1, sequence), index, (index,)))
            if not session._outbox.empty:
                letter = await session.receive()
                assert letter is not None
                (output,) = letter.outputs
                assert output.index == first
                return len(output.token_ids)
        raise AssertionError("nothing is told")

    assert [await told(0), await told(1), await told(0, 1)] == [1, 1, 1]
    session.add_credit("a", 0, 24)
    assert await told(2) == 6
    session.add_credit("a", 0, 8)
    assert [await told(8), await told(1, 1)] == [6, 1]
