"""Formats that a worker can follow no further: the client's own mistake, which costs nobody else anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import generation_pb2

from services.gateway.core.breaker import State
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import (
    MODEL,
    GatewayWorld,
    bearer,
    fail,
    joined,
    open_gateway,
    reason_of,
)

FLAW = "format.regex: lexer error: too many expressions constructed"
ANSWER = "The quick brown fox jumps over the lazy dog."
FLAW_AT = 10
# A breaker that counted these as failures would open.
JOBS = 20


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway whose queue holds a suspect worker for as long as in life."""
    async with open_gateway() as world:
        yield world


def formed(**fields: Any) -> pb.GenerateRequest:
    """A request whose answer is held to a format."""
    form = generation_pb2.OutputFormat(regex="((((a{1,30}){1,30}){1,30}){1,30}){1,30}")
    return pb.GenerateRequest(text="hi", max_tokens=100, format=form, **fields)


def flawed(**fields: Any) -> Script:
    """A worker that can follow no format for longer than this."""
    return Script(answer=ANSWER, flaw_at=FLAW_AT, flaw=FLAW, **fields)


def failures(gateway: GatewayWorld) -> tuple[int, int, int]:
    """Calls that the breaker of the worker has counted, those that failed, and attempts of its revision."""
    tally = gateway.breakers.worker("w1", MODEL).breaker.tally(time.monotonic())
    return tally.calls, tally.failures, sum(one.failed + one.finished for one in gateway.tallies)


def suspects(gateway: GatewayWorld) -> set[str]:
    """Workers that the queue has kept jobs from for a while, because one failed there."""
    return set(gateway.queue._line(MODEL).places.suspect_until)


@pytest.mark.parametrize("n", [1, 3])
async def test_it_ends_the_request_and_moves_nothing(gateway: GatewayWorld, n: int) -> None:
    """The client keeps what came and hears why; breaker, budget, tallies and queue are as before."""
    worker = await gateway.add_worker("w1", flawed())
    budget = gateway.budget.tokens
    for _ in range(JOBS):
        error, events = await fail(gateway.call(formed(n=n)))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
        assert error.details() == FLAW
        if n == 1:
            assert joined(events) == ANSWER[:FLAW_AT]
    await gateway.wait_idle()
    assert len(worker.starts) == JOBS, "a request was tried again"
    assert gateway.breakers.worker("w1", MODEL).breaker.state is State.CLOSED
    assert failures(gateway) == (0, 0, 0)
    assert gateway.budget.tokens == budget
    assert not suspects(gateway), "the worker was barred"
    assert joined(await gateway.generate()) == ANSWER


async def test_a_plain_stream_beside_it_goes_on(gateway: GatewayWorld) -> None:
    """The format's end is that of its own request alone."""
    worker = await gateway.add_worker("w1", flawed(interval_s=0.01))
    plain = asyncio.create_task(gateway.generate())
    await worker.wait_until(lambda: worker.sent)
    error, _ = await fail(gateway.call(formed(), metadata=bearer(subject="mallory")))
    assert error.details() == FLAW
    assert not plain.done()
    assert joined(await plain) == ANSWER
    assert len(worker.starts) == 2


async def test_who_follows_a_resumable_request_hears_it_too(gateway: GatewayWorld) -> None:
    """In the stream, and afterwards from its log: the text, and the same error behind it."""
    await gateway.add_worker("w1", flawed())
    first, events = await fail(gateway.call(formed(resumable=True, request_id="r")))
    request = pb.ResumeGenerationRequest(request_id="r", cursor=0)
    again, later = await fail(gateway.stub.ResumeGeneration(request, metadata=bearer()))
    for error, told in ((first, events), (again, later)):
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
        assert error.details() == FLAW
        assert joined(told) == ANSWER[:FLAW_AT]


async def test_by_http_it_is_a_status_or_an_event(gateway: GatewayWorld) -> None:
    """An answer as a whole is a 400; a stream whose text has begun tells it as its last event."""
    await gateway.add_worker("w1", flawed())
    body = {"text": "hi", "format": {"regex": "a+"}}
    whole = await gateway.post(body)
    assert (whole.status, whole.json["error"]["message"]) == (400, FLAW)
    streamed = await gateway.post(body | {"stream": True})
    assert streamed.status == 200
    last = streamed.events[-1]
    assert (last["event"], last["data"]["error"]["code"]) == ("error", "INVALID_ARGUMENT")
    assert last["data"]["error"]["message"] == FLAW


async def test_a_worker_that_does_not_tell_why_is_lost_for_the_request(gateway: GatewayWorld) -> None:
    """An older one, or one whose numbers are damaged: that counts, and another worker goes on."""
    worker = await gateway.add_worker("w1", flawed())
    worker.script.flaw = ""
    call = gateway.call(formed())
    await worker.wait_until(lambda: len(worker.starts) > 1)
    worker.script.flaw_at = None
    assert joined([event async for event in call]) == ANSWER
    await gateway.wait_idle()
    calls, failed, _ = failures(gateway)
    assert (calls, failed) == (len(worker.starts), len(worker.starts) - 1)
    assert suspects(gateway) == {"w1"}
