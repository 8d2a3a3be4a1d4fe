"""The fields of a Responses request. Owns: what each means here, and which are refused by name.

Text goes in and text comes out; nothing is kept between requests, so nothing can be gone on with.
Must not know: the bounds of values; `core.validation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, FeatureUnsupported
from services.common.strict_json import read_object, shown
from services.gateway.core.params import (
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    SamplingParams,
)
from services.gateway.http import native_fields, responses_tools, tool_calls, tool_schemas, vendor_fields
from services.gateway.http.native import check_json_type
from services.gateway.http.openai_fields import TOKENS_WHERE_ABSENT
from services.gateway.http.openai_messages import read_content
from services.gateway.http.told_calls import ToldCalls
from services.gateway.http.tool_calls import Tool
from services.gateway.http.turns import Turns

_REFUSED = frozenset(
    {
        "access_programs",
        "background",
        "background_options",
        "context_management",
        "conversation",
        "image",
        "moderation",
        "previous_response_id",
        "prompt",
        "top_logprobs",
    }
)
# Nothing to use is nothing to refuse.
_ASKS_FOR_NOTHING: Mapping[str, Any] = {"background": False, "context_management": [], "top_logprobs": 0}
# What else can be included is of tools and of thoughts, and there are none.
_INCLUDES_REFUSED = frozenset({"message.output_text.logprobs"})
_TEXT_PARTS = dict.fromkeys(("input_text", "output_text", "text"), "text")


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether events are wanted rather than one body.
        told: The fields that the response repeats.
        tools: The names of the functions that the model may call.
        bare: Whether a call is all of the answer, without marks.
        single: Whether it may call no more than one.
        names: What fields are called here, by their names inside.
    """

    generation: GenerationRequest
    stream: bool
    told: Mapping[str, Any]
    tools: frozenset[str] = frozenset()
    bare: bool = False
    single: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


def read_responses(body: bytes, content_type: str) -> ResponsesRequest:
    """Returns what a body of `/v1/responses` asks for.

    Raises:
        MessageTooLarge: The body is longer than the server reads.
        ArgumentInvalid: It is not JSON, or a field is unknown, missing or of the wrong type.
        FeatureUnsupported: A field is known and not served.
    """
    check_json_type(content_type)
    given = {name: value for name, value in read_object(body).items() if value is not None}
    read = {name: _value(name, value) for name, value in given.items()}
    for name in ("model", "input"):
        if name not in read:
            raise ArgumentInvalid(f"{name}: is missing.")
    tools, forced = tool_calls.chosen(read.get("tools", ()), read.get("tool_choice", "auto"))
    form = read.get("text")
    if forced and form is not None:
        raise ArgumentInvalid("tool_choice: an answer that must be a call cannot have text.format.")
    # What is held to a schema has no room for marks.
    bare = bool(tools) and (forced or form is not None)
    # The vendor samples at 1 where nothing is said.
    sampling = SamplingParams(temperature=read.get("temperature", 1.0), top_p=read.get("top_p", 1.0))
    generation = GenerationRequest(
        model=read["model"],
        prompt=_prompt(read, tools, bare=bare),
        max_tokens=read.get("max_output_tokens"),
        sampling=sampling,
        form=tool_schemas.call_format(tools, form) if bare else form,
        tokens_where_absent=TOKENS_WHERE_ABSENT,
    )
    return ResponsesRequest(
        generation,
        stream=read.get("stream", False),
        told=_told(given, read, sampling),
        tools=frozenset(tool.name for tool in tools),
        bare=bare,
        single=not read.get("parallel_tool_calls", True),
        names={
            "format.json_schema": tool_schemas.blamed("text.format.schema", forced=forced, bare=bare),
            "max_tokens": "max_output_tokens",
            "messages": "input",
        },
    )


def _prompt(read: Mapping[str, Any], tools: Sequence[Tool], *, bare: bool) -> ChatPrompt:
    turns: list[Message] = list(read["input"])
    if read.get("instructions"):
        turns.insert(0, Message("system", read["instructions"]))
    return ChatPrompt(tuple(tool_calls.instructed(turns, tools, bare=bare) if tools else turns))


def _told(given: Mapping[str, Any], read: Mapping[str, Any], sampling: SamplingParams) -> Mapping[str, Any]:
    return {
        "instructions": read.get("instructions"),
        "max_output_tokens": read.get("max_output_tokens"),
        "metadata": given.get("metadata", {}),
        "parallel_tool_calls": read.get("parallel_tool_calls", True),
        # Whatever was asked for: nothing is kept here.
        "store": False,
        "temperature": sampling.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": responses_tools.told_tools(read.get("tools", ()), given.get("tools", ())),
        "top_p": given.get("top_p", sampling.top_p),
    }


