"""The fields of an Anthropic request. Owns: what each means here, and which are refused by name.

Fields that change nothing that could be promised (`metadata`, `cache_control`, `service_tier`) are accepted.
Must not know: the bounds of values; `core.validation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from services.gateway.http import anthropic_tools, native_fields, tool_calls
from services.gateway.http.anthropic_tools import Choice
from services.gateway.http.native import check_json_type
from services.gateway.http.tool_calls import Tool

_SAMPLING = ("temperature", "top_p", "top_k")
COUNTED = frozenset(
    {"messages", "model", "system", "thinking", "output_config", "cache_control", "tools", "tool_choice"}
)
# Nothing to use is nothing to refuse.
_EMPTY_OR_REFUSED = ("mcp_servers",)
_REFUSED = ("container", "inference_geo", "context_management")


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether events are wanted rather than one message.
        tools: The names of the tools that the model may call.
        forced: Whether it must call one.
        single: Whether it may call no more than one.
        names: What fields are called here, by their names inside.
    """

    generation: GenerationRequest
    stream: bool
    tools: frozenset[str] = frozenset()
    forced: bool = False
    single: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


def read_messages(body: bytes, content_type: str) -> MessagesRequest:
    """Returns what a body of `/v1/messages` asks for.

    Raises:
        MessageTooLarge: The body is longer than the server reads.
        ArgumentInvalid: It is not JSON, or a field is unknown, missing or of the wrong type.
        FeatureUnsupported: A field is known and not served.
    """
    read = _read(body, content_type, ("model", "messages", "max_tokens"))
    # The vendor samples at 1 where nothing is said.
    sampling = {"temperature": 1.0} | {
        name: read[name] for name in ("temperature", "top_p", "top_k") if name in read
    }
    tools, forced = _tools(read)
    form = read.get("output_config")
    if forced and form is not None:
        raise ArgumentInvalid("tool_choice: an answer that must be a call cannot have output_config.format.")
    generation = GenerationRequest(
        request_id=None,
        model=read["model"],
        prompt=_prompt(read),
        max_tokens=read["max_tokens"],
        sampling=SamplingParams(**sampling),
        stop=read.get("stop_sequences", ()),
        logprobs=None,
        n=None,
        form=tool_calls.forced_format(tools) if forced else form,
        priority=0,
        resumable=False,
    )
    return MessagesRequest(
        generation,
        stream=read.get("stream", False),
        tools=frozenset(tool.name for tool in tools),
        forced=forced,
        single=read.get("tool_choice", Choice()).single,
        names={
            "format.json_schema": "tools" if forced else "output_config.format.schema",
            "stop": "stop_sequences",
        },
    )


def read_counted(body: bytes, content_type: str) -> tuple[str, ChatPrompt]:
    """Returns model and conversation of a body of `/v1/messages/count_tokens`; raises as `read_messages`."""
    read = _read(body, content_type, ("model", "messages"), COUNTED)
    return read["model"], _prompt(read)


def _read(
    body: bytes, content_type: str, needed: tuple[str, ...], allowed: frozenset[str] | None = None
) -> dict[str, Any]:
    check_json_type(content_type)
    fields = {name: value for name, value in read_object(body).items() if value is not None}
    read = {}
    for name, value in fields.items():
        if name in _REFUSED or (name in _EMPTY_OR_REFUSED and value != []):
            raise FeatureUnsupported(f"{name}: is not served here.")
        if name in _EMPTY_OR_REFUSED:
            continue
        if name not in FIELDS or (allowed is not None and name not in allowed):
            raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
        read[name] = FIELDS[name](name, value)
    for name in needed:
        if name not in read:
            raise ArgumentInvalid(f"{name}: is missing.")
    return read


