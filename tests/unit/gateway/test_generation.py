"""One request between a queue and workers that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from services.common.errors import (
    ArgumentInvalid,
    ClientStalled,
    NoWorker,
    QueueFull,
    RequestExists,
    StoreUnavailable,
    WorkerLost,
)
from services.common.system_clock import SystemClock
from services.gateway.core.attempts import AttemptEnd, Loss, Output, RefusalReason
from services.gateway.core.events import Chunk, Event, Finished, FinishReason, Started, TokenLogprob
from services.gateway.core.jobs import Band, Outcome, Renewal, Waiting
from services.gateway.core.params import GenerationJob, GenerationParams, SamplingParams
from services.gateway.dispatcher.dispatch import Dispatcher, DispatcherLimits
from services.gateway.dispatcher.limits import GenerationLimits
from services.gateway.dispatcher.resumption import Resumption, ResumptionLimits
from services.gateway.dispatcher.streams import AnswerStream
from tests.fakes.gateway_logs import FakeLogs
from tests.fakes.gateway_ports import FakeMeter, FakeQueue, FakeTokenizer, FakeWorkerPool, grant


def job(job_id: str = "j", **fields: Any) -> GenerationJob:
    """A job with plain values."""
    given = {
        "prompt_ids": (1, 2, 3),
        "params": GenerationParams(100, SamplingParams(seed=1)),
        "timeout_s": 30.0,
        **fields,
    }
    return GenerationJob(
        job_id=job_id,
        request_id=f"request-{job_id}",
        tenant="alice",
        model="m",
        band=Band.INTERACTIVE,
        submission=f"s-{job_id}",
        decode=FakeTokenizer().decode,
        **given,
    )


def ids(text: str) -> tuple[int, ...]:
    """The fake tokenizer's ids of a text."""
    return tuple(map(ord, text))


@dataclass
class World:
    """A dispatcher and its ports."""

    queue: FakeQueue
    workers: FakeWorkerPool
    dispatcher: Dispatcher
    meter: FakeMeter


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    queue, workers, logs, meter = FakeQueue(), FakeWorkerPool(), FakeLogs(), FakeMeter()
    dispatcher = Dispatcher(
        queue,
        workers,
        SystemClock(),
        Resumption(logs, logs, SystemClock(), lambda _: FakeTokenizer().decode, ResumptionLimits()),
        meter=meter,
        models=lambda: ("m",),
        jitter=lambda: 0.5,
        limits=DispatcherLimits(requests_max=2, worker_wait_s=0.05),
        generation_limits=GenerationLimits(credit_tokens=8, client_stall_s=0.2, failover_wait_s=0.2),
    )
    yield World(queue, workers, dispatcher, meter)
    queue.down = False
    await dispatcher.drain(0)


async def rest(generation: AnswerStream) -> list[Event]:
    """All events that are left."""
    return [event async for event in generation]


async def test_tokens_that_nobody_took_come_as_one_chunk(world: World) -> None:
    """Three outputs before the reader looks: one chunk, with all tokens."""
    generation = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    for at, text in enumerate("abc"):
        sink.output(Output(at, ids(text)))
    sink.output(Output(3, (), FinishReason.STOP))
    started, chunk, finished = await rest(generation)
    assert isinstance(started, Started)
    assert chunk == Chunk(0, "abc", ids("abc"))
    assert isinstance(finished, Finished)
    await world.queue.wait_for("settle:finished", "n1")


async def test_credit_comes_back_when_the_next_event_is_asked_for(world: World) -> None:
    """Not when the chunk is handed out: its write may never complete."""
    generation = await world.dispatcher.submit(job())
    (attempt,) = world.workers.attempts
    attempt.sink.output(Output(0, ids("abcd")))
    await anext(generation)
    await anext(generation)
    assert attempt.credit_tokens == 8
    attempt.sink.output(Output(4, ids("e")))
    await anext(generation)
    assert attempt.credit_tokens == 12


async def test_a_new_attempt_gets_no_more_credit_than_the_reader_left(world: World) -> None:
    """What lies unread in the outbox is taken off the window."""
    await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.output(Output(0, ids("abcde")))
    world.workers.attempts[0].sink.lost("test", Loss.PROCESS)
    world.queue.receive(grant("n2"))
    second = await world.workers.wait_started(2)
    assert second.order.emitted == (ids("abcde"),)
    assert (second.order.attempt, second.order.credit_tokens) == (2, 3)


@pytest.mark.parametrize("output", [Output(1, ids("x")), Output(0, ids("x" * 101))], ids=["gap", "too many"])
async def test_tokens_that_do_not_continue_the_text_end_the_attempt(world: World, output: Output) -> None:
    """A worker that breaks the protocol is treated as lost, and told to stop."""
    await world.dispatcher.submit(job())
    (attempt,) = world.workers.attempts
    attempt.sink.output(output)
    assert attempt.cancelled
    await world.queue.wait_for("requeue", "n1")


