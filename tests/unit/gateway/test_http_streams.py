"""What is written of a stream by HTTP, and when, whatever happens of which an API says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from services.common.errors import ArgumentInvalid, ClientStalled, InternalError
from services.gateway.core.attempts import Output, RefusalReason
from services.gateway.core.events import Chunk, Event, Finished, FinishReason, Started
from services.gateway.core.jobs import Renewal, Waiting
from services.gateway.http import native
from services.gateway.http import reply as http_reply
from services.gateway.http.reply import BODY_BYTES, HEARTBEAT, Reply, streamed
from tests.fixtures.dispatcher_world import STALL_S, World, dispatcher_world, ids, job


class FakeContext:
    """A call whose metadata is remembered.

    Attributes:
        sent: The initial metadata; None before it is sent.
        aborted: The message of the status that the call was ended with.
    """

    def __init__(self) -> None:
        self.sent: dict[str, Any] | None = None
        self.aborted = ""

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Remembers it."""
        assert self.sent is None
        self.sent = dict(metadata)

    async def abort(self, code: Any, message: str, metadata: Any) -> None:
        """Remembers it."""
        del code, metadata
        self.aborted = message
        raise grpc.aio.AbortError


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of a test's length."""
    monkeypatch.setattr(http_reply, "BEGIN_WAIT_S", 0.05)
    monkeypatch.setattr(http_reply, "HEARTBEAT_S", 0.1)


def say(happened: Event) -> list[bytes]:
    """An API that tells of a start, of text but for spaces, and of the end."""
    match happened:
        case Started():
            return [b"started "]
        case Chunk(text=text):
            return [text.strip().encode()]
        case Finished():
            return [b" done"]
    return []


async def open_stream(world: World) -> tuple[FakeContext, AsyncGenerator[HttpBody, None]]:
    """A request, and its bodies."""
    context: Any = FakeContext()
    stream = await world.dispatcher.submit(job())
    return context, streamed(stream, Reply(context, native), say)


async def data_of(bodies: AsyncGenerator[HttpBody, None]) -> list[bytes]:
    """The bodies that are left."""
    return [body.data async for body in bodies]


async def test_a_stream_begins_with_a_heartbeat_while_its_queue_moves(world: World) -> None:
    """Places are news of which this API says nothing; they put off neither the first one nor another."""
    world.queue.answer = Waiting(40)
    context, bodies = await open_stream(world)

    async def move() -> None:
        for position in range(39, 0, -1):
            await asyncio.sleep(0.02)
            world.queue.renewal = Renewal(waiting={"j": Waiting(position)})
            await world.dispatcher.renew()

    moving = asyncio.create_task(move())
    async with asyncio.timeout(0.5):
        assert (await anext(bodies)).data == HEARTBEAT
        assert context.sent is not None
        assert (await anext(bodies)).data == HEARTBEAT
        assert not moving.done()
    moving.cancel()
    await bodies.aclose()


async def test_text_that_is_held_puts_off_no_heartbeat(world: World) -> None:
    """Chunks of which nothing is said come one after the other."""
    _, bodies = await open_stream(world)
    sink = world.workers.attempts[0].sink
    sink.output(Output(0, ids("a")))
    assert (await anext(bodies)).data == b"started a"

    async def hold() -> None:
        for at in range(1, 40):
            await asyncio.sleep(0.02)
            sink.output(Output(at, ids(" ")))

    holding = asyncio.create_task(hold())
    async with asyncio.timeout(0.5):
        assert (await anext(bodies)).data == HEARTBEAT
        assert not holding.done()
    holding.cancel()
    await bodies.aclose()


async def test_what_is_there_goes_out_at_once_and_together(world: World) -> None:
    """No heartbeat where there is something to tell; the start and the first text are one body."""
    _, bodies = await open_stream(world)
    sink = world.workers.attempts[0].sink
    sink.output(Output(0, ids("a")))
    assert (await anext(bodies)).data == b"started a"
    sink.output(Output(1, (), FinishReason.STOP))
    assert await data_of(bodies) == [b" done"]


