"""Tools in the Responses API: the vendor's own client through a real Envoy, and its published schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL
from tests.fixtures.openai_world import CALL, World, check, openai_world

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
ASKED: dict[str, Any] = {"model": MODEL, "input": "hi", "tools": [WEATHER]}


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


async def events_of(world: World, **fields: Any) -> list[Any]:
    """The events of a streamed response, each checked, numbered without a gap."""
    stream = await world.client.responses.create(**{**ASKED, **fields}, stream=True)
    events = [event async for event in stream]
    for event in events:
        check("ResponseStreamEvent", event.model_dump(exclude_unset=True, by_alias=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[Any]) -> list[str]:
    """What the events are, each run of deltas as one."""
    kinds = [event.type.removeprefix("response.") for event in events]
    return [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]]


async def test_a_call_is_an_item_of_its_own(world: World) -> None:
    """Behind the message that was said with it; the response repeats what it was asked with."""
    worker = await world.gateway.add_worker("w1", Script(answer=f"Let me see. {CALL}"))
    response = await world.client.responses.with_raw_response.create(**ASKED)
    body = response.http_response.json()
    check("Response", body)
    made = response.parse()
    message, call = made.output
    assert (made.status, made.output_text, message.status) == ("completed", "Let me see.", "completed")
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert len({message.id, call.id, call.call_id}) == 3
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == ([WEATHER], "auto", True)
    assert '"weather"' in "".join(map(chr, worker.starts[0].prompt_ids))


async def test_a_conversation_goes_on_with_what_a_call_came_to(world: World) -> None:
    """The output of a response is input as it is, results behind it; a call is one turn with its text."""
    worker = await world.gateway.add_worker("w1", Script(answer=f"Let me see. {CALL}"))
    made = await world.client.responses.create(**ASKED)
    result = {"type": "function_call_output", "call_id": made.output[1].call_id}
    for output in ("rain", [{"type": "input_text", "text": "rain"}]):
        turns = [{"role": "user", "content": "hi"}, *made.output, {**result, "output": output}]
        await world.client.responses.create(**{**ASKED, "input": turns}, tool_choice="none")
        prompt = "".join(map(chr, worker.starts[-1].prompt_ids))
        assert f"user:hi\nassistant:Let me see.\n{CALL}\nuser:<tool_response>rain</tool_response>\n" in prompt
        assert "You can call" not in prompt
    # As the client itself writes down what it read, and with what it knows of results and tools.
    made_again = [item.model_dump(by_alias=True) for item in made.output]
    told = {**result, "output": "rain", "caller": {"type": "direct"}, "name": "weather", "namespace": None}
    tool = {**WEATHER, "allowed_callers": ["direct"], "output_schema": None, "async": False}
    turns = [{"role": "user", "content": "hi"}, *made_again, told]
    await world.client.responses.create(model=MODEL, input=turns, tools=[tool], tool_choice="none")
    assert worker.starts[-1].prompt_ids == worker.starts[-2].prompt_ids


async def test_calls_and_results_beside_one_another_are_one_turn_each(world: World) -> None:
    """Two calls of one response, and what came of which; a question behind them stays a turn."""
    worker = await world.gateway.add_worker("w1", Script(answer="fine"))
    call = {"type": "function_call", "name": "weather", "arguments": '{"city": "Paris"}'}
    result = {"type": "function_call_output", "output": "rain"}
    turns = [
        {"role": "user", "content": "hi"},
        {**call, "call_id": "a"},
        {**call, "call_id": "b"},
        {**result, "call_id": "b"},
        {**result, "call_id": "a"},
        {"role": "user", "content": "so?"},
    ]
    await world.client.responses.create(model=MODEL, input=turns)
    made = [CALL.replace("}}", f'}}, "id": "{name}"}}') for name in "ab"]
    told = [
        f'<tool_response>{{"id": "{name}", "name": "weather", "content": "rain"}}</tool_response>'
        for name in "ba"
    ]
    expected = f"user:hi\nassistant:{made[0]}\n{made[1]}\nuser:{told[0]}\n{told[1]}\nuser:so?\n"
    assert "".join(map(chr, worker.starts[0].prompt_ids)) == expected


async def test_a_streamed_call(world: World) -> None:
    """Text as it comes, then the call as an item: added, its arguments, done; the end has all of it."""
    await world.gateway.add_worker("w1", Script(answer=f"Let me see. {CALL}", interval_s=0.001))
    events = await events_of(world)
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, delta, done, item = events[-5:-1]
    assert (added.item.arguments, added.item.status, item.item.status) == ("", "in_progress", "completed")
    assert json.loads(delta.delta) == json.loads(done.arguments) == {"city": "Paris"}
    assert {one.output_index for one in (added, delta, done, item)} == {1}
    assert {added.item.id, delta.item_id, done.item_id, item.item.id} == {item.item.id}
    message, call = events[-1].response.output
    assert message.content[0].text.strip() == "Let me see."
    assert call == item.item


async def test_a_call_without_words_has_no_message(world: World) -> None:
    """Whole and streamed: the call is the only item, and the first."""
    await world.gateway.add_worker("w1", Script(answer=CALL, interval_s=0.001))
    assert [item.type for item in (await world.client.responses.create(**ASKED)).output] == ["function_call"]
    events = await events_of(world)
    assert kinds_of(events)[2:4] == ["output_item.added", "function_call_arguments.delta"]
    assert {event.output_index for event in events[2:-1]} == {0}
    assert [item.type for item in events[-1].response.output] == ["function_call"]


async def test_a_tool_that_must_be_called(world: World) -> None:
    """The output is held to the call's schema, and is the call; whole and streamed."""
    worker = await world.gateway.add_worker("w1", Script(answer=ROME))
    for choice in ("required", {"type": "function", "name": "weather"}):
        response = await world.client.responses.with_raw_response.create(**ASKED, tool_choice=choice)
        body = response.http_response.json()
        check("Response", body)
        assert body["tool_choice"] == choice
        (call,) = response.parse().output
        assert json.loads(call.arguments) == {"city": "Rome"}
        assert '"weather"' in worker.starts[-1].format.json_schema
        # What a function is for the model has to know in any case.
        assert "Tells the weather." in "".join(map(chr, worker.starts[-1].prompt_ids))
    events = await events_of(world, tool_choice="required")
    assert "output_text.delta" not in kinds_of(events)
    assert json.loads(events[-1].response.output[0].arguments) == {"city": "Rome"}