async def test_a_late_attempt_is_not_heard(world: World) -> None:
    """What the first worker says after it was given up reaches nobody."""
    generation = await world.dispatcher.submit(job())
    first = world.workers.attempts[0]
    first.sink.lost("test", Loss.PROCESS)
    world.queue.receive(grant("n2"))
    second = await world.workers.wait_started(2)
    first.sink.output(Output(0, ids("late")))
    first.sink.lost("again", Loss.PROCESS)
    second.sink.output(Output(0, ids("right"), FinishReason.STOP))
    texts = [event.text for event in await rest(generation) if isinstance(event, Chunk)]
    assert texts == ["right"]


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


async def test_a_request_and_each_of_its_attempts_are_counted_once(world: World) -> None:
    """A lost worker, one that refuses, one that ends it: three attempts, one first token, one success."""
    generation = await world.dispatcher.submit(job())
    first = world.workers.attempts[0].sink
    first.output(Output(0, ids("a")))
    first.lost("test", Loss.PROCESS)
    first.lost("again", Loss.PROCESS)
    world.queue.receive(grant("n2"))
    (await world.workers.wait_started(2)).sink.refused(RefusalReason.BUSY, "full")
    world.queue.receive(grant("n3"))
    (await world.workers.wait_started(3)).sink.output(Output(1, ids("b"), FinishReason.STOP))
    finished = (await rest(generation))[-1]
    await generation.aclose()
    assert world.meter.attempts == [AttemptEnd.LOST, AttemptEnd.REFUSED, AttemptEnd.FINISHED]
    assert [model for model, _ in world.meter.first_tokens] == ["m"]
    assert world.meter.requests == [("m", Outcome.FINISHED, finished)]


async def test_a_cancelled_request_counts_as_cancelled(world: World) -> None:
    """So does its attempt, and nobody counts a first token that never came."""
    generation = await world.dispatcher.submit(job())
    await generation.aclose()
    assert world.meter.attempts == [AttemptEnd.CANCELLED]
    assert world.meter.requests == [("m", Outcome.CANCELLED, None)]
    assert not world.meter.first_tokens


async def test_a_stalled_reader_loses_its_slot(world: World) -> None:
    """It took one event and never came back; later it learns why its stream ended."""
    generation = await world.dispatcher.submit(job())
    await anext(generation)
    await world.queue.wait_for("settle:cancelled", "n1")
    with pytest.raises(ClientStalled):
        await rest(generation)


async def test_a_slow_worker_is_no_stalled_reader(world: World) -> None:
    """A reader that waits longer than the bound is not away."""
    generation = await world.dispatcher.submit(job())
    await anext(generation)
    waiting = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0.3)
    world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
    assert isinstance(await waiting, Chunk)


async def test_a_finished_request_is_settled_when_the_store_is_back(world: World) -> None:
    """The client is answered at once; the slot is given back as soon as the queue answers."""
    generation = await world.dispatcher.submit(job())
    world.queue.down = True
    world.workers.attempts[0].sink.output(Output(0, ids("a"), FinishReason.STOP))
    assert isinstance((await rest(generation))[-1], Finished)
    assert world.dispatcher.live == 1
    world.queue.down = False
    await world.queue.wait_for("settle:finished", "n1")


async def test_a_store_that_is_gone_refuses_new_requests(world: World) -> None:
    """StoreUnavailable at once; what may have been enqueued is withdrawn when it is back."""
    world.queue.down = True
    with pytest.raises(StoreUnavailable):
        await world.dispatcher.submit(job())
    world.queue.down = False
    await world.queue.wait_for("cancel", "s-j")


async def test_what_the_queue_refuses_is_told_and_forgotten(world: World) -> None:
    """QueueFull passes through, and nothing is owed."""
    world.queue.answer = QueueFull("full", retry_after_s=1)
    with pytest.raises(QueueFull):
        await world.dispatcher.submit(job())
    await world.dispatcher.wait_empty()
    assert world.queue.calls == [("enqueue", "s-j")]


async def test_a_process_has_a_bound_of_its_own(world: World) -> None:
    """The third request is refused without asking the queue, and so is an id in use."""
    await world.dispatcher.submit(job("a"))
    with pytest.raises(RequestExists):
        await world.dispatcher.submit(job("a"))
    await world.dispatcher.submit(job("b"))
    with pytest.raises(QueueFull):
        await world.dispatcher.submit(job("c"))


