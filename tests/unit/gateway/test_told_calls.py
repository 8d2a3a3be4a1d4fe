"""Calls of a conversation and what they came to: each API tells a model of them within bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid
from services.gateway.core.params import ChatPrompt
from services.gateway.core.validation import PROMPT_BYTES_MAX
from services.gateway.http import anthropic_fields, openai_fields, responses_fields
from services.gateway.http.told_calls import NAME_CHARACTERS_MAX

JSON = "application/json"
ASKED = {"role": "user", "content": "hi"}


def chat(name: str, results: list[str]) -> dict[str, Any]:
    """Two calls, and results of the first."""
    call = {"type": "function", "function": {"name": name, "arguments": "{}"}}
    calls = {"role": "assistant", "tool_calls": [{**call, "id": "a"}, {**call, "id": "b"}]}
    told = [{"role": "tool", "tool_call_id": "a", "content": text} for text in results]
    return {"model": "m", "messages": [ASKED, calls, *told]}


def responses(name: str, results: list[str]) -> dict[str, Any]:
    """Two calls, and results of the first."""
    call = {"type": "function_call", "name": name, "arguments": "{}"}
    told = [{"type": "function_call_output", "call_id": "a", "output": text} for text in results]
    return {"model": "m", "input": [ASKED, {**call, "call_id": "a"}, {**call, "call_id": "b"}, *told]}


def messages(name: str, results: list[str]) -> dict[str, Any]:
    """Two calls, and results of the first."""
    uses = [{"type": "tool_use", "id": each, "name": name, "input": {}} for each in "ab"]
    told = [{"type": "tool_result", "tool_use_id": "a", "content": text} for text in results]
    turns = [ASKED, {"role": "assistant", "content": uses}, {"role": "user", "content": told}]
    return {"model": "m", "max_tokens": 9, "messages": turns}


def counted(name: str, results: list[str]) -> dict[str, Any]:
    """The same conversation, to be counted."""
    return {key: value for key, value in messages(name, results).items() if key != "max_tokens"}


Made = Callable[[str, list[str]], dict[str, Any]]
Read = Callable[[bytes, str], Any]
READERS: dict[str, tuple[Read, Made, str]] = {
    "chat": (openai_fields.read_chat, chat, "messages"),
    "responses": (responses_fields.read_responses, responses, "input"),
    "messages": (anthropic_fields.read_messages, messages, "messages"),
    "count_tokens": (anthropic_fields.read_counted, counted, "messages"),
}


@pytest.mark.parametrize("api", READERS)
def test_the_name_of_a_call_is_bounded(api: str) -> None:
    """It is told again with each result; at the bound it is taken."""
    read, made, conversation = READERS[api]
    read(json.dumps(made("f" * NAME_CHARACTERS_MAX, ["x"])).encode(), JSON)
    with pytest.raises(ArgumentInvalid, match=rf"^{conversation}\[1\].*name: at most {NAME_CHARACTERS_MAX}"):
        read(json.dumps(made("f" * (NAME_CHARACTERS_MAX + 1), ["x"])).encode(), JSON)


@pytest.mark.parametrize("api", READERS)
def test_what_is_told_of_calls_is_bounded(api: str) -> None:
    """A body that makes more of it than a prompt has room for is refused while it is read."""
    read, made, conversation = READERS[api]
    name = "f" * NAME_CHARACTERS_MAX
    few = PROMPT_BYTES_MAX // (NAME_CHARACTERS_MAX + 100)
    read(json.dumps(made(name, ["x"] * few)).encode(), JSON)
    body = json.dumps(made(name, ["x"] * 2 * few)).encode()
    assert len(body) < PROMPT_BYTES_MAX
    with pytest.raises(ArgumentInvalid, match=f"^{conversation}: together at most {PROMPT_BYTES_MAX} bytes"):
        read(body, JSON)


def seconds_to_read(first: str) -> float:
    """Processor time for thousands of short turns of one side behind a first one, the least of three."""
    turns = [{"role": "user", "content": first}, *[{"role": "user", "content": ""}] * 25_000]
    body = json.dumps({"model": "m", "max_tokens": 9, "messages": turns}, separators=(",", ":")).encode()
    took_s = []
    for _ in range(3):
        began_s = time.process_time()
        prompt = anthropic_fields.read_messages(body, JSON).generation.prompt
        took_s.append(time.process_time() - began_s)
        assert prompt == ChatPrompt((Message("user", first + "\n" * 25_000),))
    return min(took_s)


def test_turns_of_one_side_take_linear_time() -> None:
    """None behind a long one copies it again."""
    assert seconds_to_read("x" * 1_000_000) < 4 * seconds_to_read("x")


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_results_in_a_row_are_one_turn(api: str) -> None:
    """In their order, a line each."""
    read, made, _ = READERS[api]
    turns = read(json.dumps(made("f", ["x", "", "y"])).encode(), JSON).generation.prompt.messages
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    lines = turns[2].content.split("\n")
    told = [line.removeprefix("<tool_response>").removesuffix("</tool_response>") for line in lines]
    assert [json.loads(line)["content"] for line in told] == ["x", "", "y"]
