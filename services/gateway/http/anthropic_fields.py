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
from services.gateway.core import validation
from services.gateway.core.params import (
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    SamplingParams,
)
from services.gateway.http import anthropic_tools, native_fields, tool_calls, tool_schemas, vendor_fields
from services.gateway.http.anthropic_tools import Choice
from services.gateway.http.native import check_json_type
from services.gateway.http.told_calls import ToldCalls
from services.gateway.http.tool_calls import Tool
from services.gateway.http.turns import Turns

_SAMPLING = ("temperature", "top_p", "top_k")
COUNTED = frozenset(
    {
        "messages",
        "model",
        "system",
        "thinking",
        "output_config",
        "cache_control",
        "context_management",
        "speed",
        "tools",
        "tool_choice",
    }
)
# Nothing to use is nothing to refuse.
_EMPTY_OR_REFUSED = ("mcp_servers",)
_REFUSED = ("container", "inference_geo", "diagnostics")


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether events are wanted rather than one message.
        tools: The names of the tools that the model may call.
        bare: Whether a call is all of the answer, without marks.
        single: Whether it may call no more than one.
        names: What fields are called here, by their names inside.
    """

    generation: GenerationRequest
    stream: bool
    tools: frozenset[str] = frozenset()
    bare: bool = False
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
    bare = _is_bare(read)
    generation = GenerationRequest(
        request_id=None,
        model=read["model"],
        prompt=_prompt(read),
        max_tokens=read["max_tokens"],
        sampling=SamplingParams(**sampling),
        stop=read.get("stop_sequences", ()),
        logprobs=None,
        n=None,
        form=tool_schemas.call_format(tools, form) if bare else form,
        priority=0,
        resumable=False,
        # The vendor publishes no bound.
        stops_max=validation.UNBOUNDED_STOPS_MAX,
    )
    return MessagesRequest(
        generation,
        stream=read.get("stream", False),
        tools=frozenset(tool.name for tool in tools),
        bare=bare,
        single=read.get("tool_choice", Choice()).single,
        names={
            "format.json_schema": tool_schemas.blamed(
                "output_config.format.schema", forced=forced, bare=bare
            ),
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
    gathered = Turns()
    if read.get("system"):
        gathered.add(Message("system", read["system"]), follows=False)
    for turn in read["messages"]:
        # The vendor reads two turns of one side as one.
        gathered.add(turn, follows=True)
    turns = gathered.all()
    if turns and turns[-1].role == "assistant":
        raise FeatureUnsupported("messages: the last turn must be the user's; it cannot be continued here.")
    tools, _ = _tools(read)
    return ChatPrompt(tuple(tool_calls.instructed(turns, tools, bare=_is_bare(read)) if tools else turns))


def _is_bare(read: Mapping[str, Any]) -> bool:
    """Whether a call is all of the answer: what is held to a schema has no room for marks."""
    tools, forced = _tools(read)
    return bool(tools) and (forced or read.get("output_config") is not None)


def _tools(read: Mapping[str, Any]) -> tuple[tuple[Tool, ...], bool]:
    return tool_calls.chosen(read.get("tools", ()), read.get("tool_choice", Choice()).named)


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    turns = native_fields.read_array(name, value)
    if not turns:
        raise ArgumentInvalid(f"{name}: at least one turn is needed.")
    calls = ToldCalls(name)
    return tuple(_message(f"{name}[{at}]", turn, calls) for at, turn in enumerate(turns))


def _message(name: str, value: Any, calls: ToldCalls) -> Message:
    fields = native_fields.read_map(name, value)
    native_fields.refuse_others(name, fields, {"role", "content"}, "a message")
    for key in ("role", "content"):
        if key not in fields:
            raise ArgumentInvalid(f"{name}.{key}: is missing.")
    role = native_fields.read_text(f"{name}.role", fields["role"])
    if role not in {"user", "assistant", "system"}:
        raise ArgumentInvalid(f"{name}.role: must be user, assistant or system.")
    return Message(role, _content(f"{name}.content", fields["content"], role, calls))


def _system(name: str, value: Any) -> str:
    return _content(name, value, "system", ToldCalls(name))


def _content(name: str, value: Any, role: str, calls: ToldCalls) -> str:
    """A text, or blocks of it; blocks are lines of one text."""
    if isinstance(value, str):
        return value
    blocks = [
        (f"{name}[{at}]", native_fields.read_map(f"{name}[{at}]", block))
        for at, block in enumerate(native_fields.read_array(name, value))
    ]
    alone = sum(fields.get("type") == "tool_use" for _, fields in blocks) == 1
    said = (_block(place, fields, role, calls, alone=alone) for place, fields in blocks)
    return "\n".join(text for text in said if text is not None)


def _block(name: str, fields: Mapping[str, Any], role: str, calls: ToldCalls, *, alone: bool) -> str | None:
    """What a block says; None: nothing to this model."""
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind == "tool_use" and role == "assistant":
        return calls.call(anthropic_tools.read_use(name, fields), alone=alone)
    if kind == "tool_result" and role == "user":
        content = fields.get("content")
        text = "" if content is None else _content(f"{name}.content", content, "tool", calls)
        return anthropic_tools.said_result(name, fields, text, calls)
    if kind in {"thinking", "redacted_thinking"} and role == "assistant":
        # Another model's, from before; the vendor leaves out what was thought in earlier turns as well.
        return None
    if kind != "text":
        raise FeatureUnsupported(f"{name}.type: blocks of type {shown(kind)} are not served here.")
    for key, given in fields.items():
        if key not in {"type", "text", "cache_control", "citations"} and given is not None:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a text block.")
    return native_fields.read_text(f"{name}.text", fields.get("text"))


def _thinking(name: str, value: Any) -> None:
    # The other two leave it to the model whether it thinks, and this one does not.
    kind = native_fields.read_text(f"{name}.type", native_fields.read_map(name, value).get("type"))
    if kind not in {"disabled", "adaptive", "between_tools"}:
        raise FeatureUnsupported(f"{name}: is not served here; leave it out or disable it.")


def _output(name: str, value: Any) -> OutputFormat | None:
    fields = native_fields.read_map(name, value)
    for key in fields:
        # How much effort is a hint to other models.
        if key not in {"format", "effort"}:
            raise FeatureUnsupported(f"{name}.{shown(key)}: is not served here.")
    if fields.get("format") is None:
        return None
    form = native_fields.read_map(f"{name}.format", fields["format"])
    if form.get("type") != "json_schema" or set(form) != {"type", "schema"}:
        raise ArgumentInvalid(f"{name}.format: must be a json_schema with its schema.")
    return OutputFormat(
        FormatKind.JSON_SCHEMA, (native_fields.read_schema(f"{name}.format.schema", form["schema"]),)
    )


def _context_management(name: str, value: Any) -> None:
    """Asks for what is left out of a long conversation; thoughts can be, as there are none."""
    fields = native_fields.read_map(name, value)
    for at, edit in enumerate(
        native_fields.read_array(f"{name}.edits", native_fields.given(fields, "edits", []))
    ):
        place = f"{name}.edits[{at}]"
        kind = native_fields.read_text(f"{place}.type", native_fields.read_map(place, edit).get("type"))
        if not kind.startswith("clear_thinking_"):
            raise FeatureUnsupported(f"{place}.type: edits of type {shown(kind)} are not served here.")


FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": native_fields.read_text,
    "messages": _messages,
    "max_tokens": native_fields.read_int32,
    "system": _system,
    "stop_sequences": native_fields.read_stop,
    "stream": native_fields.read_boolean,
    "temperature": native_fields.read_number,
    "top_p": vendor_fields.read_top_p,
    "top_k": vendor_fields.read_top_k,
    "tools": anthropic_tools.read_tools,
    "tool_choice": anthropic_tools.read_choice,
    "thinking": _thinking,
    "output_config": _output,
    "context_management": _context_management,
    "metadata": native_fields.ignore,
    "cache_control": native_fields.ignore,
    "service_tier": native_fields.ignore,
    "speed": native_fields.ignore,
}