async def test_a_grant_that_comes_after_the_end_is_given_back(world: World) -> None:
    """The cancellation and the grant crossed: the slot is settled under its own nonce."""
    world.queue.answer = Waiting(1)
    generation = await world.dispatcher.submit(job())
    await generation.aclose()
    world.queue.receive(grant("late"))
    await world.queue.wait_for("cancel", "s-j")
    await world.queue.wait_for("settle:cancelled", "late")
    assert not world.workers.attempts


async def test_a_grant_for_nobody_is_settled_by_the_renewal(world: World) -> None:
    """Of an earlier life of this gateway: the slot is free at once."""
    world.queue.renewal = Renewal(granted=(grant("old", "gone"),))
    await world.dispatcher.renew()
    assert ("settle:cancelled", "old") in world.queue.calls


async def test_a_running_request_that_the_queue_lost_is_registered_again(world: World) -> None:
    """And ends in-band when the queue has given its slot to somebody else."""
    generation = await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await world.dispatcher.renew()
    assert ("register", "n1") in world.queue.calls
    world.queue.registers = False
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await world.dispatcher.renew()
    assert world.workers.attempts[0].cancelled
    with pytest.raises(WorkerLost):
        await rest(generation)


async def test_a_waiting_request_that_the_queue_lost_is_enqueued_again(world: World) -> None:
    """Under the same submission, with the time that it has waited."""
    world.queue.answer = Waiting(1)
    await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await world.dispatcher.renew()
    world.queue.answer = None
    await world.workers.wait_started(1)
    assert [call for call in world.queue.calls if call[0] == "enqueue"] == [("enqueue", "s-j")] * 2


async def test_who_waits_is_told_when_no_worker_comes_back(world: World) -> None:
    """Not at the first look, for a restart takes a moment; and not while a worker is there."""
    world.queue.answer = Waiting(0)
    generation = await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    waiting = {"j": Waiting(0)}
    for workers in (0, 1, 0):
        world.queue.renewal = Renewal(waiting=waiting, workers=workers)
        await world.dispatcher.renew()
    assert generation.error is None
    await asyncio.sleep(0.06)
    world.queue.renewal = Renewal(waiting=waiting, workers=0)
    await world.dispatcher.renew()
    with pytest.raises(NoWorker) as caught:
        await rest(generation)
    assert caught.value.retry_after_s


async def test_an_accepted_request_waits_for_a_store_that_is_gone(world: World) -> None:
    """It was lost and cannot be enqueued again yet: it is, as soon as the store answers."""
    world.queue.answer = Waiting(1)
    generation = await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    world.queue.down = True
    world.dispatcher._live["j"].forgotten()
    world.queue.changed.clear()
    await world.queue.changed.wait()
    world.queue.down, world.queue.answer = False, None
    await world.workers.wait_started(1)
    assert generation.error is None


async def test_an_invalid_order_is_told_and_not_tried_elsewhere(world: World) -> None:
    """What one worker cannot make sense of no other one will; the client hears its words."""
    generation = await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.refused(RefusalReason.INVALID, "what?")
    with pytest.raises(ArgumentInvalid, match="what"):
        await rest(generation)
    await world.queue.wait_for("settle:failed", "n1")


async def test_logprobs_keep_to_their_tokens(world: World) -> None:
    """Merged, held back by a stop string or cut by it: each token has its own entry."""
    params = GenerationParams(100, SamplingParams(seed=1), stop=("cd",), logprobs=1)
    generation = await world.dispatcher.submit(job(params=params))
    sink = world.workers.attempts[0].sink
    for index, text in ((0, "ab"), (2, "c"), (3, "de")):
        scores = tuple(TokenLogprob(-float(token), ((token, -float(token)),)) for token in ids(text))
        sink.output(Output(index, ids(text), logprobs=scores))
    chunks = [event for event in await rest(generation) if isinstance(event, Chunk)]
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    assert token_ids == list(ids("abcd"))
    assert [score.logprob for chunk in chunks for score in chunk.logprobs] == [-token for token in token_ids]
    assert "".join(chunk.text for chunk in chunks) == "ab"


async def test_a_worker_that_leaves_logprobs_out_is_given_up(world: World) -> None:
    """What was asked for is not silently left out: the attempt is lost, and another one begins."""
    params = GenerationParams(100, SamplingParams(seed=1), logprobs=0)
    await world.dispatcher.submit(job(params=params))
    world.workers.attempts[0].sink.output(Output(0, ids("a")))
    assert world.workers.attempts[0].cancelled


async def test_nobody_takes_over_in_time(world: World) -> None:
    """After the failover wait the request ends in-band and leaves the queue."""
    generation = await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.lost("test", Loss.PROCESS)
    with pytest.raises(WorkerLost):
        await rest(generation)
    await world.queue.wait_for("cancel", "s-j")