async def test_an_answer_to_a_schema_may_be_a_call(world: World) -> None:
    """Tools are not forgotten where the answer is held to a format; what is no call comes as it is made."""
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object", "required": ["x"]}}}
    worker = await world.gateway.add_worker("w1", Script(answer=ROME))
    made = await world.client.responses.create(**ASKED, text=form)
    assert [item.type for item in made.output] == ["function_call"]
    schema = worker.starts[0].format.json_schema
    assert '"weather"' in schema
    assert '"required": ["x"]' in schema
    prompt = "".join(map(chr, worker.starts[0].prompt_ids))
    assert "Tells the weather." in prompt
    assert "<tool_call>" not in prompt
    worker.script = Script(answer='{"x": "and so on"}', interval_s=0.001)
    events = await events_of(world, text=form)
    assert events[-1].response.output_text == '{"x": "and so on"}'
    assert sum(event.type == "response.output_text.delta" for event in events) > 1


async def test_one_call_at_a_time_where_no_more_are_wanted(world: World) -> None:
    """`parallel_tool_calls` false keeps the first, in both of the vendor's APIs, whole and streamed."""
    await world.gateway.add_worker("w1", Script(answer=f"{CALL}{CALL}"))
    assert len((await world.client.responses.create(**ASKED)).output) == 2
    made = await world.client.responses.create(**ASKED, parallel_tool_calls=False)
    assert (len(made.output), made.parallel_tool_calls) == (1, False)
    events = await events_of(world, parallel_tool_calls=False)
    assert len(events[-1].response.output) == 1
    named = {name: value for name, value in WEATHER.items() if name != "type"}
    tools = [{"type": "function", "function": named}]
    for single, count in ((True, 2), (False, 1)):
        chat = await world.create(tools=tools, parallel_tool_calls=single)
        assert len(chat.choices[0].message.tool_calls) == count
        chunks = [c async for c in await world.create(tools=tools, parallel_tool_calls=single, stream=True)]
        assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == count


async def test_what_only_looks_like_a_call_stays_text(world: World) -> None:
    """One of an unknown function, and one that the limit cut; the client sees what the model said."""
    answer = '<tool_call>{"name": "bomb", "arguments": {}}</tool_call>'
    await world.gateway.add_worker("w1", Script(answer=answer, interval_s=0.001))
    made = await world.client.responses.create(**ASKED)
    assert [(item.type, made.output_text) for item in made.output] == [("message", answer)]
    events = await events_of(world)
    assert events[-1].response.output_text == answer
    cut = await world.client.responses.create(**ASKED, max_output_tokens=20)
    assert (cut.status, cut.output[0].status, cut.output_text) == ("incomplete", "incomplete", answer[:20])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "function": {}}]}, "tools[0].function"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{**WEATHER, "strict": "no"}]}, "tools[0].strict"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**WEATHER, "async": True}]}, "tools[0].async"),
        ({"tools": [{**WEATHER, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "bomb"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0].call_id"),
        (
            {
                "input": [
                    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}
                ]
            },
            "input[0].output[0].type",
        ),
    ],
    ids=str,
)
async def test_what_tools_cannot_be_is_named(refusing: World, fields: dict[str, Any], named: str) -> None:
    """A 400 in the vendor's shape, with the field in message and `param`."""
    status, _, body = await refusing.raw("/v1/responses", {**ASKED, **fields})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error"), body
    assert body["error"]["message"].startswith(f"{named}: ")
    assert body["error"]["param"] == named
