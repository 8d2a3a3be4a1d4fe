"""How a log is written while the store is away, or has forgotten what it lent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common.errors import WorkerLost
from services.gateway.core.attempts import Loss, Output
from services.gateway.core.events import Chunk, Finished, FinishReason, Started
from services.gateway.core.jobs import Renewal
from services.gateway.core.log import Appended, AppendOutcome, Entry, LogTail
from services.gateway.dispatcher import chronicle
from services.gateway.dispatcher.streams import AnswerStream
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest

# Longer than any test.
FOR_EVER_S = 60.0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call that fails is enough."""
    monkeypatch.setattr(chronicle, "SILENCE_MAX_S", 0.0)


def said(entries: tuple[Entry, ...] | list[Entry]) -> str:
    """The text of some entries."""
    return "".join(entry.event.text for entry in entries if isinstance(entry.event, Chunk))


async def test_what_comes_without_the_store_is_told_at_once_and_written_when_it_is_back(world: World) -> None:
    """A renewal that the own queue answers changes nothing; one of the store has the whole log written."""
    world.queue.answer = replace(grant("n1"), degraded=True)
    stream = await world.dispatcher.submit(job(resumable=True))
    (attempt,) = world.workers.attempts
    attempt.sink.output(Output(0, ids("ab")))
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Chunk)
    world.queue.renewal = Renewal(degraded=True)
    await world.dispatcher.renew()
    attempt.sink.output(Output(2, ids("cd")))
    assert isinstance(await anext(stream), Chunk)
    assert world.logs.appends == []
    await world.dispatcher.renew()
    attempt.sink.output(Output(4, ids("e"), FinishReason.STOP))
    assert isinstance((await rest(stream))[-1], Finished)
    assert said(world.logs.entries["j"]) == "abcde"
    assert world.logs.entries["j"][-1].is_last


@pytest.mark.usefixtures("impatient")
async def test_a_store_that_goes_away_keeps_no_stream_waiting(world: World) -> None:
    """The worker has new credit for all that is told; the log has the same events when the store is back."""
    stream = await world.dispatcher.submit(job(resumable=True))
    told = [await anext(stream)]
    (attempt,) = world.workers.attempts
    world.logs.down = True
    for at in range(0, 24, 2):
        attempt.sink.output(Output(at, ids("ab")))
        told.append(await anext(stream))
    assert attempt.credit_tokens == 8 + 24
    world.logs.down = False
    # The store may answer, and yet know nothing of the slot: a renewal says.
    attempt.sink.output(Output(24, ids("c")))
    told.append(await anext(stream))
    assert len(world.logs.entries["j"]) == 1
    await world.dispatcher.renew()
    attempt.sink.output(Output(25, ids("d"), FinishReason.STOP))
    told += await rest(stream)
    assert [entry.event for entry in world.logs.entries["j"]] == told
    assert said(world.logs.entries["j"]) == "ab" * 12 + "cd"


@pytest.mark.usefixtures("impatient")
async def test_a_store_that_came_back_empty_keeps_no_stream_waiting(world: World) -> None:
    """The gateway's own queue says that all is well, and goes home once the controller has written."""
    stream = await world.dispatcher.submit(job(resumable=True))
    assert isinstance(await anext(stream), Started)
    world.logs.entries.clear()
    world.logs.answers = [Appended(AppendOutcome.LOST)] * 100
    (attempt,) = world.workers.attempts
    attempt.sink.output(Output(0, ids("ab")))
    assert await anext(stream) == Chunk(0, "ab", ids("ab"))
    assert ("register", "n1") in world.queue.calls
    world.logs.answers = [Appended(AppendOutcome.GAP, 0)]
    await world.dispatcher.renew()
    attempt.sink.output(Output(2, ids("c"), FinishReason.STOP))
    assert isinstance((await rest(stream))[-1], Finished)
    assert said(world.logs.entries["j"]) == "abc"


