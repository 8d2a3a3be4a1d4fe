"""The fields of a Responses request. Owns: what each means here, and which are refused by name.

Text goes in and text comes out; nothing is kept between requests, so nothing can be gone on with.
Must not know: the bounds of values; `core.validation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from services.gateway.http import native_fields
from services.gateway.http.native import check_json_type
from services.gateway.http.openai_fields import TOKENS_WHERE_ABSENT

_REFUSED = frozenset(
    {"previous_response_id", "conversation", "background", "prompt", "max_tool_calls", "top_logprobs"}
)
# Nothing to use is nothing to refuse.
_EMPTY_OR_REFUSED = frozenset({"tools", "include"})
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether events are wanted rather than one body.
        told: The fields that the response repeats.
    """

    generation: GenerationRequest
    stream: bool
    told: Mapping[str, Any]


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
    turns = list(read["input"])
    if read.get("instructions"):
        turns.insert(0, Message("system", read["instructions"]))
    # The vendor samples at 1 where nothing is said.
    temperature, top_p = read.get("temperature", 1.0), read.get("top_p", 1.0)
    generation = GenerationRequest(
        model=read["model"],
        prompt=ChatPrompt(tuple(turns)),
        max_tokens=read.get("max_output_tokens"),
        sampling=SamplingParams(temperature=temperature, top_p=top_p),
        form=read.get("text"),
        tokens_where_absent=TOKENS_WHERE_ABSENT,
    )
    told = {
        "instructions": read.get("instructions"),
        "max_output_tokens": read.get("max_output_tokens"),
        "metadata": given.get("metadata", {}),
        "store": given.get("store", True),
        "temperature": temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "top_p": top_p,
    }
    return ResponsesRequest(generation, stream=read.get("stream", False), told=told)


def _value(name: str, value: Any) -> Any:
    if name in _EMPTY_OR_REFUSED and value == []:
        return None
    if name == "background" and value is False:
        return None
    if name in _REFUSED or name in _EMPTY_OR_REFUSED:
        raise FeatureUnsupported(f"{name}: is not served here.")
    if name not in _FIELDS:
        raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
    return _FIELDS[name](name, value)


def _input(name: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    items = native_fields.read_array(name, value)
    if not items:
        raise ArgumentInvalid(f"{name}: at least one message is needed.")
    return tuple(_item(f"{name}[{at}]", item) for at, item in enumerate(items))


def _item(name: str, value: Any) -> Message:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type", "message"))
    if kind != "message":
        raise FeatureUnsupported(f"{name}.type: items of type {shown(kind)} are not served here.")
    for key in fields:
        if key not in {"type", "role", "content", "id", "status", "phase"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a message.")
    role = native_fields.read_text(f"{name}.role", fields.get("role"))
    if role not in {"user", "assistant", "system", "developer"}:
        raise ArgumentInvalid(f"{name}.role: must be user, assistant, system or developer.")
    return Message(
        "system" if role == "developer" else role, _content(f"{name}.content", fields.get("content"))
    )


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    parts = native_fields.read_array(name, value)
    return "".join(_part(f"{name}[{at}]", part) for at, part in enumerate(parts))


def _part(name: str, value: Any) -> str:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind not in _TEXT_PARTS:
        raise FeatureUnsupported(f"{name}.type: parts of type {shown(kind)} are not served here.")
    return native_fields.read_text(f"{name}.text", fields.get("text"))


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


def _ignored(name: str, value: Any) -> None:
    del name, value


_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": native_fields.read_text,
    "input": _input,
    "instructions": native_fields.read_text,
    "max_output_tokens": native_fields.read_int32,
    "temperature": native_fields.read_number,
    "top_p": native_fields.read_number,
    "text": _text,
    "stream": native_fields.read_boolean,
    "metadata": native_fields.read_map,
    "store": native_fields.read_boolean,
    **dict.fromkeys(
        (
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "service_tier",
            "parallel_tool_calls",
            "reasoning",
            "stream_options",
            "tool_choice",
            "truncation",
        ),
        _ignored,
    ),
}
