"""Several continuations of one prompt: each has its text, its end and its credit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import generation_pb2, worker_service_pb2

from services.gateway.core.params import GenerationRequest, TextPrompt
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.scripted_worker import Script, logprob_of
from tests.fixtures.gateway_world import MODEL, GatewayWorld, bearer, fail, open_gateway, read_rest

LONG = "The quick brown fox jumps over the lazy dog."
SHORT = "A fox."
OTHER = "Quite another text, of another length"
TEXTS = {0: LONG, 1: SHORT, 2: OTHER}
STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH


def script(**fields: Any) -> Script:
    """A worker that says something else in each sequence."""
    return Script(**{"answer": LONG, "others": (SHORT, OTHER), **fields})


def asked(n: int = 3, **fields: Any) -> pb.GenerateRequest:
    """A request for so many continuations."""
    return pb.GenerateRequest(text="hi", n=n, **{"max_tokens": 100, **fields})


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway that suspects a worker only shortly."""
    limits = GenerationLimits(failover_wait_s=0.5)
    async with open_gateway(
        generation=limits, queue_limits=QueueLimits(suspect_s=0.05, failover_wait_s=0.5)
    ) as world:
        yield world


def texts(events: Iterable[Any]) -> dict[int, str]:
    """The text of each sequence, after checking that the indices of each are contiguous."""
    found: dict[int, str] = {}
    positions: dict[int, int] = {}
    for event in events:
        if event.HasField("chunk"):
            chunk = event.chunk
            assert chunk.index == positions.get(chunk.sequence, 0)
            positions[chunk.sequence] = chunk.index + len(chunk.token_ids)
            found[chunk.sequence] = found.get(chunk.sequence, "") + chunk.text
    return found


def ends(events: Iterable[Any]) -> dict[int, Any]:
    """The end of each sequence, after checking that there is one of each, and nothing of it behind."""
    found: dict[int, Any] = {}
    for event in events:
        if event.HasField("finished"):
            assert event.finished.sequence not in found
            found[event.finished.sequence] = event.finished
        elif event.HasField("chunk"):
            assert event.chunk.sequence not in found
    return found


async def test_each_sequence_is_told_by_its_number(gateway: GatewayWorld) -> None:
    """One job and one start; each has its text and its end, and the prompt is counted once."""
    worker = await gateway.add_worker("w1", script(cached_prompt_tokens=3))
    events = await gateway.generate(asked())
    assert texts(events) == TEXTS
    assert {at: end.reason for at, end in ends(events).items()} == dict.fromkeys(TEXTS, STOP)
    used = {at: end.usage.completion_tokens for at, end in ends(events).items()}
    assert used == {at: len(text) for at, text in TEXTS.items()}
    (order,) = worker.starts
    assert (order.n, list(order.emitted)) == (3, [])
    prompts = [ends(events)[at].usage.prompt_tokens for at in range(3)]
    assert prompts == [len(order.prompt_ids), 0, 0]
    assert [ends(events)[at].usage.cached_prompt_tokens for at in range(3)] == [3, 0, 0]
    assert [event.HasField("started") for event in events].count(True) == 1
    assert events[-1].HasField("finished")
    assert [event.cursor for event in events] == list(range(1, len(events) + 1))
    await gateway.wait_idle()


async def test_each_sequence_has_its_own_limit_and_scores(gateway: GatewayWorld) -> None:
    """`max_tokens` holds for each; so do the scores of its tokens."""
    await gateway.add_worker("w1", script())
    events = await gateway.generate(asked(2, max_tokens=9, logprobs=1))
    assert texts(events) == {0: LONG[:9], 1: SHORT}
    assert {at: end.reason for at, end in ends(events).items()} == {0: LENGTH, 1: STOP}
    for event in events:
        assert list(event.chunk.logprobs) == [logprob_of(token, 1) for token in event.chunk.token_ids]


async def test_a_stop_string_ends_its_sequence_alone(gateway: GatewayWorld) -> None:
    """The worker is told to end that one, and no other; what it still says of it goes no further."""
    worker = await gateway.add_worker("w1", script())
    events = await gateway.generate(asked(stop=["another"]))
    assert texts(events) == {**TEXTS, 2: "Quite "}
    assert ends(events)[2].stop_text == "another"
    assert [sequence for _, sequence in worker.shortened] == [2]
    assert worker.cancelled == []
    await gateway.wait_idle()


async def test_a_stop_string_in_the_last_sequence_ends_the_job(gateway: GatewayWorld) -> None:
    """The others have ended, so that nothing is left to go on."""
    worker = await gateway.add_worker("w1", script())
    events = await gateway.generate(asked(stop=["lazy"]))
    assert texts(events) == {**TEXTS, 0: "The quick brown fox jumps over the "}
    assert [end.stop_text for end in ends(events).values()].count("lazy") == 1
    assert (len(worker.cancelled), worker.shortened) == (1, [])
    await gateway.wait_idle()


@pytest.mark.parametrize("die_at", [0, 3, 12, 40])
async def test_another_worker_goes_on_with_each_where_it_was(gateway: GatewayWorld, die_at: int) -> None:
    """The texts are those of a quiet run; a sequence that had ended is not begun again."""
    first = await gateway.add_worker("w1", script(die_at=die_at))
    gateway.queue.remove_worker(MODEL, "w1")
    second = await gateway.add_worker("w2", script())
    gateway.queue.remove_worker(MODEL, "w2")
    gateway.announce(first)
    call = gateway.call(asked())
    await first.wait_until(lambda: first.starts)
    gateway.announce(second)
    gateway.queue.remove_worker(MODEL, "w1")
    events = [event async for event in call]
    assert texts(events) == TEXTS
    assert len(ends(events)) == 3
    (order,) = second.starts
    emitted = {part.sequence: ("".join(map(chr, part.token_ids)), part.ended) for part in order.emitted}
    for at, (text, ended) in emitted.items():
        assert TEXTS[at].startswith(text)
        assert len(text) in {min(die_at, len(TEXTS[at])), min(die_at - 1, len(TEXTS[at]))}
        assert not ended or text == TEXTS[at]
    assert (1 in emitted and emitted[1][1]) == (die_at > len(SHORT))
    await gateway.wait_idle()


