"""What a client of a resumable request hears, and in which order."""

from __future__ import annotations

from services.gateway.core.attempts import Output
from services.gateway.core.events import Finished, FinishReason, Queued
from services.gateway.core.jobs import Waiting
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import dispatcher_world, ids, job


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
