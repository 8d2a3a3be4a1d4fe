"""Requests through a real gRPC server to scripted workers: what goes well, and what a client may do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import generation_pb2

from services.common.conversation import Aside, Message
from services.gateway.core.params import GenerationRequest, TextPrompt
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.gateway_ports import FakeTokenizer
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import (
    MODEL,
    REVISION,
    GatewayWorld,
    bearer,
    fail,
    joined,
    make_token,
    open_gateway,
    read_rest,
    reason_of,
)

NAN = float("nan")
SYSTEM = generation_pb2.PRIORITY_SYSTEM


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway with one place in the queue and no worker."""
    async with open_gateway(queue_limits=QueueLimits(waiting_jobs_max=1)) as world:
        yield world


async def test_an_answer_arrives_whole_and_in_order(gateway: GatewayWorld) -> None:
    """One started, chunks from index 0, one finished with usage and timings; the metadata names all."""
    worker = await gateway.add_worker("w1", Script(answer="Forty-two."))
    call = gateway.call(pb.GenerateRequest(text="hi", request_id="mine"))
    events = [event async for event in call]
    assert joined(events) == "Forty-two."
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    started, finished = events[0].started, events[-1].finished
    assert (started.request_id, started.model, started.revision) == ("mine", MODEL, REVISION)
    assert (started.worker_id, started.attempt) == ("w1", 1)
    assert finished.reason == generation_pb2.FINISH_REASON_STOP
    assert finished.usage.prompt_tokens == len("user:hi\n")
    assert finished.usage.completion_tokens == 10
    assert finished.timings.total.ToMicroseconds() > 0
    metadata = dict(await call.initial_metadata())
    assert metadata["x-request-id"] == "mine"
    assert metadata["x-interlock-revision"] == REVISION
    assert metadata["x-interlock-worker"] == "w1"
    (order,) = worker.starts
    assert (order.request_id, order.revision, order.epoch, order.sampling.seed) == ("mine", REVISION, 1, 7)
    assert worker.gateways == ["gateway-1"]


async def test_all_requests_share_one_session(gateway: GatewayWorld) -> None:
    """Several streams at once, one session, and each gets its own answer."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 50))
    limits = [5, 10, 15, 20]
    answers = await asyncio.gather(
        *(gateway.generate(pb.GenerateRequest(text="hi", max_tokens=limit)) for limit in limits)
    )
    assert [len(joined(events)) for events in answers] == limits
    assert {events[-1].finished.reason for events in answers} == {generation_pb2.FINISH_REASON_LENGTH}
    assert len(worker.gateways) == 1


async def test_a_stop_string_cuts_the_text_and_ends_the_worker(gateway: GatewayWorld) -> None:
    """The text ends before it, `finished` names it, and the worker is told to stop."""
    worker = await gateway.add_worker("w1", Script(answer="one two STOP three" * 20, interval_s=0.001))
    events = await gateway.generate(pb.GenerateRequest(text="hi", stop=["STOP"], max_tokens=400))
    assert joined(events) == "one two "
    assert events[-1].finished.stop_text == "STOP"
    assert events[-1].finished.reason == generation_pb2.FINISH_REASON_STOP
    assert events[-1].finished.usage.completion_tokens == len("one two STOP")
    await gateway.wait_idle()
    assert len(worker.cancelled) == 1


async def test_a_cancelled_call_frees_its_slot(gateway: GatewayWorld) -> None:
    """The client goes away mid-stream; the worker is told, and the next request gets the only slot."""
    script = Script(answer="x" * 400, interval_s=0.01)
    worker = await gateway.add_worker("w1", script, slots=1)
    call = gateway.call(pb.GenerateRequest(text="hi", max_tokens=400))
    async for event in call:
        if event.HasField("chunk"):
            break
    call.cancel()
    await worker.wait_until(lambda: worker.cancelled)
    script.answer = "next"
    assert joined(await gateway.generate()) == "next"
    await gateway.wait_idle()


async def test_a_waiting_request_hears_of_its_place(gateway: GatewayWorld) -> None:
    """No free slot: `queued` at once, `started` when the slot is given back."""
    script = Script(answer="x" * 400, interval_s=0.01)
    await gateway.add_worker("w1", script, slots=1)
    first = gateway.call(pb.GenerateRequest(text="hi", max_tokens=400))
    await first.read()
    second = gateway.call()
    event = await second.read()
    assert event.HasField("queued")
    script.answer = "short"
    first.cancel()
    assert joined([event, *await read_rest(second)]) == "short"
    assert "x-interlock-worker" not in dict(await second.initial_metadata())


async def test_a_cancelled_waiting_request_leaves_the_queue(gateway: GatewayWorld) -> None:
    """Its place is free for another one right away."""
    waiting = gateway.call()
    assert (await waiting.read()).HasField("queued")
    waiting.cancel()
    await gateway.wait_idle()
    assert await gateway.queue.length(MODEL) == 0


async def test_a_full_queue_refuses_at_once(gateway: GatewayWorld) -> None:
    """RESOURCE_EXHAUSTED with a delay, before anything is streamed."""
    waiting = gateway.call()
    assert (await waiting.read()).HasField("queued")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.generate()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(caught.value) == "QUEUE_FULL"
    assert int(str(dict(caught.value.trailing_metadata() or ())["retry-after-ms"])) > 0


async def test_a_deadline_ends_a_waiting_request(gateway: GatewayWorld) -> None:
    """The header's deadline passes in the queue: DEADLINE_EXCEEDED from the server, and the place is free."""
    metadata = (*bearer(), ("x-interlock-deadline", "0.2"))
    error, events = await fail(gateway.call(metadata=metadata))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_of(error) == "DEADLINE_EXCEEDED"
    assert [event.WhichOneof("event") for event in events] == ["queued"]
    await gateway.wait_idle()
    assert await gateway.queue.length(MODEL) == 0