@pytest.mark.usefixtures("impatient")
async def test_a_gateway_that_stood_still_asks_once_more_before_it_tells(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call had no time to be answered, and another gateway has the request: clients go on there."""
    monkeypatch.setattr(chronicle, "STOOD_STILL_S", 0.0)
    monkeypatch.setattr(chronicle, "RETRY_FIRST_S", 0.001)
    stream = await world.dispatcher.submit(job(resumable=True, digest="d"))
    assert isinstance(await anext(stream), Started)
    world.logs.down = True
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    following = asyncio.create_task(rest(stream))
    await asyncio.sleep(0.02)
    other: list[Chunk | Finished] = [Chunk(0, "abc", ids("abc")), Finished(FinishReason.STOP)]
    world.logs.entries["j"] += map(Entry, other)
    world.logs.answers = [Appended(AppendOutcome.STALE)]
    world.queue.registers = False
    world.logs.down = False
    assert await following == other


async def test_the_store_is_told_with_the_text_what_it_costs(world: World) -> None:
    """Its gateway may vanish, and the request end in other hands: the prompt once anything was generated."""
    stream = await world.dispatcher.submit(job(resumable=True))
    assert isinstance(await anext(stream), Started)
    assert world.logs.used == [0]
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    assert isinstance(await anext(stream), Chunk)
    assert world.logs.used == [0, 3 + 2]
    await stream.aclose()


async def test_a_slot_that_the_store_has_lost_is_not_taken_for_known(world: World) -> None:
    """Its job is registered first; the next renewal says whether that was of use."""
    world.queue.answer = replace(grant("n1"), degraded=True)
    stream = await world.dispatcher.submit(job(resumable=True))
    assert isinstance(await anext(stream), Started)
    world.queue.renewal = Renewal(lost=frozenset("j"))
    await world.dispatcher.renew()
    await asyncio.sleep(0)
    assert (world.logs.appends, world.queue.calls[-1]) == ([], ("register", "n1"))
    await stream.aclose()


async def test_an_end_without_the_store_carries_what_the_log_lacks(world: World) -> None:
    """The log has the first worker's text; the second one was lent while the store was away."""
    stream = await world.dispatcher.submit(job(resumable=True))
    first = world.workers.attempts[0]
    first.sink.output(Output(0, ids("ab")))
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Chunk)
    first.sink.lost("test", Loss.PROCESS)
    await world.queue.wait_for("requeue", "n1")
    world.queue.receive(replace(grant("n2"), degraded=True))
    second = await world.workers.wait_started(2)
    second.sink.output(Output(2, ids("cd"), FinishReason.STOP))
    assert isinstance((await rest(stream))[-1], Finished)
    await world.queue.wait_for("settle:finished", "n2")
    (tail,) = world.queue.tails
    assert isinstance(tail, LogTail)
    assert (tail.position, len(world.logs.entries["j"]), said(tail.entries)) == (2, 2, "cd")
    assert tail.entries[-1].is_last


async def test_an_end_that_finds_the_store_emptied_carries_the_whole_log(world: World) -> None:
    """The job is registered again, and what was written before is lost with the rest."""
    stream = await world.dispatcher.submit(job(resumable=True))
    (attempt,) = world.workers.attempts
    attempt.sink.output(Output(0, ids("ab")))
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Chunk)
    world.queue.settles = False
    attempt.sink.output(Output(2, ids("cd"), FinishReason.STOP))
    await world.queue.wait_for("register", "n1")
    await world.dispatcher.wait_empty()
    first, again = world.queue.tails
    assert first is not None
    assert again is not None
    assert (first.position > 0, again.position, said(again.entries)) == (True, 0, "abcd")
    assert again.entries[-1].is_last
    await stream.aclose()


async def test_a_store_that_does_not_know_the_slot_is_asked_with_pauses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came back empty, while the gateway's own queue says at once that all is well."""
    monkeypatch.setattr(chronicle, "RETRY_FIRST_S", FOR_EVER_S)
    stream = await world.dispatcher.submit(job(resumable=True))
    assert isinstance(await anext(stream), Started)
    world.logs.appends.clear()
    world.logs.answers = [Appended(AppendOutcome.STALE)] * 100
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(world.logs.appends) == 2
    await stream.aclose()


