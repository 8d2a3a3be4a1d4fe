"""One request between a queue and workers that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

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
from services.gateway.core.attempts import AttemptEnd, Loss, Output, RefusalReason
from services.gateway.core.events import Chunk, Finished, FinishReason, Started, TokenLogprob, Usage
from services.gateway.core.jobs import Outcome, Renewal, Waiting
from services.gateway.core.log import Claim
from services.gateway.core.params import GenerationParams, SamplingParams
from services.gateway.core.queue_errors import ended_error
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


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


@pytest.mark.parametrize("said", ["", "abc"], ids=["nothing", "tokens"])
async def test_what_a_cache_had_of_the_prompt_is_told_with_the_first_word(world: World, said: str) -> None:
    """Also where that is the end of an answer that has no tokens; later words say nothing of it."""
    generation = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    for at, letter in enumerate(said):
        sink.output(Output(at, ids(letter), cached_prompt_tokens=0 if at else 2))
    sink.output(Output(len(said), (), FinishReason.STOP, 0 if said else 2))
    finished = (await rest(generation))[-1]
    assert isinstance(finished, Finished)
    assert finished.usage == Usage(3, 2, len(said))


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


@pytest.mark.parametrize(("said", "used"), [("abcde", 8), ("", 0)], ids=["tokens", "nothing"])
async def test_what_was_produced_before_a_loss_is_told_to_the_queue(
    world: World, said: str, used: int
) -> None:
    """With the return of the slot, and again as the client leaves: prompt and answer, or nothing at all."""
    generation = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    if said:
        sink.output(Output(0, ids(said)))
    sink.lost("test", Loss.PROCESS)
    await world.queue.wait_for("requeue", "n1")
    await generation.aclose()
    await world.queue.wait_for("cancel", "s-j")
    assert world.queue.used == [used, used]


@pytest.mark.parametrize(
    ("end", "said", "charged"),
    [
        ("invalid", "", 0),
        ("budget", "", 0),
        ("budget", "ab", 5),
        ("crashes", "", 0),
        ("finished", "", 3),
        ("cancelled", "", 3),
        ("cancelled", "ab", 5),
    ],
)
async def test_a_prompt_that_no_worker_took_is_not_charged(
    world: World, end: str, said: str, charged: int
) -> None:
    """Refused, or lost before the first token, it costs nothing; a worker that is at it costs the prompt."""
    generation = await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    if said:
        sink.output(Output(0, ids(said)))
    match end:
        case "invalid":
            sink.refused(RefusalReason.INVALID, "what?")
        case "budget":
            sink.refused(RefusalReason.BUDGET_SPENT, "")
        case "crashes":
            sink.lost("test", Loss.PROCESS)
            world.queue.receive(grant("n2"))
            (await world.workers.wait_started(2)).sink.lost("test", Loss.PROCESS)
        case "finished":
            sink.output(Output(0, (), FinishReason.STOP))
        case _:
            await generation.aclose()
    await world.dispatcher.wait_empty()
    assert world.queue.settled == [charged]


@pytest.mark.parametrize(("said", "pin"), [("abc", "r1"), ("", "")], ids=["tokens", "nothing"])
async def test_the_revision_of_a_text_is_told_whenever_the_queue_hears_of_the_job(
    world: World, said: str, pin: str
) -> None:
    """A worker is lost, the queue is emptied while the job waits, and once more while it runs."""
    await world.dispatcher.submit(job())
    sink = world.workers.attempts[0].sink
    if said:
        sink.output(Output(0, ids(said)))
    world.queue.answer = Waiting(1)
    sink.lost("test", Loss.PROCESS)
    await world.queue.wait_for("requeue", "n1")
    await asyncio.sleep(0)
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await world.dispatcher.renew()
    world.queue.changed.clear()
    await world.queue.changed.wait()
    world.queue.receive(grant("n2"))
    await world.workers.wait_started(2)
    await asyncio.sleep(0)
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await world.dispatcher.renew()
    assert ("register", "n2") in world.queue.calls
    assert world.queue.pins == ["", pin, pin, pin]


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


async def test_a_resumable_request_is_admitted_with_its_client_or_not_at_all() -> None:
    """Nobody would follow what is generated and charged: the queue is asked once a client has room."""
    async with dispatcher_world(followers_max=1) as world:
        resumable = (job(name, resumable=True, digest="d") for name in "ab")
        submitted = (world.dispatcher.submit(one) for one in resumable)
        first, second = await asyncio.gather(*submitted, return_exceptions=True)
        assert isinstance(second, QueueFull)
        assert [name for verb, name in world.queue.calls if verb == "enqueue"] == ["s-a"]
        assert world.dispatcher.live == 1
        assert not isinstance(first, BaseException)
        await first.aclose()
        # The place is free again, also after one that the queue refused.
        world.queue.answer = QueueFull("full", retry_after_s=1)
        for _ in range(2):
            with pytest.raises(QueueFull, match="full"):
                await world.dispatcher.submit(job("b", resumable=True, digest="d"))


async def test_a_resumable_request_that_is_refused_leaves_its_id_to_another(world: World) -> None:
    """Its client may ask something else by it, at once; that stands from then on."""
    world.queue.answer = QueueFull("full", retry_after_s=1)
    with pytest.raises(QueueFull):
        await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    world.queue.answer = None
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="other"))
    with pytest.raises(RequestExists):
        await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    await stream.aclose()


@pytest.mark.parametrize("known", [False, True], ids=["claimed here", "claimed before"])
async def test_without_room_for_its_client_a_claim_is_given_back_by_who_made_it(known: bool) -> None:  # noqa: FBT001
    """What another call claimed may be under way by now."""
    async with dispatcher_world(followers_max=0) as world:
        claim = Claim("m", "d")
        if known:
            await world.logs.claim("a", claim, 1)
        with pytest.raises(QueueFull):
            await world.dispatcher.submit(job("a", resumable=True, digest="d"))
        assert world.logs.claims == ({"a": claim} if known else {})


async def test_a_refused_twin_leaves_the_claim_of_the_living_request(world: World) -> None:
    """Its id, which cannot be resumed, stands for the one at the other gateway, until that one ends."""
    await world.logs.claim("a", Claim("m", "d"), 60)
    world.queue.answer = RequestExists("living")
    with pytest.raises(RequestExists):
        await world.dispatcher.submit(job("a", digest="d"))
    world.queue.answer = None
    await asyncio.sleep(0)
    with pytest.raises(RequestExists, match="other"):
        await world.dispatcher.submit(job("a", digest="another body"))
    # What was claimed here is given back here.
    stream = await world.dispatcher.submit(job("b", digest="d"))
    await stream.aclose()
    await world.queue.wait_for("settle:cancelled", "n2")
    await world.dispatcher.wait_empty()
    await asyncio.sleep(0)
    assert list(world.logs.claims) == ["a"]


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
    for workers in (0, 1, 0):
        world.queue.renewal = Renewal(workers=workers)
        await world.dispatcher.renew()
    assert generation.error is None
    await asyncio.sleep(0.06)
    world.queue.renewal = Renewal(workers=0)
    await world.dispatcher.renew()
    with pytest.raises(NoWorker) as caught:
        await rest(generation)
    assert caught.value.retry_after_s


@pytest.mark.parametrize(
    "renewal",
    [Renewal(workers=0, granted=(grant("n1"),)), Renewal(workers=0, lost=frozenset("j"))],
    ids=["granted", "lost"],
)
async def test_who_does_not_wait_at_the_queue_is_not_turned_away(world: World, renewal: Renewal) -> None:
    """A grant that the renewal tells of was made, and what the queue has lost is told to it once more."""
    world.queue.answer = Waiting(0)
    generation = await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    world.queue.renewal = Renewal(workers=0)
    await world.dispatcher.renew()
    await asyncio.sleep(0.06)
    world.queue.renewal = renewal
    await world.dispatcher.renew()
    assert generation.error is None


async def test_a_place_is_asked_for_when_it_is_to_be_told(world: World) -> None:
    """The lease of a request whose client needs to hear nothing yet is prolonged all the same."""
    for name, place in (("far", Waiting(100, 60.0)), ("near", Waiting(2, 60.0))):
        world.queue.answer = place
        await world.dispatcher.submit(job(name))
    await asyncio.sleep(0)
    await world.dispatcher.renew()
    assert world.queue.places == frozenset({"near"})
    assert set(world.queue.calls[-1][1].split(",")) == {"far", "near"}


async def test_who_waits_is_not_turned_away_while_the_only_worker_loads_another_revision(
    world: World,
) -> None:
    """A swap takes as long as what runs, and the load; after it the wait for a worker begins anew."""
    world.queue.answer = Waiting(0)
    generation = await world.dispatcher.submit(job())
    await asyncio.sleep(0)
    world.replaced.add("m")
    for _ in range(2):
        world.queue.renewal = Renewal(waiting={"j": Waiting(0)}, workers=0)
        await world.dispatcher.renew()
        await asyncio.sleep(0.06)
    world.replaced.clear()
    for error in (type(None), NoWorker):
        world.queue.renewal = Renewal(waiting={"j": Waiting(0)}, workers=0)
        await world.dispatcher.renew()
        assert isinstance(generation.error, error)
        await asyncio.sleep(0.06)


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


async def test_a_lost_worker_s_request_waits_for_as_long_as_the_others_are_busy(world: World) -> None:
    """Longer than for a worker that shall come back; with a slot it goes on where it stood."""
    generation = await world.dispatcher.submit(job())
    first = world.workers.attempts[0].sink
    first.output(Output(0, ids("a")))
    first.lost("test", Loss.PROCESS)
    await asyncio.sleep(0.5)
    world.queue.receive(grant("n2"))
    (await world.workers.wait_started(2)).sink.output(Output(1, ids("b"), FinishReason.STOP))
    assert "".join(event.text for event in await rest(generation) if isinstance(event, Chunk)) == "ab"


async def test_nobody_takes_over_in_time(world: World) -> None:
    """A worker is listed and not there when it is asked: after the wait the request ends in-band."""
    generation = await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.lost("test", Loss.PROCESS)

    async def lend_in_vain() -> None:
        for number in range(2, 20):
            world.queue.receive(grant(f"n{number}"))
            (await world.workers.wait_started(number)).sink.refused(RefusalReason.UNREACHABLE, "away")
            await asyncio.sleep(0.05)

    lending = asyncio.create_task(lend_in_vain())
    with pytest.raises(WorkerLost, match="no other one could go on"):
        await rest(generation)
    lending.cancel()
    await asyncio.gather(lending, return_exceptions=True)


async def test_the_queue_knows_that_nobody_holds_the_revision(world: World) -> None:
    """It has ended the job by the time it is asked about it again; the client is told when to try."""
    generation = await world.dispatcher.submit(job())
    world.workers.attempts[0].sink.lost("test", Loss.PROCESS)
    await world.queue.wait_for("requeue", "n1")
    world.queue.answer = ended_error(Outcome.FAILED)
    world.queue.renewal = Renewal(lost=frozenset({"j"}))
    await asyncio.sleep(0.1)
    await world.dispatcher.renew()
    with pytest.raises(WorkerLost, match="none can continue it") as caught:
        await rest(generation)
    assert caught.value.retry_after_s
