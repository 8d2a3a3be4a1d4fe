"""The HTTP face as Envoy calls it: bodies, statuses, headers and events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.v1 import worker_service_pb2

from services.gateway.core.queue_limits import QueueLimits
from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import (
    MODEL,
    REVISION,
    GatewayWorld,
    bearer,
    make_token,
    open_gateway,
    read_reply,
)

BODY = {"text": "hi", "max_tokens": 100}


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway with one place in the queue and no worker, that gives up a failover at once."""
    limits = GenerationLimits(failover_wait_s=0.1)
    async with open_gateway(
        generation=limits, queue_limits=QueueLimits(waiting_jobs_max=1, failover_wait_s=0.1)
    ) as world:
        yield world


async def test_a_result_is_one_json_object(gateway: GatewayWorld) -> None:
    """Text, names, reason, usage and timings, with the headers that name the same."""
    await gateway.add_worker("w1", Script(answer="Grüße 🎉"[:6], cached_prompt_tokens=5))
    reply = await gateway.post({**BODY, "request_id": "mine"})
    assert (reply.status, reply.content_type) == (200, "application/json")
    result = reply.json
    assert (result["result"], result["request_id"], result["finish_reason"]) == ("Grüße ", "mine", "stop")
    assert (result["model"], result["revision"]) == (MODEL, REVISION)
    assert result["usage"] == {"prompt_tokens": 8, "cached_prompt_tokens": 5, "completion_tokens": 6}
    assert set(result["timings"]) == {"queue_s", "prefill_s", "decode_s", "total_s"}
    assert reply.headers["x-request-id"] == "mine"
    assert (reply.headers["x-interlock-revision"], reply.headers["x-interlock-worker"]) == (REVISION, "w1")
    assert "x-interlock-status" not in reply.headers


async def test_a_stream_is_numbered_events(gateway: GatewayWorld) -> None:
    """`id:` counts from 1, `event:` names the kind, and the chunks join to the text."""
    await gateway.add_worker("w1", Script(answer="one two three", interval_s=0.001))
    reply = await gateway.post({**BODY, "stream": True})
    assert (reply.status, reply.content_type) == (200, "text/event-stream; charset=utf-8")
    events = reply.events
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    assert all(event["data"]["cursor"] == int(event["id"]) for event in events)
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("started", "finished", {"chunk"})
    chunks = [event["data"]["chunk"] for event in events if event["event"] == "chunk"]
    assert "".join(chunk["text"] for chunk in chunks) == "one two three"
    assert [chunk["index"] for chunk in chunks] == [
        sum(len(before["token_ids"]) for before in chunks[:at]) for at in range(len(chunks))
    ]
    assert reply.headers["x-interlock-worker"] == "w1"


async def test_messages_are_a_conversation(gateway: GatewayWorld) -> None:
    """All turns reach the prompt, in their order."""
    worker = await gateway.add_worker("w1")
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert (await gateway.post({"messages": turns})).status == 200
    (order,) = worker.starts
    assert "".join(map(chr, order.prompt_ids)) == "system:a\nuser:b\n"


async def test_sampling_options_reach_the_worker(gateway: GatewayWorld) -> None:
    """Each field of the body is a field of the order, and nothing is there that was not asked for."""
    worker = await gateway.add_worker("w1")
    body = {
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"7": 1.5, "300": -100},
        "logprobs": 2,
        "format": {"choice": ["a", "b"]},
    }
    assert (await gateway.post(BODY | body)).status == 200
    assert (await gateway.post(BODY)).status == 200
    order, plain = worker.starts
    sampling = order.sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -0.5)
    assert (sampling.frequency_penalty, dict(sampling.logit_bias)) == (0.25, {7: 1.5, 300: -100.0})
    assert (order.logprobs, list(order.format.choice.choices)) == (2, ["a", "b"])
    assert [name for name in ("logprobs", "format") if plain.HasField(name)] == []
    assert not plain.sampling.logit_bias


