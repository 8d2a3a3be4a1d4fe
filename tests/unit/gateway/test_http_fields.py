"""Bodies of every API, broken in each place: a reader says what is wrong, and never breaks itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from interlock.v1 import generation_pb2

from services.common.errors import ArgumentInvalid, FeatureUnsupported, InterlockError
from services.gateway.core.params import SamplingParams
from services.gateway.core.validation import check_sampling
from services.gateway.http import anthropic_fields, native, openai_fields, openapi, responses_fields

JSON = "application/json"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORM = {"type": "json_schema", "name": "n", "schema": SCHEMA}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}

NATIVE = {
    "messages": [{"role": "user", "content": "hi"}],
    "stop": ["a"],
    "format": {"choice": ["a"]},
    "logit_bias": {"1": 1},
    "max_tokens": 1,
    "priority": "batch",
}
CHAT = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "t"}]},
        {"role": "user", "name": "bob", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "b"}]},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sun"}]},
        {"role": "assistant", "content": None, "refusal": "no"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
    },
    "stream_options": {"include_usage": True},
    "logit_bias": {"1": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "modalities": ["text"],
    "stop": "a",
}
TEXT = {"model": "m", "prompt": ["a"], "echo": True, "best_of": 1, "stop": ["a"]}
RESPONSES = {
    "model": "m",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": "rain"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "sun"}]},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "weather"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "top_logprobs": 0,
    "background": False,
}
FORMED = {
    "model": "m",
    "input": "hi",
    "text": {"format": FORM, "verbosity": "low"},
    "tools": RESPONSES["tools"],
}
MESSAGES = {
    "model": "m",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "t"},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {}},
                {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "a", "content": "sun", "is_error": True},
            ],
        },
        {"role": "system", "content": "Be brief."},
    ],
    "tools": [{"type": "custom", "name": "weather", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "thinking": {"type": "adaptive"},
    "stop_sequences": ["a"],
}
COUNTED = {name: value for name, value in MESSAGES.items() if name in anthropic_fields.COUNTED}

READERS: dict[str, tuple[Callable[[bytes, str], Any], dict[str, Any]]] = {
    "native": (native.read_request, NATIVE),
    "chat": (openai_fields.read_chat, CHAT),
    "completions": (openai_fields.read_completion, TEXT),
    "completions with scores": (openai_fields.read_completion, {**TEXT, "echo": False, "logprobs": 1}),
    "responses": (responses_fields.read_responses, RESPONSES),
    "responses with a format": (responses_fields.read_responses, FORMED),
    "messages": (anthropic_fields.read_messages, MESSAGES),
    "count_tokens": (anthropic_fields.read_counted, COUNTED),
}
STRANGE: tuple[Any, ...] = (
    {},
    [],
    [{}],
    [[]],
    {"type": {}},
    {"type": []},
    1,
    -1,
    2**70,
    1.5,
    "",
    "x",
    True,
    None,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*at, key)
        yield from places(inner, (*at, key))


def broken(body: dict[str, Any], place: tuple[Any, ...], strange: Any) -> bytes:
    """The body with something else at a place."""
    made: Any = copy.deepcopy(body)
    parent = made
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = strange
    return json.dumps(made).encode()


@pytest.mark.parametrize("name", READERS)
def test_a_body_that_is_broken_in_one_place(name: str) -> None:
    """It is read, or refused; the body itself is read."""
    read, body = READERS[name]
    read(json.dumps(body).encode(), JSON)
    refused = 0
    for place in places(body):
        for strange in STRANGE:
            try:
                read(broken(body, place, strange), JSON)
            except InterlockError:
                refused += 1
    assert refused > len(body)


@pytest.mark.parametrize("logprobs", [0, 1])
def test_a_prompt_has_no_scores(logprobs: int) -> None:
    """Who asks to have it said again with them is told, and does not sum the scores of an empty list."""
    asked = {**TEXT, "logprobs": logprobs}
    with pytest.raises(FeatureUnsupported, match=r"^echo: .*logprobs"):
        openai_fields.read_completion(json.dumps(asked).encode(), JSON)
    for left in ({"echo": False}, {"logprobs": None}):
        openai_fields.read_completion(json.dumps({**asked, **left}).encode(), JSON)


@pytest.mark.parametrize("place", range(3))
def test_null_in_a_block_says_nothing(place: int) -> None:
    """The vendor's client writes down every field that it knows, most of them null; a value is refused."""

    def read(**more: Any) -> None:
        blocks: list[dict[str, Any]] = [
            {"type": "text", "text": "t", "citations": None},
            {
                "type": "tool_use",
                "id": "a",
                "name": "weather",
                "input": {},
                "caller": {"type": "direct"},
                "toolset_name": None,
            },
            {"type": "tool_result", "tool_use_id": "a", "content": "rain", "toolset_name": None},
        ]
        blocks[place].update(more)
        turns = [{"role": "assistant", "content": blocks[:2]}, {"role": "user", "content": blocks[2:]}]
        asked = {"model": "m", "max_tokens": 9, "messages": turns}
        anthropic_fields.read_messages(json.dumps(asked).encode(), JSON)

    read()
    read(of_tomorrow=None)
    if place:
        read(toolset_name="memory")
    with pytest.raises(ArgumentInvalid, match=r"of_tomorrow: is not a field"):
        read(of_tomorrow=1)