async def test_a_deadline_ends_a_running_request(gateway: GatewayWorld) -> None:
    """It passes mid-stream: the error comes after the chunks, and the worker is told."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.01))
    metadata = (*bearer(), ("x-interlock-deadline", "1.5"))
    request = pb.GenerateRequest(text="hi", max_tokens=400)
    error, events = await fail(gateway.call(request, metadata=metadata))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert joined(events)
    await gateway.wait_idle()
    assert len(worker.cancelled) == 1


async def test_an_owner_cancels_by_id_and_nobody_else_does(gateway: GatewayWorld) -> None:
    """CancelGeneration ends the own request once; the same id of another subject is unknown."""
    await gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.01))
    call = gateway.call(pb.GenerateRequest(text="hi", request_id="r", max_tokens=400))
    await call.read()
    cancel = pb.CancelGenerationRequest(request_id="r")
    with pytest.raises(grpc.aio.AioRpcError) as foreign:
        await gateway.stub.CancelGeneration(cancel, metadata=bearer(subject="bob"))
    assert foreign.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await gateway.stub.CancelGeneration(cancel, metadata=bearer())).cancelled
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    await gateway.wait_idle()
    assert not (await gateway.stub.CancelGeneration(cancel, metadata=bearer())).cancelled


async def test_an_id_in_use_is_refused(gateway: GatewayWorld) -> None:
    """ALREADY_EXISTS while the first lives; another subject may use the same id."""
    await gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.01))
    request = pb.GenerateRequest(text="hi", request_id="r", max_tokens=400)
    first = gateway.call(request)
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.generate(request)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    other = gateway.call(request, metadata=bearer(subject="bob"))
    assert (await other.read()).HasField("started")


async def test_an_id_is_free_before_a_worker_has_ended_what_was_asked_by_it(gateway: GatewayWorld) -> None:
    """In a long step it hears of no cancellation: what it still says of the first is not the second's."""
    worker = await gateway.add_worker("w1", Script(answer="the first " * 4, interval_s=0.01, deaf=True))
    request = pb.GenerateRequest(text="hi", request_id="r")
    first = gateway.call(request)
    while not (await first.read()).HasField("chunk"):
        pass
    first.cancel()
    async with asyncio.timeout(10):
        await gateway.dispatcher.wait_empty()
    worker.script.answer = "the second"
    events = await gateway.generate(request)
    assert joined(events) == "the second"
    assert [event.started.attempt for event in events if event.HasField("started")] == [1]
    assert len({(order.job, order.attempt) for order in worker.starts}) == len(worker.starts) == 2