async def test_a_slot_that_the_store_knows_again_is_written_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses end with it, and what follows is not kept waiting by them."""
    monkeypatch.setattr(chronicle, "RETRY_FIRST_S", 0.001)
    stream = await world.dispatcher.submit(job(resumable=True))
    assert isinstance(await anext(stream), Started)
    (attempt,) = world.workers.attempts
    for at in range(2):
        world.logs.answers = [Appended(AppendOutcome.STALE)] * 3
        attempt.sink.output(Output(at, ids("a")))
        assert isinstance(await anext(stream), Chunk)
        written = world.dispatcher._live["j"].chronicle
        assert written is not None
        assert written._pause_s == 0.001
    await stream.aclose()


async def cut_off(world: World, *, degraded: bool = True) -> AnswerStream:
    """A client was told "ab" without the store, and another gateway wrote "abcd" in pieces of its own.

    The store was away before the slot was lent, or after that.
    """
    world.queue.answer = replace(grant("n1"), degraded=degraded)
    stream = await world.dispatcher.submit(job(resumable=True, digest="d"))
    assert isinstance(await anext(stream), Started)
    world.logs.down = True
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    assert await anext(stream) == Chunk(0, "ab", ids("ab"))
    world.logs.down = False
    pieces = [Chunk(at, text, ids(text)) for at, text in enumerate("abcd")]
    begun, ended = Started("r", "m", "r1", "w2", 1, 0.0), Finished(FinishReason.STOP)
    world.logs.entries["j"] = [Entry(begun), *map(Entry, pieces), Entry(ended)]
    return stream


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("degraded", [True, False], ids=["before", "after"])
async def test_text_that_the_log_has_not_is_not_gone_on_with_from_another_gateways_log(
    world: World, *, degraded: bool
) -> None:
    """Neither by clients that have heard it nor by those that come back with its position, now or later."""
    stream = await cut_off(world, degraded=degraded)
    world.queue.registers = False
    world.queue.renewal = Renewal(lost=frozenset("j"))
    await world.dispatcher.renew()
    for _ in range(2):
        with pytest.raises(WorkerLost):
            await rest(await world.dispatcher.resume("alice", "j", 2))
        await world.dispatcher.wait_empty()
    with pytest.raises(WorkerLost):
        await rest(stream)
    again = await rest(await world.dispatcher.resume("alice", "j", 0))
    assert "".join(event.text for event in again if isinstance(event, Chunk)) == "abcd"


async def test_a_gateway_that_leaves_sends_nobody_to_a_log_without_the_text(world: World) -> None:
    """It parts with a request of which it told more than the log has: its clients ask anew."""
    stream = await cut_off(world)
    await world.dispatcher.drain(0)
    with pytest.raises(WorkerLost):
        await rest(stream)


async def test_text_that_the_log_has_is_gone_on_with_from_there(world: World) -> None:
    """Another gateway took over behind it."""
    stream = await world.dispatcher.submit(job(resumable=True, digest="d"))
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Chunk)
    world.dispatcher._live["j"].leave()
    more, end = Chunk(2, "cd", ids("cd")), Finished(FinishReason.STOP)
    world.logs.entries["j"] += [Entry(more), Entry(end)]
    assert await rest(stream) == [more, end]


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "kept"])
@pytest.mark.parametrize(
    "found", [Renewal(lost=frozenset("j")), Renewal(returns=1)], ids=["registered", "came back"]
)
async def test_the_log_of_a_stream_that_is_silent_is_written_again(
    world: World, found: Renewal, *, lost: bool
) -> None:
    """Its next word may be long in coming. A store that has lost nothing is asked once, and told nothing."""
    stream = await world.dispatcher.submit(job(resumable=True))
    world.workers.attempts[0].sink.output(Output(0, ids("ab")))
    told = [await anext(stream), await anext(stream)]
    world.logs.appends.clear()
    if lost:
        world.logs.entries.clear()
    world.queue.renewal = found
    for _ in range(2):
        await world.dispatcher.renew()
        for _ in range(20):
            await asyncio.sleep(0)
        world.queue.renewal = replace(found, lost=frozenset())
    assert [entry.event for entry in world.logs.entries["j"]] == told
    assert world.logs.appends == [("n1", 2, 0), ("n1", 0, 2)][: 1 + lost]
    await stream.aclose()