async def test_a_schema_is_an_object_or_its_text(gateway: GatewayWorld) -> None:
    """Both spellings reach the worker as text, properties in the order in which they stood."""
    worker = await gateway.add_worker("w1")
    schema = {"type": "object", "properties": {"z": {"const": "ü"}, "a": {}}}
    for spelled in (schema, json.dumps(schema)):
        assert (await gateway.post(BODY | {"format": {"json_schema": spelled}})).status == 200
    for order in worker.starts:
        read = json.loads(order.format.json_schema)
        assert read == schema
        assert list(read["properties"]) == ["z", "a"]


async def test_logprobs_are_one_entry_a_token(gateway: GatewayWorld) -> None:
    """In the result and in each event, with the ids that they belong to; absent where not asked for."""
    await gateway.add_worker("w1", Script(answer="abc", interval_s=0.001))
    entries = [
        {
            "token_id": token,
            "logprob": -token,
            "alternatives": [
                {"token_id": token, "logprob": -token},
                {"token_id": token + 1, "logprob": -token - 1},
            ],
        }
        for token in map(ord, "abc")
    ]
    assert (await gateway.post(BODY | {"logprobs": 2})).json["logprobs"] == entries
    reply = await gateway.post(BODY | {"logprobs": 2, "stream": True})
    chunks = [event["data"]["chunk"] for event in reply.events if event["event"] == "chunk"]
    assert [entry for chunk in chunks for entry in chunk["logprobs"]] == entries
    assert "logprobs" not in (await gateway.post(BODY)).json


@pytest.mark.parametrize(
    "more",
    [{}, {"stream": True}, {"stream": True, "resumable": True}],
    ids=["whole", "streamed", "resumable"],
)
async def test_what_a_worker_cannot_make_sense_of_is_the_callers(
    gateway: GatewayWorld, more: dict[str, Any]
) -> None:
    """INVALID is 400 with the worker's words, not a retry, streamed too; the next request works."""
    invalid = worker_service_pb2.REFUSAL_REASON_INVALID
    script = Script(answer="fine", refusals=[invalid], message="format.regex: unclosed class")
    worker = await gateway.add_worker("w1", script)
    reply = await gateway.post(BODY | {"format": {"regex": "["}} | more)
    assert (reply.status, reply.json["error"]["reason"]) == (400, "ERROR_REASON_ARGUMENT_INVALID")
    assert reply.json["error"]["message"] == "format.regex: unclosed class"
    assert len(worker.starts) == 1
    assert (await gateway.post(BODY)).json["result"] == "fine"
    formed = await gateway.post(BODY | {"format": {"regex": "f.*"}} | more)
    assert (formed.status, formed.headers["x-interlock-worker"]) == (200, "w1")


async def test_an_error_after_the_first_byte_is_an_event(gateway: GatewayWorld) -> None:
    """The worker is lost for good mid-stream: the last event says so, and nothing claims success."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 50, die_at=10))
    body = HttpBody(content_type="application/json", data=b'{"text": "hi", "stream": true}')
    call = gateway.http.Generate(body, metadata=bearer())
    await worker.wait_until(lambda: worker.starts)
    gateway.queue.remove_worker(MODEL, "w1")
    reply = await read_reply(call)
    assert reply.status == 200
    kinds = [event["event"] for event in reply.events]
    assert (kinds[-1], "finished" in kinds) == ("error", False)
    error = reply.events[-1]["data"]["error"]
    assert (error["code"], error["reason"]) == ("UNAVAILABLE", "ERROR_REASON_WORKER_LOST")
    assert error["request_id"] == reply.headers["x-request-id"]


async def test_an_error_without_a_byte_keeps_its_status(gateway: GatewayWorld) -> None:
    """The same loss where one result is wanted: 503 with a delay."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 50, die_at=10))
    call = gateway.http.Generate(HttpBody(data=b'{"text": "hi"}'), metadata=bearer())
    await worker.wait_until(lambda: worker.starts)
    gateway.queue.remove_worker(MODEL, "w1")
    reply = await read_reply(call)
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json["error"]["retry_after_ms"] >= 1