async def test_credit_bounds_what_a_worker_sends_to_an_unread_stream() -> None:
    """The client reads nothing: the worker stops within its credit, and the slot is freed after a while."""
    limits = GenerationLimits(credit_tokens=8, client_stall_s=0.3)
    async with open_gateway(generation=limits) as gateway:
        worker = await gateway.add_worker("w1", Script(answer="x" * 400))
        metadata = bearer()
        generation = await gateway.reception.generate(
            gateway.reception.authenticate(metadata, "generate"),
            "stalled",
            GenerationRequest(prompt=TextPrompt("hi"), max_tokens=400),
            60.0,
        )
        assert await anext(generation) is not None
        await worker.wait_until(lambda: worker.cancelled)
        assert max(worker.sent.values()) <= 8
        with pytest.raises(Exception, match="read nothing"):
            async for _ in generation:
                pass
        await gateway.wait_idle()


async def test_a_small_credit_is_renewed_as_the_client_reads() -> None:
    """A stream much longer than its credit arrives whole."""
    async with open_gateway(generation=GenerationLimits(credit_tokens=4)) as gateway:
        await gateway.add_worker("w1", Script(answer="abcdefgh" * 20))
        events = await gateway.generate(pb.GenerateRequest(text="hi", max_tokens=400))
        assert joined(events) == "abcdefgh" * 20


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "TOKEN_MISSING"),
        ("nonsense", "TOKEN_INVALID"),
        (make_token(ttl_s=-100), "TOKEN_EXPIRED"),
    ],
    ids=["missing", "invalid", "expired"],
)
async def test_who_cannot_be_believed_is_unauthenticated(
    gateway: GatewayWorld, token: str, reason: str
) -> None:
    """Each with its reason, on every method."""
    calls = [
        gateway.call(metadata=bearer(token)).read,
        lambda: gateway.stub.CountTokens(pb.CountTokensRequest(text="a"), metadata=bearer(token)),
        lambda: gateway.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(token)),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert reason_of(caught.value) == reason