def _value(name: str, value: Any) -> Any:
    if name in _ASKS_FOR_NOTHING:
        nothing = _ASKS_FOR_NOTHING[name]
        if type(value) is type(nothing) and value == nothing:
            return None
    if name in _REFUSED:
        raise FeatureUnsupported(f"{name}: is not served here.")
    if name not in FIELDS:
        raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
    return FIELDS[name](name, value)


def _input(name: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    items = native_fields.read_array(name, value)
    if not items:
        raise ArgumentInvalid(f"{name}: at least one message is needed.")
    read = [native_fields.read_map(f"{name}[{at}]", item) for at, item in enumerate(items)]
    turns = Turns()
    calls = ToldCalls(name)
    for at, fields in enumerate(read):
        beside = (*read[max(at - 1, 0) : at], *read[at + 1 : at + 2])
        alone = all(other.get("type") != "function_call" for other in beside)
        turn, follows = _item(f"{name}[{at}]", fields, calls, alone=alone)
        # Calls belong to what was said with them, and their results to one another.
        turns.add(turn, follows=follows)
    return tuple(turns.all())


def _item(name: str, fields: Mapping[str, Any], calls: ToldCalls, *, alone: bool) -> tuple[Message, bool]:
    """What an item says, and whether it is part of the turn before, if that is of the same side."""
    kind = native_fields.read_text(f"{name}.type", fields.get("type", "message"))
    if kind == "message":
        return _message(name, fields), False
    if kind == "function_call":
        call = responses_tools.read_call(name, fields)
        return Message("assistant", calls.call(call, alone=alone)), True
    if kind == "function_call_output":
        return Message("user", responses_tools.said_result(name, fields, _content, calls)), True
    raise FeatureUnsupported(f"{name}.type: items of type {shown(kind)} are not served here.")


def _message(name: str, fields: Mapping[str, Any]) -> Message:
    known = {"type", "role", "content", "id", "status", "phase"}
    native_fields.refuse_others(name, fields, known, "a message")
    role = native_fields.read_text(f"{name}.role", fields.get("role"))
    if role not in {"user", "assistant", "system", "developer"}:
        raise ArgumentInvalid(f"{name}.role: must be user, assistant, system or developer.")
    content = _content(f"{name}.content", fields.get("content"))
    return Message("system" if role == "developer" else role, content)


def _content(name: str, value: Any) -> str:
    return read_content(name, value, _TEXT_PARTS)


def _text(name: str, value: Any) -> OutputFormat | None:
    fields = native_fields.read_map(name, value)
    for key in fields:
        if key not in {"format", "verbosity"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of it.")
    if fields.get("format") is None:
        return None
    form = native_fields.read_map(f"{name}.format", fields["format"])
    kind = native_fields.read_text(f"{name}.format.type", form.get("type"))
    if kind == "text":
        return None
    if kind == "json_object":
        return OutputFormat(FormatKind.JSON_SCHEMA, ('{"type":"object"}',))
    if kind != "json_schema":
        raise ArgumentInvalid(f"{name}.format.type: must be text, json_object or json_schema.")
    return OutputFormat(
        FormatKind.JSON_SCHEMA, (native_fields.read_schema(f"{name}.format.schema", form.get("schema")),)
    )


def _include(name: str, value: Any) -> None:
    for at, what in enumerate(native_fields.read_array(name, value)):
        if native_fields.read_text(f"{name}[{at}]", what) in _INCLUDES_REFUSED:
            raise FeatureUnsupported(f"{name}[{at}]: {what} is not served here.")


FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": native_fields.read_text,
    "input": _input,
    "instructions": native_fields.read_text,
    "max_output_tokens": native_fields.read_int32,
    "temperature": native_fields.read_number,
    "top_p": vendor_fields.read_top_p,
    "text": _text,
    "stream": native_fields.read_boolean,
    "include": _include,
    "metadata": native_fields.read_map,
    "store": native_fields.read_boolean,
    "tools": responses_tools.read_tools,
    "tool_choice": responses_tools.read_choice,
    "parallel_tool_calls": native_fields.read_boolean,
    **dict.fromkeys(
        (
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "service_tier",
            # Of the vendor's own tools.
            "max_tool_calls",
            "reasoning",
            "stream_options",
            "truncation",
        ),
        native_fields.ignore,
    ),
}