async def test_a_body_that_cannot_be_made_keeps_its_status(
    gateway: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is replaced while it answers, and its tokens have no text: an error, and not a 200."""
    await gateway.add_worker("w1")
    monkeypatch.setattr(gateway.reception, "tokenizer", lambda _: None)
    for method, prompt in (
        (
            gateway.http.CreateChatCompletion,
            {"messages": [{"role": "user", "content": "hi"}], "logprobs": True},
        ),
        (gateway.http.CreateCompletion, {"prompt": "hi", "logprobs": 1}),
    ):
        data = json.dumps({"model": MODEL, **prompt}).encode()
        reply = await read_reply(method(HttpBody(data=data), metadata=bearer()))
        assert (reply.status, reply.content_type) == (500, "application/json")
        assert reply.json["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_in_the_queue_is_504(gateway: GatewayWorld, stream: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Nobody answers in time: the status says so, streamed or not."""
    reply = await gateway.post({**BODY, "stream": stream}, x_interlock_deadline="0.1")
    assert reply.status == 504
    assert reply.json["error"]["reason"] == "ERROR_REASON_DEADLINE_EXCEEDED"


async def test_a_full_queue_is_429_with_retry_after(gateway: GatewayWorld) -> None:
    """At the bound: whole seconds in the header, milliseconds in the body."""
    waiting = gateway.call()
    assert (await waiting.read()).HasField("queued")
    reply = await gateway.post(BODY)
    assert reply.status == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json["error"]["reason"] == "ERROR_REASON_QUEUE_FULL"
    assert reply.json["error"]["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        ("", 401, "TOKEN_MISSING"),
        ("nonsense", 401, "TOKEN_INVALID"),
        (make_token(ttl_s=-100), 401, "TOKEN_EXPIRED"),
        (make_token("alice", "models:read"), 403, "SCOPE_MISSING"),
    ],
    ids=["missing", "invalid", "expired", "scope"],
)
async def test_who_may_not_is_told_with_a_status(
    gateway: GatewayWorld, token: str, status: int, reason: str
) -> None:
    """401 or 403, with the reason and a request id."""
    reply = await gateway.post(BODY, token=token)
    assert (reply.status, reply.json["error"]["reason"]) == (status, f"ERROR_REASON_{reason}")
    assert reply.headers["x-request-id"]