def _prompt(read: Mapping[str, Any]) -> ChatPrompt:
    turns: list[Message] = [Message("system", read["system"])] if read.get("system") else []
    for turn in read["messages"]:
        if turns and turns[-1].role == turn.role:
            # The vendor reads two turns of one side as one.
            turn = Message(turn.role, f"{turns.pop().content}\n{turn.content}")  # noqa: PLW2901 - joined
        turns.append(turn)
    if turns and turns[-1].role == "assistant":
        raise FeatureUnsupported("messages: the last turn must be the user's; it cannot be continued here.")
    tools, forced = _tools(read)
    return ChatPrompt(tuple(tool_calls.instructed(turns, tools) if tools and not forced else turns))


def _tools(read: Mapping[str, Any]) -> tuple[tuple[Tool, ...], bool]:
    return tool_calls.chosen(read.get("tools", ()), read.get("tool_choice", Choice()).named)


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    turns = native_fields.read_array(name, value)
    if not turns:
        raise ArgumentInvalid(f"{name}: at least one turn is needed.")
    return tuple(_message(f"{name}[{at}]", turn) for at, turn in enumerate(turns))


def _message(name: str, value: Any) -> Message:
    fields = native_fields.read_map(name, value)
    for key in fields:
        if key not in {"role", "content"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a message.")
    for key in ("role", "content"):
        if key not in fields:
            raise ArgumentInvalid(f"{name}.{key}: is missing.")
    role = native_fields.read_text(f"{name}.role", fields["role"])
    if role not in {"user", "assistant"}:
        raise ArgumentInvalid(f"{name}.role: must be user or assistant.")
    return Message(role, _content(f"{name}.content", fields["content"], role))


def _system(name: str, value: Any) -> str:
    return _content(name, value, "system")


def _content(name: str, value: Any, role: str) -> str:
    """A text, or blocks of it; blocks are lines of one text."""
    if isinstance(value, str):
        return value
    blocks = native_fields.read_array(name, value)
    return "\n".join(_block(f"{name}[{at}]", block, role) for at, block in enumerate(blocks))


def _block(name: str, value: Any, role: str) -> str:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind == "tool_use" and role == "assistant":
        return anthropic_tools.said_use(name, fields)
    if kind == "tool_result" and role == "user":
        content = fields.get("content")
        text = "" if content is None else _content(f"{name}.content", content, "tool")
        return anthropic_tools.said_result(name, fields, text)
    if kind != "text":
        raise FeatureUnsupported(f"{name}.type: blocks of type {shown(kind)} are not served here.")
    for key in fields:
        if key not in {"type", "text", "cache_control", "citations"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a text block.")
    return native_fields.read_text(f"{name}.text", fields.get("text"))


def _thinking(name: str, value: Any) -> None:
    if native_fields.read_map(name, value).get("type") != "disabled":
        raise FeatureUnsupported(f"{name}: is not served here; leave it out or disable it.")


def _output(name: str, value: Any) -> OutputFormat | None:
    fields = native_fields.read_map(name, value)
    for key in fields:
        if key != "format":
            raise FeatureUnsupported(f"{name}.{shown(key)}: is not served here.")
    if fields.get("format") is None:
        return None
    form = native_fields.read_map(f"{name}.format", fields["format"])
    if form.get("type") != "json_schema" or set(form) != {"type", "schema"}:
        raise ArgumentInvalid(f"{name}.format: must be a json_schema with its schema.")
    return OutputFormat(
        FormatKind.JSON_SCHEMA, (native_fields.read_schema(f"{name}.format.schema", form["schema"]),)
    )


FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": native_fields.read_text,
    "messages": _messages,
    "max_tokens": native_fields.read_int32,
    "system": _system,
    "stop_sequences": native_fields.read_stop,
    "stream": native_fields.read_boolean,
    "temperature": native_fields.read_number,
    "top_p": native_fields.read_number,
    "top_k": native_fields.read_int32,
    "tools": anthropic_tools.read_tools,
    "tool_choice": anthropic_tools.read_choice,
    "thinking": _thinking,
    "output_config": _output,
    "metadata": native_fields.ignore,
    "cache_control": native_fields.ignore,
    "service_tier": native_fields.ignore,
}
