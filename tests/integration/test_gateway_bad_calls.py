"""What no client should send by gRPC: each is refused by name, at once, and the next request works.

Where each case of "bad input: gRPC" is tested. "Here" is `test_a_bad_request_is_refused`.

| case | test |
|---|---|
| bytes that are no message | `test_bytes_that_are_no_message_are_refused` |
| over-limit messages | `test_a_message_over_the_limit_is_refused` |
| within the limit, with millions of parts | `test_a_message_of_many_parts_stops_nobody` |
| any of them without a token | `test_without_a_token_no_message_is_read` |
| unknown model | here: `model: ...` |
| text and chat both absent | here: `no input` |
| NaN, infinite, negative or huge numbers | `test_a_number_out_of_its_range_is_refused_by_name` |
| `n`, `stop`, `logit_bias`, `max_tokens` over their bounds | here: `n: ...`, `stop: ...`, ... |
| a prompt longer than the context | here: `context: ...` |
| control characters in ids | here: `request_id: ...`; `test_ids_of_other_calls_are_checked_too` |
| client-sent internal metadata | `test_internal_metadata_of_a_client_changes_nothing`; e2e |
| a user token on an admin RPC | `tests/integration/test_controller_refusals.py` |
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1.generation_pb2 import ChatInput, ChatMessage, SamplingParams, TokenInput
from structlog.testing import capture_logs

from services.common.channel import MESSAGE_BYTES_MAX
from services.gateway import servicer
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.any_call import check_at_once, check_prompt, methods_of, refusal
from tests.fixtures.gateway_world import (
    CONTEXT_TOKENS,
    GatewayWorld,
    bearer,
    joined,
    open_gateway,
    reason_of,
)
from tests.fixtures.large_calls import LARGE_CALLS

METHODS = methods_of(pb, "GatewayService")
GENERATE = next(method for method in METHODS if method.name == "Generate")


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway with a worker that answers."""
    async with open_gateway(queue_limits=QueueLimits(waiting_jobs_max=1)) as world:
        await world.add_worker("w1", Script(answer="fine"))
        yield world