def read_items(call: dict[str, Any], result: dict[str, Any], tool: dict[str, Any]) -> None:
    """Reads a response's input with these fields more in a call, in what it came to, and in the tool."""
    body: Any = copy.deepcopy(RESPONSES)
    body["input"][1].update(call)
    body["input"][4].update(result)
    body["tools"][0].update(tool)
    responses_fields.read_responses(json.dumps(body).encode(), JSON)


@pytest.mark.parametrize(
    ("name", "turns"), [("chat", "messages"), ("responses", "input"), ("messages", "messages")]
)
def test_null_in_a_message_says_nothing(name: str, turns: str) -> None:
    """In no vendor's API; a value of an unknown field is refused by its name."""
    read, body = READERS[name]
    values: tuple[Any, ...] = (None, {})
    for given in values:
        message = {"role": "user", "content": "hi", "of_tomorrow": given}
        asked = json.dumps({**body, turns: [message, *body[turns]]}).encode()
        if given is None:
            read(asked, JSON)
            continue
        with pytest.raises(ArgumentInvalid, match=rf"^{turns}\[0\]\.of_tomorrow: "):
            read(asked, JSON)


def test_items_as_the_vendors_client_writes_them_down() -> None:
    """Null says nothing; what was called directly is served, and so is a tool that may be called so."""
    direct = {"caller": {"type": "direct"}, "namespace": "n"}
    tools: tuple[dict[str, Any], ...] = (
        dict.fromkeys(("allowed_callers", "output_schema", "async", "of_tomorrow")),
        {"allowed_callers": ["direct", "programmatic"], "output_schema": SCHEMA, "async": False},
    )
    read_items({"caller": None, "async": None, "of_tomorrow": None}, {}, tools[0])
    read_items({}, dict.fromkeys(("caller", "name", "namespace", "of_tomorrow")), tools[1])
    read_items({**direct, "async": False}, {**direct, "name": "weather"}, {})


PROGRAM = {"caller": {"type": "program", "caller_id": "p"}}


@pytest.mark.parametrize(
    ("call", "result", "tool", "named"),
    [
        (PROGRAM, {}, {}, "input[1].caller.type"),
        ({}, PROGRAM, {}, "input[4].caller.type"),
        ({"caller": "direct"}, {}, {}, "input[1].caller"),
        ({"of_tomorrow": 1}, {}, {}, "input[1].of_tomorrow"),
        ({}, {"of_tomorrow": 1}, {}, "input[4].of_tomorrow"),
        ({}, {}, {"allowed_callers": ["programmatic"]}, "tools[0].allowed_callers"),
        ({}, {}, {"async": True}, "tools[0].async"),
        ({}, {}, {"of_tomorrow": 1}, "tools[0].of_tomorrow"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_programs_call_is_refused_by_name(call: Any, result: Any, tool: Any, named: str) -> None:
    """And so is a field that nobody knows, once it has a value."""
    with pytest.raises(InterlockError, match=rf"^{re.escape(named)}: "):
        read_items(call, result, tool)


def sampled(api: str, **fields: Any) -> SamplingParams:
    """How tokens are chosen, as an API reads it, within the bounds of the mesh."""
    read, body = READERS[api]
    generation = read(json.dumps({**body, **fields}).encode(), JSON)
    sampling: SamplingParams = getattr(generation, "generation", generation).sampling
    check_sampling(sampling)
    return sampling


@pytest.mark.parametrize("api", ["chat", "completions", "responses", "messages"])
def test_no_mass_at_all_is_the_likeliest_token(api: str) -> None:
    """The vendors take a `top_p` of 0; a worker gets it in single precision, where it is over 0 still."""
    for given in (0, 0.0, 1e-300):
        top_p = sampled(api, top_p=given).top_p
        assert top_p is not None
        assert 0 < generation_pb2.SamplingParams(top_p=top_p).top_p == top_p < 1e-37
    assert sampled(api, top_p=0.5).top_p == 0.5
    with pytest.raises(ArgumentInvalid, match=r"^top_p: "):
        sampled(api, top_p=-0.1)


def test_a_response_repeats_the_mass_that_was_asked_for() -> None:
    """Not what is made of it here."""
    for given, told in (({"top_p": 0}, 0), ({"top_p": None}, 1), ({}, 1)):
        body = json.dumps({**RESPONSES, **given}).encode()
        assert responses_fields.read_responses(body, JSON).told["top_p"] == told


@pytest.mark.parametrize(
    ("api", "off", "least"), [("chat", (0, -1), -1), ("completions", (0, -1), -1), ("messages", (0,), 0)]
)
def test_so_many_tokens_as_are_none(api: str, off: tuple[int, ...], least: int) -> None:
    """Where an API has a number for it, every token is kept; what is below is refused, as it is described."""
    for given in off:
        assert sampled(api, top_k=given).top_k is None
    assert sampled(api, top_k=7).top_k == 7
    with pytest.raises(ArgumentInvalid, match=r"^top_k: "):
        sampled(api, top_k=least - 1)
    names = {"chat": "OpenAiChat", "completions": "OpenAiText", "messages": "AnthropicMessage"}
    described = openapi.document()["components"]["schemas"][f"{names[api]}Request"]["properties"]
    assert described["top_k"]["anyOf"][0]["minimum"] == least
    assert described["top_p"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