async def test_the_last_text_goes_out_with_the_end(world: World) -> None:
    """They come together from the worker, and cost one write."""
    _, bodies = await open_stream(world)
    sink = world.workers.attempts[0].sink
    sink.output(Output(0, ids("a")))
    assert (await anext(bodies)).data == b"started a"
    sink.output(Output(1, ids("b"), FinishReason.STOP))
    assert await data_of(bodies) == [b"b done"]


@pytest.mark.parametrize("texts", ["a", "abc"])
async def test_who_does_not_come_back_for_more_is_away(world: World, texts: str) -> None:
    """Whatever it was given last, together with what else: its request ends, which it hears if it comes."""
    context, bodies = await open_stream(world)
    sink = world.workers.attempts[0].sink
    for at, text in enumerate(texts):
        sink.output(Output(at, ids(text)))
        await anext(bodies)
    # The write of what it was given last does not end.
    await asyncio.sleep(2 * STALL_S)
    assert world.workers.attempts[0].cancelled
    with pytest.raises(ClientStalled, match="read nothing"):
        await anext(bodies)
    # Trailers would end a body that has no end, as if it were whole.
    assert not context.aborted


async def test_who_takes_an_event_bit_by_bit_is_not_away(world: World) -> None:
    """It is written in several bodies, all of which together take longer than a client may be away."""
    stream = await world.dispatcher.submit(job())
    context: Any = FakeContext()
    world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))

    def say(happened: Event) -> list[bytes]:
        return [b"x" * BODY_BYTES] * 6 if isinstance(happened, Chunk) else []

    async for body in streamed(stream, Reply(context, native), say):
        assert len(body.data) == BODY_BYTES
        await asyncio.sleep(STALL_S / 4)


async def test_what_was_there_before_an_error_goes_out_before_it(world: World) -> None:
    """Whoever finds the error, and without the half of an event that it broke."""
    stream = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    sink.output(Output(0, ids("a")))
    context: Any = FakeContext()

    def say(happened: Event) -> Iterator[bytes]:
        yield b"said "
        if isinstance(happened, Chunk):
            raise InternalError("There is no word for it.")

    bodies = streamed(stream, Reply(context, native), say)
    assert (await anext(bodies)).data == b"said "
    with pytest.raises(InternalError):
        await anext(bodies)
    await stream.aclose()


async def test_a_start_does_not_wait_for_its_text(world: World) -> None:
    """Where that takes longer than the headers wait, it goes out alone."""
    _, bodies = await open_stream(world)
    assert (await anext(bodies)).data == b"started "
    assert (await anext(bodies)).data == HEARTBEAT
    await bodies.aclose()


@pytest.mark.parametrize("resumable", [False, True])
async def test_what_only_a_worker_finds_out_has_its_status(world: World, *, resumable: bool) -> None:
    """It comes after the grant and before the first text: no header is sent by then."""
    context: Any = FakeContext()
    stream = await world.dispatcher.submit(job(resumable=resumable))
    bodies = streamed(stream, Reply(context, native), say)
    first = asyncio.ensure_future(anext(bodies))
    await asyncio.sleep(0.01)
    world.workers.attempts[0].sink.refused(RefusalReason.INVALID, "n: more than this worker has slots.")
    with pytest.raises(ArgumentInvalid, match="n: more than"):
        await first
    assert context.sent is None
    await stream.aclose()


async def test_a_long_event_is_several_bodies(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of its pieces others have the loop; short ones go out together."""
    monkeypatch.setattr(http_reply, "BODY_BYTES", 4)
    context: Any = FakeContext()
    stream = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    sink.output(Output(0, ids("a")))

    def say(happened: Event) -> list[bytes]:
        return [b"ab", b"cd", b"e", b"fghijk", b"l"] if isinstance(happened, Chunk) else []

    bodies = streamed(stream, Reply(context, native), say)
    assert [(await anext(bodies)).data for _ in range(3)] == [b"abcd", b"efghijk", b"l"]
    await bodies.aclose()
