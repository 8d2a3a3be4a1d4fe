"""What `interlock.resume` takes as passing, before gateways that a test plays."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from interlock import resume
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from interlock.v1.generation_pb2 import Chunk, Finished, Queued, Started

from services.common import status
from services.common.errors import Draining, InterlockError, NoWorker, QueueFull

# No connection, as by Envoy: nothing of ours says why.
BROKEN = object()
DELAY_S = 0.3
WAITS = pb.GenerateResponse(queued=Queued(position=1))
STARTED = pb.GenerateResponse(cursor=1, started=Started(request_id="r"))
REST = (
    pb.GenerateResponse(cursor=2, chunk=Chunk(text="a", token_ids=[1])),
    pb.GenerateResponse(cursor=3, finished=Finished()),
)


class Gateway(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Plays a gateway: each call gets the next of what it is to say.

    Attributes:
        answers: The answers: events, and perhaps how the call ends then.
        cursors: Behind what each call wanted to go on; None: it asked for the whole.
        came_s: When.
    """

    def __init__(self, answers: list[tuple[Any, ...]]) -> None:
        self.answers = answers
        self.cursors: list[int | None] = []
        self.came_s: list[float] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Says the next thing from the beginning."""
        del request
        async for event in self._answer(None, context):
            yield event

    async def ResumeGeneration(
        self, request: pb.ResumeGenerationRequest, context: Any
    ) -> AsyncIterator[pb.ResumeGenerationResponse]:
        """Says the next thing."""
        async for event in self._answer(request.cursor, context):
            yield pb.ResumeGenerationResponse.FromString(event.SerializeToString())

    async def _answer(self, cursor: int | None, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.cursors.append(cursor)
        self.came_s.append(time.monotonic())
        for said in self.answers.pop(0):
            if said is BROKEN:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection refused")
            if isinstance(said, InterlockError):
                await status.abort(context, said)
            yield said


@asynccontextmanager
async def serving(*answers: tuple[Any, ...]) -> AsyncIterator[tuple[Gateway, grpc.aio.Channel]]:
    """A gateway that gives these answers, and a connection to it."""
    gateway = Gateway(list(answers))  # type: ignore[abstract] # it plays two methods
    server = grpc.aio.server()
    gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield gateway, channel
    await server.stop(None)


async def heard(channel: grpc.aio.Channel) -> list[int]:
    """The positions of all that a client is told in the end."""
    request = pb.GenerateRequest(text="hi")
    events = resume.generate_async(channel, request, backoff_s=0.01, timeout_s=20)
    return [event.cursor async for event in events]


def no_worker() -> InterlockError:
    """What a gateway says that no controller has taken in yet."""
    return NoWorker("No model is ready yet.", retry_after_s=DELAY_S)


def full(delay_s: float | None = DELAY_S) -> InterlockError:
    """What one says at which many clients follow."""
    return QueueFull("This gateway carries 2 followers already.", retry_after_s=delay_s)


@pytest.mark.parametrize(
    ("begun", "refusal"),
    [
        ((BROKEN,), no_worker()),
        ((BROKEN,), full()),
        ((STARTED, BROKEN), full()),
        ((WAITS, Draining("It leaves.")), full()),
    ],
    ids=["no worker", "full", "full behind a cursor", "full after one that left it waiting"],
)
async def test_a_refusal_that_passes_ends_no_request_that_may_live_on(
    begun: tuple[Any, ...], refusal: InterlockError
) -> None:
    """Whoever lost its gateway comes to another one too early, or with too many others: it asks later."""
    rest = REST if begun[0] is STARTED else (STARTED, *REST)
    async with serving(begun, (refusal,), (refusal,), rest) as (gateway, channel):
        assert [cursor for cursor in await heard(channel) if cursor] == [1, 2, 3]
    assert gateway.cursors == [None, *[1 if begun[0] is STARTED else None] * 3]
    assert min(gateway.came_s[2] - gateway.came_s[1], gateway.came_s[3] - gateway.came_s[2]) >= DELAY_S


@pytest.mark.parametrize(
    "answers",
    [
        [(full(),)],
        [(no_worker(),)],
        [(BROKEN,), (full(None),)],
        [(BROKEN,), (full(resume.BACKOFF_MAX_S + 1),)],
        [(STARTED, BROKEN), (no_worker(),)],
        [(Draining.at_the_door(retry_after_s=DELAY_S),), (full(),)],
    ],
    ids=[
        *("full at first", "no worker at first", "no delay", "a long delay", "how the request ended"),
        "full after one that leaves",
    ],
)
async def test_a_refusal_is_final_where_nothing_may_live_on_or_nothing_passes(
    answers: list[tuple[Any, ...]],
) -> None:
    """A client is told of it at once."""
    async with serving(*answers) as (gateway, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await heard(channel)
        assert isinstance(status.read_error(caught.value), type(answers[-1][-1]))
        assert len(gateway.cursors) == len(answers)
