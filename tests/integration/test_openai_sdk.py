"""The vendor's own Python client against the OpenAI paths, through a real Envoy."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import worker_service_pb2

from services.gateway.http import openai_calls, reply
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, bearer, make_token
from tests.fixtures.openai_world import ASKED, CALL, WEATHER, World, check, drained, openai_world


class Answer(pydantic.BaseModel):
    """A format as programs of the vendor's client write one."""

    a: int


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """The client before a gateway without a worker."""
    async with openai_world(tmp_path) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One for all bodies that are refused before anybody is asked."""
    async with openai_world(tmp_path_factory.mktemp("refusing")) as made:
        yield made


async def test_a_completion_of_a_conversation(world: World) -> None:
    """Text, usage, the end and the ids; roles and parts reach the prompt, sampling the worker."""
    worker = await world.gateway.add_worker("w1", Script(answer="Bonjour", cached_prompt_tokens=3))
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    response = await world.client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        top_p=0.5,
        seed=-1,
        user="u",
        metadata={"a": "b"},
        store=True,
    )
    completion = response.parse()
    (choice,) = completion.choices
    assert (choice.message.content, choice.finish_reason, completion.model) == ("Bonjour", "stop", MODEL)
    (order,) = worker.starts
    assert "".join(map(chr, order.prompt_ids)) == "system:Be brief.\nuser:one two\n"
    assert (order.sampling.top_p, order.sampling.temperature, order.sampling.seed) == (0.5, 1.0, 2**64 - 1)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(order.prompt_ids), 7)
    assert usage.total_tokens == usage.prompt_tokens + 7
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert response.headers["x-request-id"] == completion.id.removeprefix("chatcmpl-")
    assert response.headers["x-interlock-worker"] == "w1"
    check("CreateChatCompletionResponse", response.http_response.json())


async def test_the_ways_to_end(world: World) -> None:
    """At a stop string, at the limit, and at what the API generates where nothing is said."""
    await world.gateway.add_worker("w1", Script(answer="one two three"))
    stopped = (await world.create(stop=["two", "x"])).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", "one ")
    cut = (await world.create(max_completion_tokens=3)).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("length", "one")
    whole = (await world.create()).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("stop", "one two three")


async def test_a_stream(world: World) -> None:
    """The role first, then text, the finish, and the usage where it was asked for; each as published."""
    await world.gateway.add_worker("w1", Script(answer="one two three", interval_s=0.001))
    chunks = [
        chunk async for chunk in await world.create(stream=True, stream_options={"include_usage": True})
    ]
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "one two three"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 13)
    assert len({chunk.id for chunk in chunks}) == 1
    plain = [chunk async for chunk in await world.create(stream=True)]
    assert all(chunk.usage is None for chunk in plain)
    assert plain[-1].choices[0].finish_reason == "stop"


async def test_a_stream_that_waits_begins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Envoy passes its headers on while another request has the only slot, and it goes on to its end."""
    monkeypatch.setattr(reply, "BEGIN_WAIT_S", 0.05)
    worker = await world.gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.05), slots=1)
    other = await world.create(stream=True, max_tokens=400)
    await anext(aiter(other))
    waiting = await asyncio.wait_for(world.create(stream=True), 5)
    assert "x-interlock-worker" not in waiting.response.headers
    assert worker.running
    worker.script = Script(answer="one")
    await other.close()
    chunks = [chunk async for chunk in waiting]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one"