async def test_an_api_key_header_is_a_token(gateway: GatewayWorld) -> None:
    """`x-api-key` stands in for `authorization`."""
    await gateway.add_worker("w1")
    assert (await gateway.post(BODY, token="", x_api_key=make_token())).status == 200


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b'{"text": "a", "text": "b"}', 400, "text"),
        (b'{"text": "a", "temperature": NaN}', 400, "NaN"),
        (b'{"text": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"text": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "JSON"),
        (b'{"text": "\\ud800"}', 400, "text"),
        (b'{"text":' + b"[" * 100_000, 400, "nested"),
        (b'{"text": "' + b"x" * (1 << 21) + b'"}', 413, "bytes"),
        ({"text": "hi", "colour": "red"}, 400, "colour"),
        ({"text": 7}, 400, "text"),
        ({"text": "hi", "messages": []}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"text": "hi", "max_tokens": 1.5}, 400, "max_tokens"),
        ({"text": "hi", "max_tokens": True}, 400, "max_tokens"),
        ({"text": "hi", "max_tokens": 0}, 400, "max_tokens"),
        ({"text": "hi", "max_tokens": 10**12}, 400, "max_tokens"),
        ({"text": "hi", "stream": "yes"}, 400, "stream"),
        ({"text": "hi", "seed": -1}, 400, "seed"),
        ({"text": "hi", "stop": ["a", 1]}, 400, "stop[1]"),
        ({"text": "hi", "priority": "urgent"}, 400, "priority"),
        ({"text": "hi", "request_id": "a/b"}, 400, "request_id"),
        ({"text": "hi", "model": "other"}, 404, "other"),
        ({"text": "hi", "n": 5}, 400, "n:"),
        ({"text": "hi", "logprobs": 21}, 400, "logprobs"),
        ({"text": "hi", "logprobs": 1.0}, 400, "logprobs"),
        ({"text": "hi", "repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"text": "hi", "logit_bias": [1]}, 400, "logit_bias"),
        ({"text": "hi", "logit_bias": {"a": 1}}, 400, "logit_bias.a"),
        ({"text": "hi", "logit_bias": {"01": 1}}, 400, "logit_bias.01"),
        ({"text": "hi", "logit_bias": {"²": 1}}, 400, "logit_bias"),
        ({"text": "hi", "logit_bias": {"4294967296": 1}}, 400, "logit_bias"),
        ({"text": "hi", "logit_bias": {"1": "x"}}, 400, "logit_bias.1"),
        ({"text": "hi", "logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"text": "hi", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"text": "hi", "format": "json"}, 400, "format"),
        ({"text": "hi", "format": {}}, 400, "format"),
        ({"text": "hi", "format": {"regex": "a", "choice": ["a"]}}, 400, "format"),
        ({"text": "hi", "format": {"xml": "a"}}, 400, "format"),
        ({"text": "hi", "format": {"regex": 7}}, 400, "format.regex"),
        ({"text": "hi", "format": {"choice": "a"}}, 400, "format.choice"),
        ({"text": "hi", "format": {"choice": ["a", 1]}}, 400, "format.choice[1]"),
        ({"text": "hi", "format": {"json_schema": 7}}, 400, "format.json_schema"),
        ({"text": "hi", "format": {"json_schema": "{"}}, 400, "format.json_schema"),
        ({"text": "hi", "format": {"json_schema": {"title": "x" * 70_000}}}, 400, "format.json_schema"),
        ({"text": "x" * 600}, 400, "context"),
        ({}, 400, "text"),
    ],
    ids=range(51),
)
async def test_a_bad_body_gets_a_typed_error_and_the_next_request_works(
    gateway: GatewayWorld, body: Any, status: int, named: str
) -> None:
    """The message names what is wrong."""
    await gateway.add_worker("w1", Script(answer="fine"))
    reply = await gateway.post(body)
    assert reply.status == status, reply.bodies
    assert named in reply.json["error"]["message"]
    assert (await gateway.post(BODY)).json["result"] == "fine"


@pytest.mark.parametrize("deadline", ["0", "-1", "nan", "inf", "soon", "3601", "1_0", "1e1"])
async def test_a_senseless_deadline_is_refused(gateway: GatewayWorld, deadline: str) -> None:
    """The header is named."""
    reply = await gateway.post(BODY, x_interlock_deadline=deadline)
    assert reply.status == 400
    assert "x-interlock-deadline" in reply.json["error"]["message"]


async def test_another_content_type_is_refused(gateway: GatewayWorld) -> None:
    """A form is not JSON."""
    body = HttpBody(content_type="text/plain", data=b'{"text": "hi"}')
    reply = await read_reply(gateway.http.Generate(body, metadata=bearer()))
    assert (reply.status, "content-type" in reply.json["error"]["message"]) == (400, True)


async def test_a_client_that_leaves_a_stream_frees_its_slot(gateway: GatewayWorld) -> None:
    """The call is cancelled mid-stream, as Envoy does it; the worker is told."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 100, interval_s=0.01), slots=1)
    body = HttpBody(data=b'{"text": "hi", "stream": true, "max_tokens": 100}')
    call = gateway.http.Generate(body, metadata=bearer())
    await call.read()
    call.cancel()
    await worker.wait_until(lambda: worker.cancelled)
    await gateway.wait_idle()


async def test_health_and_readiness_are_told_apart(gateway: GatewayWorld) -> None:
    """A draining gateway is alive and not ready, and says why; every answer has an id."""
    alive = await read_reply(gateway.http.Healthz(HttpBody()))
    await gateway.dispatcher.renew()
    ready = await read_reply(gateway.http.Readyz(HttpBody()))
    gateway.readiness.draining = True
    reply = await read_reply(gateway.http.Readyz(HttpBody()))
    assert (alive.status, ready.status, reply.status) == (200, 200, 503)
    assert all(one.headers["x-request-id"] for one in (alive, ready, reply))
    assert "shutting down" in reply.json["error"]["message"]
    assert (await read_reply(gateway.http.Healthz(HttpBody()))).status == 200
