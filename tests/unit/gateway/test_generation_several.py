"""One request for several sequences between a queue and workers that a test plays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common.errors import WorkerLost
from services.gateway.core.attempts import AttemptEnd, Loss, Output
from services.gateway.core.events import Chunk, Finished, FinishReason
from services.gateway.core.params import GenerationJob, GenerationParams, SamplingParams
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


def several() -> GenerationJob:
    """A job of three sequences, of ten tokens each at most."""
    return job(params=GenerationParams(10, SamplingParams(seed=1), n=3))


async def test_each_sequence_goes_on_where_the_lost_worker_left_it(world: World) -> None:
    """One was midway, one had ended, one had not begun; the client hears of each token and end once."""
    generation = await world.dispatcher.submit(several())
    first = world.workers.attempts[0].sink
    first.output(Output(0, ids("ab")))
    first.output(Output(0, ids("xyz"), FinishReason.STOP, sequence=2, others=2))
    first.lost("test", Loss.PROCESS)
    world.queue.receive(grant("n2"))
    second = await world.workers.wait_started(2)
    assert second.order.emitted == (ids("ab"), (), ids("xyz"))
    assert second.order.ended == {2}
    second.sink.output(Output(2, ids("c"), FinishReason.STOP, others=1))
    second.sink.output(Output(0, ids("q" * 10), FinishReason.LENGTH, sequence=1))
    events = await rest(generation)
    said = [(event.sequence, event.index, event.text) for event in events if isinstance(event, Chunk)]
    assert said == [(0, 0, "ab"), (2, 0, "xyz"), (0, 2, "c"), (1, 0, "q" * 10)]
    ends = [(end.sequence, end.reason, end.is_last) for end in events if isinstance(end, Finished)]
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    assert ends == [(2, stop, False), (0, stop, False), (1, length, True)]
    await world.queue.wait_for("settle:finished", "n2")


async def test_an_end_binds_the_others_to_the_revision(world: World) -> None:
    """A sequence that ended without a token was told to have: no other revision may say the rest."""
    generation = await world.dispatcher.submit(several())
    first = world.workers.attempts[0].sink
    first.output(Output(0, (), FinishReason.STOP, sequence=1, others=2))
    first.lost("test", Loss.PROCESS)
    world.queue.receive(replace(grant("n2"), revision="r2"))
    with pytest.raises(WorkerLost, match="revision"):
        await rest(generation)


async def test_a_stop_string_ends_its_sequence_at_the_worker(world: World) -> None:
    """The others go on in the same attempt, which is whole when the last has ended."""
    params = GenerationParams(10, SamplingParams(seed=1), ("!",), n=2)
    generation = await world.dispatcher.submit(job(params=params))
    (attempt,) = world.workers.attempts
    attempt.sink.output(Output(0, ids("a!b"), sequence=1, others=1))
    assert (attempt.ended, attempt.cancelled) == ([1], False)
    attempt.sink.output(Output(0, ids("c!"), others=0))
    assert attempt.cancelled
    events = await rest(generation)
    assert [event.stop_text for event in events if isinstance(event, Finished)] == ["!", "!"]
    assert world.meter.attempts == [AttemptEnd.FINISHED]


async def test_a_job_of_several_sequences_costs_and_takes_as_many(world: World) -> None:
    """The estimate is the prompt once and every answer's most; each takes a slot."""
    await world.dispatcher.submit(several())
    (generation,) = world.dispatcher._live.values()
    queued = generation.queued_job()
    assert (queued.cost_tokens, queued.slots) == (3 + 3 * 10, 3)