async def test_a_missing_scope_is_forbidden(gateway: GatewayWorld) -> None:
    """`models:read` lists models and does not generate."""
    token = make_token("alice", "models:read")
    listed = await gateway.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(token))
    assert [(model.name, model.is_default) for model in listed.models] == [(MODEL, True)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.call(metadata=bearer(token)).read()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@dataclass(frozen=True)
class Busy(FakeTokenizer):
    """Tokenizes in a thread that ends when its test does."""

    may_end: threading.Event = field(default_factory=threading.Event)

    async def encode(self, messages: Sequence[Message], aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        del messages
        return await aside(lambda: (1,) if self.may_end.wait() else ())


async def test_a_deadline_holds_while_a_prompt_is_tokenized() -> None:
    """The header's, for an answer and for a count; nothing was queued."""
    tokenizer = Busy()
    metadata = (*bearer(), ("x-interlock-deadline", "0.2"))
    async with open_gateway(tokenizer=tokenizer) as gateway:
        try:
            error, events = await fail(gateway.call(metadata=metadata))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await gateway.stub.CountTokens(pb.CountTokensRequest(text="hi"), metadata=metadata)
        finally:
            tokenizer.may_end.set()
    assert [reason_of(one) for one in (error, caught.value)] == ["DEADLINE_EXCEEDED"] * 2
    assert events == []


async def test_counting_tokens_uses_the_template(gateway: GatewayWorld) -> None:
    """The count is the prompt's, with its model and context."""
    count = await gateway.stub.CountTokens(pb.CountTokensRequest(text="hi"), metadata=bearer())
    assert (count.prompt_tokens, count.context_tokens) == (len("user:hi\n"), 512)


@pytest.mark.parametrize(
    ("request_", "code", "named"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "text"),
        (pb.GenerateRequest(text="hi", max_tokens=0), "INVALID_ARGUMENT", "max_tokens"),
        (pb.GenerateRequest(text="hi", max_tokens=-1), "INVALID_ARGUMENT", "max_tokens"),
        (pb.GenerateRequest(text="hi", max_tokens=505), "INVALID_ARGUMENT", "max_tokens"),
        (pb.GenerateRequest(text="x" * 600), "INVALID_ARGUMENT", "context"),
        (pb.GenerateRequest(text="hi", request_id="a b"), "INVALID_ARGUMENT", "request_id"),
        (pb.GenerateRequest(text="hi", model="no-such"), "NOT_FOUND", "no-such"),
        (pb.GenerateRequest(text="hi", n=5), "INVALID_ARGUMENT", "n:"),
        (pb.GenerateRequest(text="hi", stop=[""]), "INVALID_ARGUMENT", "stop"),
        (pb.GenerateRequest(text="hi", logprobs=21), "INVALID_ARGUMENT", "logprobs"),
        (pb.GenerateRequest(text="hi", format=generation_pb2.OutputFormat()), "INVALID_ARGUMENT", "format"),
        (
            pb.GenerateRequest(text="hi", format=generation_pb2.OutputFormat(regex="a" * 4_097)),
            "INVALID_ARGUMENT",
            "format.regex",
        ),
        (
            pb.GenerateRequest(text="hi", sampling=generation_pb2.SamplingParams(logit_bias={1 << 20: 1})),
            "INVALID_ARGUMENT",
            "logit_bias",
        ),
        (
            pb.GenerateRequest(text="hi", sampling=generation_pb2.SamplingParams(temperature=NAN)),
            "INVALID_ARGUMENT",
            "temperature",
        ),
        (pb.GenerateRequest(tokens=generation_pb2.TokenInput(ids=[1 << 20])), "INVALID_ARGUMENT", "tokens"),
        (
            pb.GenerateRequest(text="hi", priority=SYSTEM),
            "PERMISSION_DENIED",
            "SYSTEM",
        ),
    ],
    ids=range(16),
)
async def test_a_bad_request_is_refused_by_name_and_the_next_one_works(
    gateway: GatewayWorld, request_: pb.GenerateRequest, code: str, named: str
) -> None:
    """A typed error whose message names the field."""
    await gateway.add_worker("w1", Script(answer="fine"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.generate(request_)
    assert caught.value.code().name == code
    assert named in (caught.value.details() or "")
    assert joined(await gateway.generate()) == "fine"


async def test_options_survive_a_failover(gateway: GatewayWorld) -> None:
    """The second worker gets the same order, what was emitted beside it, and each token keeps its logprob."""
    first = await gateway.add_worker("w1", Script(answer="x" * 20, die_at=7))
    shape = generation_pb2.OutputFormat(json_schema='{"type": "string"}')
    sampling = generation_pb2.SamplingParams(logit_bias={5: 1.5}, repetition_penalty=1.5)
    events = await gateway.generate(
        pb.GenerateRequest(text="hi", logprobs=1, format=shape, sampling=sampling)
    )
    assert joined(events) == "x" * 20
    before, after = first.starts
    assert (before.format, before.sampling, before.logprobs) == (after.format, after.sampling, after.logprobs)
    assert before.format == shape
    assert len(after.emitted[0].token_ids) == 7
    chunks = [event.chunk for event in events if event.HasField("chunk")]
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert {score.alternatives[0].token_id for chunk in chunks for score in chunk.logprobs} == {ord("x")}


async def test_a_draining_gateway_ends_what_runs_and_takes_nothing_new(gateway: GatewayWorld) -> None:
    """The running stream arrives whole; a new call is UNAVAILABLE with DRAINING."""
    await gateway.add_worker("w1", Script(answer="x" * 30, interval_s=0.005))
    running = gateway.call()
    first = await running.read()
    gateway.reception.drain()
    draining = asyncio.create_task(gateway.dispatcher.drain(10))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.generate()
    assert reason_of(caught.value) == "DRAINING"
    assert joined([first, *await read_rest(running)]) == "x" * 30
    await draining
    assert gateway.dispatcher.live == 0
