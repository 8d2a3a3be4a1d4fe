"""How a gateway that shuts down parts with the requests that outlast its grace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.common.errors import Draining
from services.gateway.core.attempts import Output
from services.gateway.core.events import Finished, FinishReason, Started
from services.gateway.core.jobs import Grant, Outcome, Waiting
from services.gateway.core.log import Claim, Entry
from services.gateway.dispatcher import farewell
from services.gateway.dispatcher.streams import AnswerStream
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself, beside which no other gateway stays."""
    async with dispatcher_world() as made:
        made.queue.releases = False
        yield made


def is_kept(world: World) -> bool:
    """Whether nothing was said of an end, to the queue or in the log, so that another process can go on."""
    ends = [verb for verb, _ in world.queue.calls if verb.startswith(("settle", "cancel"))]
    return not ends and not any(entry.is_last for entry in world.logs.entries.get("a", ()))


async def hears_of_it(stream: AnswerStream) -> None:
    """The client is told that it should come back, and when."""
    with pytest.raises(Draining) as caught:
        await rest(stream)
    assert caught.value.retry_after_s


@pytest.mark.parametrize("answer", [None, Waiting(1)], ids=["running", "waiting"])
async def test_a_resumable_request_that_nobody_takes_is_left_for_the_next_process(
    world: World, answer: Grant | Waiting | None
) -> None:
    """Its worker stops at once, and the end of the process waits for nothing."""
    world.queue.answer = answer
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    for attempt in world.workers.attempts:
        attempt.sink.output(Output(0, ids("ab")))
    async with asyncio.timeout(1):
        await world.dispatcher.drain(0)
    await hears_of_it(stream)
    assert is_kept(world)
    assert all(attempt.cancelled for attempt in world.workers.attempts)


async def test_a_resumable_request_is_kept_where_the_store_is_away_and_comes_back(world: World) -> None:
    """Before the process ends, when it could still be told of an end."""
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    world.queue.down = True
    leaving = asyncio.create_task(world.dispatcher.drain(0))
    await hears_of_it(stream)
    world.queue.down = False
    await leaving
    assert is_kept(world)


async def test_a_resumable_request_that_the_queue_takes_in_just_then_is_kept_as_well(world: World) -> None:
    """Its slot is not given back, for that would end the job; its client hears nothing of the queue."""
    world.queue.answers_on = asyncio.Event()
    call = asyncio.create_task(world.dispatcher.submit(job("a", resumable=True, digest="d")))
    await world.queue.wait_for("enqueue", "s-a")
    leaving = asyncio.create_task(world.dispatcher.drain(0))
    await world.queue.wait_for("release", "s-a")
    world.queue.answers_on.set()
    with pytest.raises(Draining):
        await rest(await call)
    await leaving
    assert is_kept(world)


async def test_a_resumable_request_is_not_begun_while_the_gateway_leaves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was let in before, and its id claimed meanwhile: nobody would be there to part with it."""
    claimed, answers, claim = asyncio.Event(), asyncio.Event(), world.logs.claim

    async def claim_slowly(job_id: str, *args: object) -> object:
        known = await claim(job_id, *args)  # type: ignore[arg-type]
        claimed.set()
        await answers.wait()
        return known

    monkeypatch.setattr(world.logs, "claim", claim_slowly)
    call = asyncio.create_task(world.dispatcher.submit(job("a", resumable=True, digest="d")))
    await claimed.wait()
    await world.dispatcher.drain(0)
    answers.set()
    with pytest.raises(Draining):
        await call
    assert (world.queue.calls, world.logs.claims) == ([], {})


async def test_one_that_came_in_at_the_very_end_is_kept_as_well(world: World) -> None:
    """It was taken up while the others were parted with: what is owed is given up, and no end is written."""
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    await farewell.close(world.dispatcher._live["a"], world.dispatcher._resumption)
    await hears_of_it(stream)
    assert is_kept(world)


@pytest.mark.parametrize("runs", [True, False], ids=["here", "elsewhere"])
async def test_a_client_who_has_only_to_read_the_end_is_not_told_to_go(world: World, *, runs: bool) -> None:
    """It stands in the journal, or was read from the store, and no other gateway would tell anything else."""
    if runs:
        stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
        world.workers.attempts[0].sink.output(Output(0, ids("ab"), FinishReason.STOP))
        await world.dispatcher.wait_empty()
    else:
        world.logs.claims["a"] = Claim("m", "d")
        world.logs.entries["a"] = [
            Entry(Started("r", "m", "r1", "w1", 1, 0.0)),
            Entry(Finished(FinishReason.STOP)),
        ]
        world.logs.outcomes["a"] = Outcome.FINISHED
        stream = await world.dispatcher.resume("alice", "a", 0)
    await world.dispatcher.drain(0)
    assert isinstance((await rest(stream))[-1], Finished)


async def test_any_other_request_ends_in_band(world: World) -> None:
    """Its slot comes back before the process ends."""
    stream = await world.dispatcher.submit(job("a"))
    await world.dispatcher.drain(0)
    await hears_of_it(stream)
    assert ("settle:cancelled", "n1") in world.queue.calls


async def test_a_defect_in_one_farewell_keeps_nobody_from_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue's client fails in a way that nobody foresaw: both clients are told, and both are kept."""

    async def fail(*_: object) -> bool:
        raise RuntimeError

    streams = [await world.dispatcher.submit(job(name, resumable=True, digest="d")) for name in "ab"]
    monkeypatch.setattr(world.queue, "release", fail)
    await world.dispatcher.drain(0)
    for stream in streams:
        await hears_of_it(stream)
    assert is_kept(world)