async def refused(gateway: GatewayWorld, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    """How a request is refused; nothing of it reached the worker, and the next one works."""
    error = await refusal(gateway.channel, GENERATE, bearer(), request.SerializeToString())
    assert not gateway.workers["w1"].starts
    assert joined(await gateway.generate()) == "fine"
    assert "Traceback" not in (error.details() or "")
    return error


# Noise, a group that never ends, a length that lies, and a text that is not UTF-8.
NOISE = (b"\xff", b"{}", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x03\xff\xfe\xfd")


def noise_for(method: Any) -> tuple[bytes, ...]:
    """Bytes that are no message of a method; to one without fields, all fields are unknown."""
    return NOISE if method.input_type.fields_by_number.get(1) else NOISE[:3]


@pytest.mark.parametrize(
    ("method", "data"),
    [(method, data) for method in METHODS for data in noise_for(method)],
    ids=lambda value: getattr(value, "name", None),
)
async def test_bytes_that_are_no_message_are_refused(gateway: GatewayWorld, method: Any, data: bytes) -> None:
    """INVALID_ARGUMENT with a reason, on every method that is served."""
    error = await refusal(gateway.channel, method, bearer(), data)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
    assert joined(await gateway.generate()) == "fine"


async def test_a_message_over_the_limit_is_refused(gateway: GatewayWorld) -> None:
    """One byte more than the server reads is RESOURCE_EXHAUSTED, long before it is looked at."""
    data = pb.GenerateRequest(text="x" * MESSAGE_BYTES_MAX).SerializeToString()
    error = await refusal(gateway.channel, GENERATE, bearer(), data)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert joined(await gateway.generate()) == "fine"


NUMBERS = {
    "NaN": math.nan,
    "infinite": math.inf,
    "negative infinite": -math.inf,
    "negative": -101.0,
    "huge": 3e38,
}


@pytest.mark.parametrize("value", NUMBERS.values(), ids=list(NUMBERS))
@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ],
)
async def test_a_number_out_of_its_range_is_refused_by_name(
    gateway: GatewayWorld, field: str, value: float
) -> None:
    """Every fraction of the sampling parameters."""
    given: Any = {field: {1: value} if field == "logit_bias" else value}
    error = await refused(gateway, pb.GenerateRequest(text="hi", sampling=SamplingParams(**given)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
    assert field in (error.details() or "")


def chat(role: str = "user", content: str = "hi", turns: int = 1) -> ChatInput:
    """A conversation of equal turns."""
    return ChatInput(messages=[ChatMessage(role=role, content=content)] * turns)


INVALID, NOT_FOUND, FORBIDDEN = "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"
LARGEST = 2**31 - 1
REQUESTS = {
    "no input": ("text", INVALID, pb.GenerateRequest()),
    "text: empty": ("text", INVALID, pb.GenerateRequest(text="")),
    "chat: no turn": ("messages", INVALID, pb.GenerateRequest(chat=ChatInput())),
    "chat: no role": ("messages[0].role", INVALID, pb.GenerateRequest(chat=chat(role=""))),
    "chat: huge role": ("messages[0].role", INVALID, pb.GenerateRequest(chat=chat(role="x" * 65))),
    "chat: too many turns": ("messages", INVALID, pb.GenerateRequest(chat=chat(turns=1_025))),
    "tokens: none": ("tokens", INVALID, pb.GenerateRequest(tokens=TokenInput())),
    "tokens: not in the vocabulary": (
        "tokens",
        INVALID,
        pb.GenerateRequest(tokens=TokenInput(ids=[2**32 - 1])),
    ),
    "context: long text": ("context", INVALID, pb.GenerateRequest(text="x" * 600)),
    "context: long tokens": ("context", INVALID, pb.GenerateRequest(tokens=TokenInput(ids=[1] * 600))),
    "context: text of 2 MB": ("text", INVALID, pb.GenerateRequest(text="x" * (1 << 21))),
    "model: unknown": ("other", NOT_FOUND, pb.GenerateRequest(text="hi", model="other")),
    "model: empty": ("model", NOT_FOUND, pb.GenerateRequest(text="hi", model="")),
    "model: control characters": ("model", NOT_FOUND, pb.GenerateRequest(text="hi", model="a\n\x1b[31m")),
    "model: a path": ("model", NOT_FOUND, pb.GenerateRequest(text="hi", model="../../etc/passwd")),
    "request_id: control character": (
        "request_id",
        INVALID,
        pb.GenerateRequest(text="hi", request_id="a\nb"),
    ),
    "request_id: NUL": ("request_id", INVALID, pb.GenerateRequest(text="hi", request_id="a\0b")),
    "request_id: empty": ("request_id", INVALID, pb.GenerateRequest(text="hi", request_id="")),
    "request_id: a newline at its end": (
        "request_id",
        INVALID,
        pb.GenerateRequest(text="hi", request_id="a\n"),
    ),
    "request_id: huge": ("request_id", INVALID, pb.GenerateRequest(text="hi", request_id="x" * 65)),
    "request_id: letters of other scripts": (
        "request_id",
        INVALID,
        pb.GenerateRequest(text="hi", request_id="é"),
    ),
    "max_tokens: 0": ("max_tokens", INVALID, pb.GenerateRequest(text="hi", max_tokens=0)),
    "max_tokens: negative": ("max_tokens", INVALID, pb.GenerateRequest(text="hi", max_tokens=-LARGEST)),
    "max_tokens: huge": ("max_tokens", INVALID, pb.GenerateRequest(text="hi", max_tokens=LARGEST)),
    "n: 0": ("n:", INVALID, pb.GenerateRequest(text="hi", n=0)),
    "n: negative": ("n:", INVALID, pb.GenerateRequest(text="hi", n=-1)),
    "n: 5": ("n:", INVALID, pb.GenerateRequest(text="hi", n=5)),
    "logprobs: negative": ("logprobs", INVALID, pb.GenerateRequest(text="hi", logprobs=-1)),
    "logprobs: 21": ("logprobs", INVALID, pb.GenerateRequest(text="hi", logprobs=21)),
    "stop: five": ("stop", INVALID, pb.GenerateRequest(text="hi", stop=list("abcde"))),
    "stop: huge": ("stop", INVALID, pb.GenerateRequest(text="hi", stop=["x" * 257])),
    "stop: empty": ("stop", INVALID, pb.GenerateRequest(text="hi", stop=[""])),
    "top_k: 0": ("top_k", INVALID, pb.GenerateRequest(text="hi", sampling=SamplingParams(top_k=0))),
    "top_k: negative": ("top_k", INVALID, pb.GenerateRequest(text="hi", sampling=SamplingParams(top_k=-1))),
    "logit_bias: too many": (
        "logit_bias",
        INVALID,
        pb.GenerateRequest(text="hi", sampling=SamplingParams(logit_bias=dict.fromkeys(range(1_025), 1.0))),
    ),
    "logit_bias: not in the vocabulary": (
        "logit_bias",
        INVALID,
        pb.GenerateRequest(text="hi", sampling=SamplingParams(logit_bias={2**31 - 1: 1.0})),
    ),
    "priority: unknown": ("priority", INVALID, pb.GenerateRequest(text="hi", priority=99)),  # type: ignore[arg-type]
    "priority: negative": ("priority", INVALID, pb.GenerateRequest(text="hi", priority=-1)),  # type: ignore[arg-type]
    "priority: without its scope": ("priority", FORBIDDEN, pb.GenerateRequest(text="hi", priority=3)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_bad_request_is_refused(gateway: GatewayWorld, case: str) -> None:
    """The message names the field, and repeats no control character."""
    named, code, request = REQUESTS[case]
    error = await refused(gateway, request)
    assert error.code().name == code
    assert reason_of(error)
    assert named in (error.details() or "")
    assert (error.details() or "").isprintable()


async def test_bad_input_is_refused_at_once(gateway: GatewayWorld) -> None:
    """Whatever is wrong with it, in less than 100 ms: bytes that are no message, and every bad request."""
    noise = [(method, bearer(), data) for method in METHODS for data in noise_for(method)]
    bad = [(GENERATE, bearer(), request.SerializeToString()) for _, _, request in REQUESTS.values()]
    await check_prompt(gateway.channel, noise + bad)


# Decoding alone takes a quarter of a second, and more on a busy machine; reading the parts took several.
LARGE_S = 1.5


@pytest.mark.parametrize("name", LARGE_CALLS)
async def test_a_message_of_many_parts_stops_nobody(gateway: GatewayWorld, name: str) -> None:
    """It is refused by its counts, and whoever asks for health meanwhile is answered."""
    large = LARGE_CALLS[name]
    health: Any = health_pb2_grpc.HealthStub(gateway.channel)
    method = next(method for method in METHODS if method.name == large.method)
    data = large.make()

    async def refuse() -> None:
        call = asyncio.create_task(refusal(gateway.channel, method, bearer(), data, timeout_s=20.0))
        while not call.done():
            await health.Check(health_pb2.HealthCheckRequest())
            await asyncio.sleep(0.01)
        error = await call
        assert (error.code().name, reason_of(error)) == (INVALID, large.reason)
        assert (error.details() or "").startswith(large.words)

    await check_at_once(refuse, name, LARGE_S)
    assert joined(await gateway.generate()) == "fine"


async def test_more_ids_than_the_context_holds_are_only_counted(
    gateway: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number says all; as many as leave room for one token are read."""
    read: list[int] = []
    read_request = servicer.read_request

    def counting(request: pb.GenerateRequest) -> Any:
        read.append(len(request.tokens.ids))
        return read_request(request)

    monkeypatch.setattr(servicer, "read_request", counting)
    for count in (CONTEXT_TOKENS, CONTEXT_TOKENS + 1):
        error = await refusal(gateway.channel, GENERATE, bearer(), tokens(count).SerializeToString())
        assert reason_of(error) == "CONTEXT_EXCEEDED"
        assert error.details() == (
            f"The prompt has {count} tokens; the model's context holds {CONTEXT_TOKENS}, the answer included."
        )
    assert not read
    assert joined(await gateway.generate(tokens(CONTEXT_TOKENS - 1))) == "f"
    assert read == [CONTEXT_TOKENS - 1]


def tokens(count: int) -> pb.GenerateRequest:
    """A prompt of so many ids."""
    return pb.GenerateRequest(tokens=TokenInput(ids=[1] * count))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_without_a_token_no_message_is_read(gateway: GatewayWorld, method: Any) -> None:
    """Bytes that are no message are told so to those alone who may send one."""
    for metadata, reason in (((), "TOKEN_MISSING"), (bearer("nonsense"), "TOKEN_INVALID")):
        error = await refusal(gateway.channel, method, metadata, NOISE[0])
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, reason)


@pytest.mark.parametrize("name", ["ResumeGeneration", "CancelGeneration"])
async def test_no_log_line_repeats_an_id_that_is_none(gateway: GatewayWorld, name: str) -> None:
    """However long it is, and whatever stands in it."""
    method = next(method for method in METHODS if method.name == name)
    data = pb.CancelGenerationRequest(request_id="a secret " * 40_000).SerializeToString()
    structlog.reset_defaults()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        error = await refusal(gateway.channel, method, bearer(), data)
    assert reason_of(error) == "ARGUMENT_INVALID"
    (line,) = (line for line in lines if line["event"] == "rpc.finished")
    assert line["method"].endswith(f"/{name}")
    assert "a secret" not in str(line)


@pytest.mark.parametrize("name", ["ResumeGeneration", "CancelGeneration"])
@pytest.mark.parametrize("request_id", ["", "a b", "a\nb", "a\0", "x" * 65, "../x", "é"])
async def test_ids_of_other_calls_are_checked_too(gateway: GatewayWorld, name: str, request_id: str) -> None:
    """Neither looks for a request whose id cannot be one."""
    method = next(method for method in METHODS if method.name == name)
    # The field has one number in both messages.
    data = pb.CancelGenerationRequest(request_id=request_id).SerializeToString()
    error = await refusal(gateway.channel, method, bearer(), data)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENT_INVALID")
    assert joined(await gateway.generate()) == "fine"


async def test_internal_metadata_of_a_client_changes_nothing(gateway: GatewayWorld) -> None:
    """Headers that services or Envoy speak among themselves neither let anybody in nor reach an answer."""
    forged = (
        ("x-interlock-mesh-token", "m" * 32),
        ("x-interlock-gateway-id", "gateway-9"),
        ("x-interlock-status", "204"),
        ("x-interlock-revision", "r9"),
        ("x-interlock-worker", "w9"),
        ("interlock-reason", "ERROR_REASON_INTERNAL"),
        ("x-request-id", "a forged one"),
    )
    error = await refusal(gateway.channel, GENERATE, forged)
    assert reason_of(error) == "TOKEN_MISSING"
    call = gateway.call(metadata=(*bearer(), *forged))
    assert joined([event async for event in call]) == "fine"
    told = dict(await call.initial_metadata())
    assert (told["x-interlock-revision"], told["x-interlock-worker"]) == ("r1", "w1")
    assert told["x-request-id"] != "a forged one"
    reply = await gateway.post({"text": "hi"}, x_interlock_status="204", x_interlock_worker="w9")
    assert (reply.status, reply.headers["x-interlock-worker"]) == (200, "w1")


@pytest.mark.parametrize("deadline", ["", "0", "-1", "nan", "inf", "1e1", "1_0", "3601", "3 s", "1" * 400])
async def test_a_senseless_deadline_is_refused_by_grpc_too(gateway: GatewayWorld, deadline: str) -> None:
    """The header is named."""
    metadata = (*bearer(), ("x-interlock-deadline", deadline))
    data = pb.GenerateRequest(text="hi").SerializeToString()
    error = await refusal(gateway.channel, GENERATE, metadata, data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-interlock-deadline" in (error.details() or "")
    assert joined(await gateway.generate()) == "fine"
