"""Clients that read nothing, over real gRPC: their handlers wait in a write that only they could end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock import resume
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc

from services.gateway.dispatcher.limits import GenerationLimits
from services.gateway.dispatcher.reader import ReaderWatch
from services.gateway.dispatcher.resumption import ResumptionLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import GatewayWorld, bearer, fail, joined, open_gateway, reason_of

STALL_S = 0.5
# Where something must be done before anybody is stalled, on a busy machine as well.
LATER_S = 3.0
# So little is on its way to a client that a stream of a few KB waits for it.
NARROW = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
LONG = pb.GenerateRequest(text="hi", request_id="r", max_tokens=400, resumable=True, logprobs=1)


@asynccontextmanager
async def open_stalled(
    *, followers_max: int, stall_s: float = STALL_S, detach_grace_s: float = 30.0
) -> AsyncIterator[GatewayWorld]:
    """A gateway that does not wait long for its clients."""
    generation = GenerationLimits(client_stall_s=stall_s, detach_grace_s=detach_grace_s)
    resumption = ResumptionLimits(followers_max=followers_max, client_stall_s=stall_s)
    async with open_gateway(generation=generation, resumption=resumption) as gateway:
        yield gateway


def narrow(gateway: GatewayWorld) -> grpc.aio.Channel:
    """A connection with a small window."""
    return grpc.aio.insecure_channel(gateway.address, options=list(NARROW))


def resumed(channel: grpc.aio.Channel, subject: str = "alice", request_id: str = "r") -> Any:
    """A call of ResumeGeneration that nobody reads yet."""
    request = pb.ResumeGenerationRequest(request_id=request_id, cursor=0)
    return gateway_service_pb2_grpc.GatewayServiceStub(channel).ResumeGeneration(
        request, metadata=bearer(subject=subject)
    )


async def until_following(gateway: GatewayWorld, count: int) -> None:
    """Returns once so many clients follow."""
    async with asyncio.timeout(LATER_S + 10):
        while gateway.dispatcher.following != count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_clients_that_never_read_leave_their_places_to_others() -> None:
    """Each of them has a whole log before it; their calls end with a status that they may read one day."""
    async with open_stalled(followers_max=2, stall_s=LATER_S) as gateway, narrow(gateway) as channel:
        await gateway.add_worker("w1", Script(answer="x" * 400))
        for subject in ("alice", "bob"):
            events = [event async for event in gateway.call(LONG, metadata=bearer(subject=subject))]
            assert joined(events) == "x" * 400
        stuck = [resumed(channel, subject) for subject in ("alice", "bob")]
        await until_following(gateway, 2)
        error, _ = await fail(gateway.call(LONG, metadata=bearer(subject="carol")))
        assert reason_of(error) == "QUEUE_FULL"
        await until_following(gateway, 0)
        events = [event async for event in gateway.call(LONG, metadata=bearer(subject="carol"))]
        assert joined(events) == "x" * 400
        for call in stuck:
            error, read = await fail(call)
            assert reason_of(error) == "CLIENT_STALLED"
            # What was on its way came in order.
            assert read
            assert len(joined(read)) < 400


async def test_a_running_request_whose_only_client_never_reads_is_given_up() -> None:
    """It is no client: after the time that it has, and the grace, the worker is free."""
    async with open_stalled(followers_max=2, detach_grace_s=0.3) as gateway, narrow(gateway) as channel:
        worker = await gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.02))
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(LONG, metadata=bearer())
        async with asyncio.timeout(20):
            await worker.wait_until(lambda: worker.cancelled)
        await gateway.wait_idle()
        call.cancel()


async def test_a_resuming_client_that_was_away_goes_on_where_it_was() -> None:
    """What it left unread is in the log: it hears of its absence, asks again, and misses nothing."""
    async with open_stalled(followers_max=2) as gateway, narrow(gateway) as channel:
        await gateway.add_worker("w1", Script(answer="x" * 400))
        events = []
        async for event in resume.generate_async(channel, LONG, metadata=bearer()):
            events.append(event)
            if event.HasField("started"):
                await until_following(gateway, 0)
        assert joined(events) == "x" * 400


@pytest.mark.parametrize("resumable", [False, True])
async def test_a_body_of_events_that_nobody_reads_holds_nothing(
    resumable: bool,  # noqa: FBT001 - a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over HTTP, where the request has ended before; an error is last, which its client may read one day."""
    stall, stalled = ReaderWatch._stall, asyncio.Event()

    def noted(watch: ReaderWatch) -> None:
        stall(watch)
        stalled.set()

    monkeypatch.setattr(ReaderWatch, "_stall", noted)
    async with open_stalled(followers_max=2) as gateway, narrow(gateway) as channel:
        await gateway.add_worker("w1", Script(answer="x" * 400))
        told = b'{"text": "hi", "stream": true, "max_tokens": 200, "resumable": %s, "logprobs": 1}'
        body = HttpBody(data=told % (b"true" if resumable else b"false"), content_type="application/json")
        http = http_service_pb2_grpc.GatewayHttpServiceStub(channel)
        call = http.Generate(body, metadata=bearer())
        await asyncio.wait_for(stalled.wait(), 20)
        await until_following(gateway, 0)
        await gateway.wait_idle()
        bodies = [one.data async for one in call]
        assert bodies[-1].startswith(b"event: error\n")
        assert b"CLIENT_STALLED" in bodies[-1]
        assert b"finished" not in b"".join(bodies)
