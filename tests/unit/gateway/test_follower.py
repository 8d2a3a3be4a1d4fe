"""What a client of a resumable request hears, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.common.errors import ArgumentInvalid, ClientStalled, InterlockError, QueueFull, WorkerLost
from services.gateway.core.attempts import Output
from services.gateway.core.events import Chunk, Finished, FinishReason, Queued, Started
from services.gateway.core.jobs import Outcome, Waiting
from services.gateway.core.log import Claim, Entry
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


async def test_a_place_that_was_left_is_not_told() -> None:
    """Who looks for the first text before reading hears of no place after the start."""
    async with dispatcher_world() as world:
        world.queue.answer = Waiting(3)
        stream = await world.dispatcher.submit(job(resumable=True))
        await stream.first_output(0.02)
        world.queue.receive(grant("n1"))
        attempt = await world.workers.wait_started(1)
        attempt.sink.output(Output(0, ids("ab")))
        attempt.sink.output(Output(2, (), FinishReason.STOP))
        await stream.first_output(1)
        events = [event async for event in stream]
        assert not [event for event in events if isinstance(event, Queued)]
        assert isinstance(events[-1], Finished)


async def test_a_place_is_told_while_the_request_waits() -> None:
    """As long as nothing else is there to be told."""
    async with dispatcher_world() as world:
        world.queue.answer = Waiting(3)
        stream = await world.dispatcher.submit(job(resumable=True))
        await stream.first_output(0.02)
        assert await stream.ready(0)
        assert await anext(stream) == Queued(3)
        await stream.aclose()


def elsewhere(world: World, job_id: str) -> None:
    """A resumable request that runs at another gateway."""
    world.logs.claims[job_id] = Claim("m", "d")
    world.logs.entries[job_id] = [Entry(Started("r", "m", "r1", "w1", 1, 0.0))]


@pytest.mark.parametrize("cursor", [0, 1, 2], ids=["all", "some", "none"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
async def test_an_answer_that_the_log_has_in_part_does_not_end_well(*, whole: bool, cursor: int) -> None:
    """Its request has finished, and nobody wrote the rest; who has seen the end is told of no error."""
    async with dispatcher_world() as world:
        elsewhere(world, "c")
        last = Finished(FinishReason.STOP) if whole else Chunk(0, "a", ids("a"))
        world.logs.entries["c"].append(Entry(last))
        world.logs.outcomes["c"] = Outcome.FINISHED
        stream = await world.dispatcher.resume("carol", "c", cursor)
        told = [await anext(stream) for _ in range(2 - cursor)]
        assert told == [entry.event for entry in world.logs.entries["c"][cursor:]]
        with pytest.raises(StopAsyncIteration if whole else WorkerLost):
            await anext(stream)
        await stream.aclose()


async def test_who_has_seen_what_the_store_took_without_a_word_goes_on_behind_it() -> None:
    """Its gateway knows after the next try; a position that no log of the request can have is refused."""
    async with dispatcher_world() as world:
        stream = await world.dispatcher.submit(job(resumable=True, digest="d"))
        assert isinstance(await anext(stream), Started)
        first = asyncio.create_task(rest(stream))
        world.logs.mute = True
        sink = world.workers.attempts[0].sink
        sink.output(Output(0, ids("ab")))
        await until(lambda: len(world.logs.entries["j"]) == 2)
        again = await world.dispatcher.resume("alice", "j", 2)
        second = asyncio.create_task(rest(again))
        with pytest.raises(ArgumentInvalid, match="cursor"):
            await world.dispatcher.resume("alice", "j", 3)
        assert not first.done()
        world.logs.mute = False
        sink.output(Output(2, ids("c"), FinishReason.STOP))
        events = await second
        assert [event.text for event in events if isinstance(event, Chunk)] == ["c"]
        assert isinstance(events[-1], Finished)
        assert again.cursor == 2 + len(events)
        assert (await first)[-len(events) :] == events


async def test_who_has_seen_the_start_that_the_store_took_without_a_word_hears_of_no_place() -> None:
    """The request has left its queue, whatever its own gateway knows of its log."""
    async with dispatcher_world() as world:
        world.queue.answer = Waiting(3)
        await world.dispatcher.submit(job(resumable=True, digest="d"))
        world.logs.mute = True
        world.queue.receive(grant("n1"))
        await until(lambda: bool(world.logs.entries))
        again = await world.dispatcher.resume("alice", "j", 1)
        assert not await again.ready(0)
        world.logs.mute = False
        world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
        assert not [event async for event in again if isinstance(event, Queued | Started)]


async def until(condition: Callable[[], bool]) -> None:
    """Returns once it holds; what is waited for takes less than half a second."""
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110 - timers tell nobody
            await asyncio.sleep(0.01)


async def test_clients_that_never_come_back_leave_their_places_to_others() -> None:
    """Two of them have all the places there are; each is told once, and hears nothing more."""
    async with dispatcher_world(followers_max=2) as world:
        first = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
        second = await world.dispatcher.submit(job("b", resumable=True, digest="d", tenant="bob"))
        elsewhere(world, "c")
        told: list[InterlockError] = []
        for stream in (first, second):
            stream.watched(told.append)
            assert isinstance(await anext(stream), Started)
        with pytest.raises(QueueFull):
            await world.dispatcher.resume("carol", "c", 0)
        await until(lambda: len(told) == 2)
        third = await world.dispatcher.resume("carol", "c", 0)
        for stream in (first, second):
            with pytest.raises(ClientStalled):
                await anext(stream)
            await stream.aclose()
        assert [type(error) for error in told] == [ClientStalled] * 2
        assert isinstance(await anext(third), Started)
        await third.aclose()


async def test_a_client_that_reads_on_is_not_away() -> None:
    """However long nothing comes, and however long ago it came."""
    async with dispatcher_world() as world:
        stream = await world.dispatcher.submit(job(resumable=True))
        told: list[InterlockError] = []
        stream.watched(told.append)
        assert isinstance(await anext(stream), Started)
        await asyncio.sleep(0.1)
        assert not await stream.ready(0.3)
        world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
        assert isinstance([event async for event in stream][-1], Finished)
        assert not told


@pytest.mark.parametrize("resumable", [False, True])
async def test_who_does_not_read_a_sign_of_life_is_away(resumable: bool) -> None:  # noqa: FBT001
    """It is written while nothing else is there to be told, and its write may not end either."""
    async with dispatcher_world() as world:
        stream = await world.dispatcher.submit(job(resumable=resumable))
        told: list[InterlockError] = []
        stream.watched(told.append)
        assert isinstance(await anext(stream), Started)
        assert not await stream.ready(0)
        await until(lambda: bool(told))
        await stream.aclose()


async def test_a_request_whose_only_client_stalls_is_given_up_after_the_grace() -> None:
    """A client that does not read is none: the worker is free again."""
    async with dispatcher_world(detach_grace_s=0.1) as world:
        stream = await world.dispatcher.submit(job(resumable=True))
        assert isinstance(await anext(stream), Started)
        await world.queue.wait_for("settle:cancelled", "n1")
        assert world.workers.attempts[0].cancelled
        await stream.aclose()


async def test_one_tenant_leaves_half_of_the_places_to_the_others() -> None:
    """Whatever it follows; it is told that the bound is its own."""
    async with dispatcher_world(followers_max=4) as world:
        streams = [await world.dispatcher.submit(job(resumable=True, digest="d"))]
        streams.append(await world.dispatcher.resume("alice", "j", 0))
        with pytest.raises(QueueFull, match="of this subject"):
            await world.dispatcher.resume("alice", "j", 0)
        with pytest.raises(QueueFull, match="of this subject"):
            await world.dispatcher.submit(job("k", resumable=True, digest="d"))
        for name in "bc":
            elsewhere(world, name)
        streams += [await world.dispatcher.resume("bob", "b", 0) for _ in range(2)]
        with pytest.raises(QueueFull, match="4 followers"):
            await world.dispatcher.resume("carol", "c", 0)
        for stream in streams:
            await stream.aclose()


async def test_who_has_heard_the_end_takes_no_place() -> None:
    """Its body may still be on its way to it, for as long as it likes."""
    async with dispatcher_world(followers_max=1) as world:
        stream = await world.dispatcher.submit(job(resumable=True, digest="d"))
        world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
        assert isinstance([event async for event in stream][-1], Finished)
        other = await world.dispatcher.submit(job("k", resumable=True, digest="d"))
        await stream.aclose()
        await other.aclose()


async def test_an_unread_end_is_not_kept_for_good() -> None:
    """A request that cannot be resumed has ended, and its slot is free: its client's call ends as well."""
    async with dispatcher_world() as world:
        stream = await world.dispatcher.submit(job())
        told: list[InterlockError] = []
        stream.watched(told.append)
        world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
        assert isinstance(await anext(stream), Started)
        await until(lambda: bool(told))
        with pytest.raises(ClientStalled):
            await anext(stream)
        await stream.aclose()
        await world.queue.wait_for("settle:finished", "n1")