async def test_a_sequence_that_cannot_go_on_ends_the_attempt(gateway: GatewayWorld) -> None:
    """The worker gave up one of them: the rest is cancelled there, and all go on at another one."""
    failing = await gateway.add_worker("w1", script(failing=True))
    gateway.queue.remove_worker(MODEL, "w1")
    healthy = await gateway.add_worker("w2", script())
    gateway.queue.remove_worker(MODEL, "w2")
    gateway.announce(failing)
    call = gateway.call(asked())
    await failing.wait_until(lambda: failing.starts)
    gateway.announce(healthy)
    gateway.queue.remove_worker(MODEL, "w1")
    assert texts([event async for event in call]) == TEXTS
    await failing.wait_until(lambda: failing.cancelled)
    assert len(failing.cancelled) == 1


async def test_credit_is_each_sequences_own() -> None:
    """A client that reads nothing holds all of them; one that reads gets texts longer than the credit."""
    long = {0: "abcdefgh" * 20, 1: "ijkl" * 40, 2: "m"}
    limits = GenerationLimits(credit_tokens=4, client_stall_s=0.5)
    async with open_gateway(generation=limits) as gateway:
        worker = await gateway.add_worker("w1", Script(answer=long[0], others=(long[1], long[2])))
        assert texts(await gateway.generate(asked(max_tokens=400))) == long
        generation = await gateway.reception.generate(
            gateway.reception.authenticate(bearer(), "generate"),
            "stalled",
            GenerationRequest(prompt=TextPrompt("hi"), max_tokens=400, n=3),
            60.0,
        )
        worker.sent.clear()
        assert await anext(generation) is not None
        await worker.wait_until(lambda: worker.cancelled)
        assert max(worker.sent.values()) == 4
        with pytest.raises(Exception, match="read nothing"):
            async for _ in generation:
                pass
        await gateway.wait_idle()


async def test_a_client_that_leaves_ends_all(gateway: GatewayWorld) -> None:
    """One cancellation, and every slot is free."""
    worker = await gateway.add_worker("w1", script(interval_s=0.02))
    call = gateway.call(asked())
    await call.read()
    await worker.wait_until(lambda: worker.sent)
    call.cancel()
    await worker.wait_until(lambda: worker.cancelled)
    await gateway.wait_idle()
    assert worker.shortened == []


async def test_a_request_waits_for_as_many_slots(gateway: GatewayWorld) -> None:
    """Three of four slots are taken: a request for two waits until there are as many."""
    worker = await gateway.add_worker("w1", script(interval_s=0.02), slots=4)
    first = gateway.call(asked(3))
    await worker.wait_until(lambda: worker.starts)
    second = gateway.call(asked(2))
    assert (await second.read()).queued.position == 0
    first.cancel()
    assert texts(await read_rest(second)) == {0: LONG, 1: SHORT}


async def test_more_than_a_worker_has_slots_is_refused_in_words(gateway: GatewayWorld) -> None:
    """The worker says so, and the client hears it as its own fault: nobody waits for what never comes."""
    told = "n: 4 sequences at once are more than the 2 slots of this worker."
    refusing = script(refusals=[worker_service_pb2.REFUSAL_REASON_INVALID], message=told)
    await gateway.add_worker("w1", refusing, slots=2)
    error, _ = await fail(gateway.call(asked(4)))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, told)


async def test_the_native_http_api_tells_of_each(gateway: GatewayWorld) -> None:
    """The result has the first at its top, each in a list, and the usage of all; one alone has no list."""
    await gateway.add_worker("w1", script())
    reply = (await gateway.post({"text": "hi", "n": 3, "max_tokens": 100})).json
    assert reply["result"] == LONG
    assert [one["result"] for one in reply["sequences"]] == list(TEXTS.values())
    assert [one["sequence"] for one in reply["sequences"]] == [0, 1, 2]
    assert [one["finish_reason"] for one in reply["sequences"]] == ["stop"] * 3
    assert reply["usage"]["completion_tokens"] == sum(map(len, TEXTS.values()))
    assert reply["usage"]["prompt_tokens"] == reply["sequences"][0]["usage"]["prompt_tokens"] > 0
    alone = (await gateway.post({"text": "hi", "max_tokens": 100})).json
    assert (alone["result"], "sequences" in alone) == (LONG, False)
    streamed = (await gateway.post({"text": "hi", "n": 3, "max_tokens": 100, "stream": True})).events
    said = dict.fromkeys(TEXTS, "")
    for event in streamed:
        if event["event"] == "chunk":
            said[event["data"]["chunk"]["sequence"]] += event["data"]["chunk"]["text"]
    assert said == TEXTS
    told = [event["data"]["finished"]["sequence"] for event in streamed if event["event"] == "finished"]
    assert sorted(told) == [0, 1, 2]


async def test_the_meter_hears_of_one_request(gateway: GatewayWorld) -> None:
    """One success with the tokens of all, and one first token."""
    await gateway.add_worker("w1", script())
    await gateway.generate(asked())
    meter: Any = gateway.dispatcher._meter
    ((_, _, finished),) = meter.requests
    assert finished.usage.completion_tokens == sum(map(len, TEXTS.values()))
    assert len(meter.first_tokens) == 1