async def test_log_probabilities(world: World) -> None:
    """One entry a token, with as many alternatives as were asked for, whole and streamed."""
    worker = await world.gateway.add_worker("w1", Script(answer="ab"))
    completion = await world.create(logprobs=True, top_logprobs=2)
    check("CreateChatCompletionResponse", completion.model_dump(exclude_unset=True))
    content = completion.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["a", "b"]
    assert all(len(entry.top_logprobs) <= 2 and entry.logprob <= 0 for entry in content)
    chunks = [chunk async for chunk in await world.create(stream=True, logprobs=True)]
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))
    streamed = [e.token for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == ["a", "b"]
    text = await world.client.completions.create(model=MODEL, prompt="x", logprobs=1)
    check("CreateCompletionResponse", text.model_dump(exclude_unset=True))
    assert text.choices[0].logprobs.tokens == ["a", "b"]
    assert text.choices[0].logprobs.text_offset == [0, 1]
    # What is held back for a stop string moves no token.
    worker.script = Script(answer="abcd")
    asked = {"model": MODEL, "prompt": "x", "logprobs": 0, "stop": ["bx"]}
    (whole,) = (await world.client.completions.create(**asked)).choices
    stream = await world.client.completions.create(**asked, stream=True)
    parts = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(one.text for one in parts) == whole.text == "abcd"
    streamed = [at for one in parts if one.logprobs for at in one.logprobs.text_offset]
    assert streamed == whole.logprobs.text_offset == [0, 1, 2, 3]


@pytest.mark.parametrize("answer", ["a < b <t", "<", f"So: {CALL}", CALL, "", "a"])
async def test_scores_of_what_may_be_a_call(world: World, answer: str) -> None:
    """A text that is held back loses none: streamed there are as many, in the same order, as whole."""
    await world.gateway.add_worker("w1", Script(answer=answer, interval_s=0.001))
    asked = {"tools": [WEATHER], "logprobs": True, "top_logprobs": 1}
    (whole,) = (await world.create(**asked)).choices
    assert [entry.token for entry in whole.logprobs.content] == list(answer)
    choices = [chunk.choices[0] async for chunk in await world.create(**asked, stream=True)]
    scored = [entry for one in choices if one.logprobs for entry in one.logprobs.content]
    assert scored == whole.logprobs.content
    assert "".join(one.delta.content or "" for one in choices) == (whole.message.content or "")
    assert sum(len(one.delta.tool_calls or ()) for one in choices) == len(whole.message.tool_calls or ())


async def test_a_reply_of_megabytes_is_one_body(world: World) -> None:
    """More than Envoy or gRPC takes in one message arrives whole, in each API that tells scores."""
    await world.gateway.add_worker("w1", Script(answer="😀" * 480, batch=60))
    response = await world.client.chat.completions.with_raw_response.create(
        **ASKED, n=4, logprobs=True, top_logprobs=20
    )
    assert int(response.http_response.num_bytes_downloaded) > 2 << 20
    assert response.headers["content-type"] == "application/json"
    choices = response.parse().choices
    assert [len(choice.logprobs.content) for choice in choices] == [480] * 4
    status, headers, native = await world.raw(
        "/v1/generate", {"text": "hi", "max_tokens": 480, "n": 4, "logprobs": 20}
    )
    assert (status, headers["content-type"]) == (200, "application/json")
    assert [len(one["logprobs"]) for one in native["sequences"]] == [480] * 4


async def test_a_completion_of_a_text(world: World) -> None:
    """The prompt is not wrapped into a conversation; token ids are taken as they are."""
    worker = await world.gateway.add_worker("w1", Script(answer="one two"))
    response = await world.client.completions.with_raw_response.create(model=MODEL, prompt="Once", echo=True)
    completion = response.parse()
    assert completion.choices[0].text == "Onceone two"
    assert "".join(map(chr, worker.starts[0].prompt_ids)) == "Once"
    check("CreateCompletionResponse", response.http_response.json())
    await world.client.completions.create(model=MODEL, prompt=[65, 66], max_tokens=2)
    assert list(worker.starts[1].prompt_ids) == [65, 66]
    stream = await world.client.completions.create(
        model=MODEL, prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        told = chunk.model_dump(exclude_unset=True)
        # The vendor has null here before the end; its one schema for whole and streamed answers has not.
        told["usage"] = told["usage"] or {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        for choice in told["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check("CreateCompletionResponse", told)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "one two"
    assert chunks[-1].usage.completion_tokens == 7


async def test_tools(world: World) -> None:
    """A call is read out of the text, whole and streamed; results go back into the conversation."""
    worker = await world.gateway.add_worker("w1", Script(answer=f"Let me see. {CALL}", interval_s=0.001))
    response = await world.client.chat.completions.with_raw_response.create(**ASKED, tools=[WEATHER])
    (choice,) = response.parse().choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    check("CreateChatCompletionResponse", response.http_response.json())
    assert "weather" in "".join(map(chr, worker.starts[0].prompt_ids))
    chunks = [chunk async for chunk in await world.create(stream=True, tools=[WEATHER])]
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))
    calls = [called for chunk in chunks for called in chunk.choices[0].delta.tool_calls or ()]
    assert [called.function.name for called in calls] == ["weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said.strip() == "Let me see."
    turns = [
        {"role": "user", "content": "hi"},
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    await world.create(messages=turns, tools=[WEATHER], tool_choice="none")
    prompt = "".join(map(chr, worker.starts[-1].prompt_ids))
    assert CALL in prompt
    assert "<tool_response>rain</tool_response>" in prompt
    assert "You can call" not in prompt


async def test_results_of_several_calls(world: World) -> None:
    """One turn of them, each with the id that its call has too; a name that no call has is refused."""
    worker = await world.gateway.add_worker("w1")
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": name, "type": "function", "function": function} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "ba"]
    turns = [*ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    await world.create(messages=[*turns, {"role": "user", "content": "so?"}])
    made = [
        f'<tool_call>{{"name": "weather", "arguments": {{}}, "id": "{name}"}}</tool_call>' for name in "ab"
    ]
    told = [
        f'<tool_response>{{"id": "{name}", "name": "weather", "content": "of {name}"}}</tool_response>'
        for name in "ba"
    ]
    expected = f"user:hi\nassistant:{made[0]}\n{made[1]}\nuser:{told[0]}\n{told[1]}\nuser:so?\n"
    assert "".join(map(chr, worker.starts[0].prompt_ids)) == expected
    with pytest.raises(openai.BadRequestError) as unknown:
        await world.create(messages=[*turns, {**results[0], "tool_call_id": "c"}])
    assert unknown.value.param == "messages[4].tool_call_id"


# The client's own, of a model whose field may be anything.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("fine", {}),
        ('{"a": 1}', {"response_format": Answer}),
        (CALL, {"tools": [WEATHER | {"function": WEATHER["function"] | {"strict": True}}]}),
    ],
    ids=["text", "format", "tools"],
)
async def test_a_turn_that_the_client_parsed_is_taken_back(
    world: World, answer: str, fields: dict[str, Any]
) -> None:
    """The client puts what it made of an answer beside it, null or not; the model hears the answer alone."""
    worker = await world.gateway.add_worker("w1", Script(answer=answer))
    turns = [*ASKED["messages"]]
    (choice,) = (await world.client.chat.completions.parse(**ASKED, **fields)).choices
    turns.append(choice.message)
    turns += [
        {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        for call in choice.message.tool_calls or ()
    ]
    # The next turn has little room left.
    worker.script = Script(answer="ok")
    await world.create(messages=turns)
    assert f"assistant:{answer}\n" in "".join(map(chr, worker.starts[-1].prompt_ids))


async def test_a_field_that_is_null_is_none(world: World) -> None:
    """A client that writes all it knows of a message says nothing by a null; a value is refused by name."""
    await world.gateway.add_worker("w1", Script(answer="fine"))
    turn = {"role": "assistant", "content": "x", "reasoning": None, "audio": None}
    assert (await world.create(messages=[turn, *ASKED["messages"]])).choices[0].message.content == "fine"
    for messages in (
        [{**turn, "reasoning": "y"}, *ASKED["messages"]],
        [{"role": "user", "content": "x", "parsed": {}}],
    ):
        with pytest.raises(openai.BadRequestError, match="is not a field of a message"):
            await world.create(messages=messages)


async def test_what_ordinary_programs_send_is_taken(world: World) -> None:
    """Hints and habits of frameworks, none of which a text model minds; sampling of other servers works."""
    worker = await world.gateway.add_worker("w1", Script(answer="fine"))
    for fields in (
        {"verbosity": "low", "reasoning_effort": "low", "modalities": ["text"], "service_tier": "auto"},
        {"prediction": {"type": "content", "content": "fine"}, "prompt_cache_options": {"mode": "implicit"}},
        {"messages": [{"role": "assistant", "refusal": "No.", "content": None}, *ASKED["messages"]]},
        {"extra_body": {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5}},
    ):
        assert (await world.create(**fields)).choices[0].message.content == "fine"
    sampling = worker.starts[-1].sampling
    assert (await world.create(top_p=0, extra_body={"top_k": -1})).choices[0].message.content == "fine"
    assert 0 < worker.starts.pop().sampling.top_p < 1e-37
    assert (sampling.top_k, round(sampling.min_p, 3), sampling.repetition_penalty) == (7, 0.1, 1.5)
    assert "assistant:No.\n" in "".join(map(chr, worker.starts[-2].prompt_ids))
    made = await world.client.responses.create(
        model=MODEL,
        input="hi",
        include=["reasoning.encrypted_content"],
        max_tool_calls=3,
        top_logprobs=0,
        reasoning={"effort": "low", "summary": "auto"},
        truncation="disabled",
    )
    assert made.output_text == "fine"


async def test_an_answer_to_a_schema_may_be_a_call(world: World) -> None:
    """Tools are not forgotten where the answer is held to a format; without a call it is that format."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    worker = await world.gateway.add_worker("w1", Script(answer='{"name": "weather", "arguments": {}}'))
    for stream in (False, True):
        made = await world.create(tools=[WEATHER], response_format=form, stream=stream)
        choices = [c.choices[0] async for c in made] if stream else made.choices
        calls = [call for one in choices for call in (one.delta if stream else one.message).tool_calls or ()]
        assert [call.function.name for call in calls] == ["weather"]
        assert choices[-1].finish_reason == "tool_calls"
    assert "Tells the weather." in "".join(map(chr, worker.starts[0].prompt_ids))
    worker.script = Script(answer='{"rain": true}')
    (choice,) = (await world.create(tools=[WEATHER], response_format=form)).choices
    assert (choice.message.content, choice.finish_reason) == ('{"rain": true}', "stop")
    named = await world.raw(
        "/v1/chat/completions",
        {
            **ASKED,
            "tools": [WEATHER],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"title": "x" * 70_000}},
            },
        },
    )
    assert named[2]["error"]["message"].startswith("tools or response_format.json_schema.schema: ")


async def test_a_tool_that_must_be_called(world: World) -> None:
    """The output is held to the call's schema, and is the call."""
    answer = '{"name": "weather", "arguments": {"city": "Rome"}}'
    worker = await world.gateway.add_worker("w1", Script(answer=answer))
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        completion = await world.create(tools=[WEATHER], tool_choice=choice)
        (call,) = completion.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        assert '"weather"' in worker.starts[-1].format.json_schema
    chunks = [
        chunk async for chunk in await world.create(stream=True, tools=[WEATHER], tool_choice="required")
    ]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_a_format(world: World) -> None:
    """A schema and an object reach the worker."""
    worker = await world.gateway.add_worker("w1", Script(answer="{}"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    await world.create(response_format=form)
    assert json.loads(worker.starts[-1].format.json_schema) == schema
    await world.create(response_format={"type": "json_object"})
    assert json.loads(worker.starts[-1].format.json_schema) == {"type": "object"}
    await world.create(response_format={"type": "text"})
    assert not worker.starts[-1].HasField("format")
    refusals = [worker_service_pb2.REFUSAL_REASON_INVALID] * 2
    worker.script = Script(refusals=refusals, message="format.json_schema: has no end")
    with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema\.schema: has no end"):
        await world.create(response_format=form, stream=True)
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema: has no end"):
        await world.client.responses.create(model=MODEL, input="hi", text=text, stream=True)


async def test_a_response(world: World) -> None:
    """Text in and out, with instructions, usage and the vendor's own shape."""
    worker = await world.gateway.add_worker("w1", Script(answer="Bonjour", cached_prompt_tokens=3))
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    response = await world.client.responses.with_raw_response.create(
        model=MODEL, input=turns, instructions="Be brief.", metadata={"a": "b"}, store=False
    )
    made = response.parse()
    assert (made.output_text, made.status, made.metadata) == ("Bonjour", "completed", {"a": "b"})
    assert "".join(map(chr, worker.starts[0].prompt_ids)) == "system:Be brief.\nuser:hi\n"
    assert (made.usage.output_tokens, made.usage.input_tokens_details.cached_tokens) == (7, 3)
    check("Response", response.http_response.json())
    cut = await world.client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    # Nothing is kept, though the vendor would.
    assert cut.store is False
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    await world.client.responses.create(model=MODEL, input="hi", text=form)
    assert json.loads(worker.starts[-1].format.json_schema) == {"type": "object"}


async def test_a_response_in_events(world: World) -> None:
    """In the vendor's order, each as published, numbered without a gap."""
    await world.gateway.add_worker("w1", Script(answer="one two", interval_s=0.001))
    stream = await world.client.responses.create(model=MODEL, input="hi", stream=True)
    events = [event async for event in stream]
    for event in events:
        check("ResponseStreamEvent", event.model_dump(exclude_unset=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "one two"
    assert "".join(event.delta for event in events[4:-4]) == "one two"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": []}, "input"),
        ({"colour": "red"}, "colour"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ],
    ids=str,
)
async def test_what_a_response_cannot_be_is_named(
    refusing: World, fields: dict[str, Any], named: str
) -> None:
    """A 400 in the vendor's shape."""
    status, _, body = await refusing.raw("/v1/responses", {"model": MODEL, "input": "hi", **fields})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert body["error"]["message"].startswith(named)


async def test_a_response_whose_worker_is_lost_raises(world: World) -> None:
    """The client raises; it never takes a broken stream for a short answer."""
    worker = await world.gateway.add_worker("w1", Script(answer="x" * 50, die_at=10))
    reading = asyncio.create_task(
        drained(await world.client.responses.create(model=MODEL, input="hi", stream=True))
    )
    await worker.wait_until(lambda: worker.starts)
    world.gateway.queue.remove_worker(MODEL, "w1")
    with pytest.raises(openai.APIError):
        await reading


async def test_models(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, and one by one, at each call the same; an unknown one is the client's own exception."""
    later = itertools.count(int(time.time()) + 60, 60)
    monkeypatch.setattr(openai_calls, "_now_s", lambda: next(later))
    response = await world.client.models.with_raw_response.list()
    listed = response.parse().data
    assert [model.id for model in listed] == [MODEL]
    check("ListModelsResponse", response.http_response.json())
    one = await world.client.models.retrieve(MODEL)
    assert (one.id, one.created) == (MODEL, listed[0].created)
    assert one.created <= time.time()
    check("Model", one.model_dump(exclude_unset=True))
    with pytest.raises(openai.NotFoundError) as caught:
        await world.client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


async def test_each_error_is_the_clients_own_exception(world: World) -> None:
    """By status, with type and code, and nothing internal."""
    for token in ("nonsense", make_token("bob", "models:read")):
        stranger: Any = world.connect(token)
        wanted = openai.AuthenticationError if token == "nonsense" else openai.PermissionDeniedError
        with pytest.raises(wanted):
            await stranger.chat.completions.create(**ASKED)
        await stranger.close()
    with pytest.raises(openai.NotFoundError) as unknown:
        await world.create(model="nope")
    assert (unknown.value.type, unknown.value.code) == ("invalid_request_error", "model_not_found")
    with pytest.raises(openai.BadRequestError) as hot:
        await world.create(temperature=3)
    assert (hot.value.param, hot.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        await world.create(max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    check("ErrorResponse", {"error": long.value.body})
    with pytest.raises(openai.APIStatusError) as large:
        await world.create(messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert (large.value.status_code, large.value.type) == (413, "invalid_request_error")
    with pytest.raises(openai.InternalServerError) as late:
        await world.create(extra_headers={"x-interlock-deadline": "0.05"})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    world.gateway.reception.drain()
    with pytest.raises(openai.InternalServerError) as gone:
        await world.create()
    assert (gone.value.status_code, gone.value.type) == (503, "server_error")


async def test_what_cannot_be_mended_is_asked_once(world: World) -> None:
    """The client, as it comes, sends again what may go better next time, and nothing else."""
    arrived: list[str] = []

    async def note(request: Any) -> None:
        arrived.append(request.url.path)

    patient: Any = world.client.with_options(max_retries=2)
    patient._client.event_hooks["request"].append(note)
    with pytest.raises(openai.InternalServerError) as late:
        await patient.chat.completions.create(**ASKED, extra_headers={"x-interlock-deadline": "0.05"})
    assert (late.value.status_code, late.value.response.headers["x-should-retry"]) == (504, "false")
    assert len(arrived) == 1
    world.gateway.reception.drain()
    with pytest.raises(openai.InternalServerError) as gone:
        await patient.chat.completions.create(**ASKED)
    assert (gone.value.status_code, len(arrived)) == (503, 4)
    assert "x-should-retry" not in gone.value.response.headers


async def test_a_full_queue(world: World) -> None:
    """429 with a delay, and a code that says why."""
    waiting = world.gateway.call(pb.GenerateRequest(text="x"), metadata=bearer(subject="bob"))
    assert (await waiting.read()).HasField("queued")
    with pytest.raises(openai.RateLimitError) as full:
        await world.create()
    assert (full.value.code, full.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(full.value.response.headers["retry-after"]) >= 1
    waiting.cancel()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 5}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 0}, "n"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"colour": "red"}, "colour"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0]",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"stream_options": {"x": 1}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
async def test_what_is_not_served_is_named(refusing: World, fields: dict[str, Any], named: str) -> None:
    """A 400 in the vendor's shape, with the field in message and `param`."""
    status, _, body = await refusing.raw("/v1/chat/completions", {**ASKED, **fields})
    error = body["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(named)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'{"model": "a", "model": "b"}', b"[" * 100_000, b"\xff"])
async def test_bodies_that_are_no_request(refusing: World, body: bytes) -> None:
    """A 400 in the vendor's shape."""
    status, headers, told = await refusing.raw("/v1/chat/completions", body)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert headers["x-request-id"]


async def test_a_worker_lost_in_the_middle_raises(world: World) -> None:
    """The client raises; it never takes a broken stream for a short answer."""
    worker = await world.gateway.add_worker("w1", Script(answer="x" * 50, die_at=10))
    reading = asyncio.create_task(drained(await world.create(stream=True)))
    await worker.wait_until(lambda: worker.starts)
    world.gateway.queue.remove_worker(MODEL, "w1")
    with pytest.raises(openai.APIError) as caught:
        await reading
    check("Error", caught.value.body)
    assert caught.value.type == "server_error"


async def test_the_native_api_agrees(world: World) -> None:
    """The same worker, the same text by gRPC."""
    await world.gateway.add_worker("w1", Script(answer="same"))
    events = [e async for e in world.gateway.stub.Generate(pb.GenerateRequest(text="hi"), metadata=bearer())]
    native = "".join(event.chunk.text for event in events if event.HasField("chunk"))
    assert (await world.create()).choices[0].message.content == native
