"""The conversation in an OpenAI chat request. Owns: what each kind of message says, and which are refused.

A call of an earlier turn is told to the model as it would have written it, a result as a turn of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, FeatureUnsupported
from services.common.strict_json import shown
from services.gateway.http import native_fields
from services.gateway.http.told_calls import ToldCalls, read_name
from services.gateway.http.tool_calls import ToolCall, said_result
from services.gateway.http.turns import Turns

_PARTS = {"text": "text", "refusal": "refusal"}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_FIELDS = frozenset(
    {
        "role",
        "content",
        "name",
        "refusal",
        "annotations",
        "tool_calls",
        "tool_call_id",
        "audio",
        "function_call",
    }
)


def read_messages(name: str, value: Any) -> tuple[Message, ...]:
    """The turns of a conversation; results that follow one another are one turn of it.

    Raises:
        ArgumentInvalid: It has no message, or one is none; or a result is that of no call before it; or
            no prompt has room for its calls and results.
        FeatureUnsupported: A part is no text.
    """
    turns = Turns()
    calls = ToldCalls(name)
    after_result = False
    for at, given in enumerate(native_fields.read_array(name, value)):
        turn = _message(f"{name}[{at}]", given, calls)
        is_result = given["role"] == "tool"
        turns.add(turn, follows=is_result and after_result)
        after_result = is_result
    read = turns.all()
    if not read:
        raise ArgumentInvalid(f"{name}: at least one message is needed.")
    return tuple(read)


def _message(name: str, value: Any, calls: ToldCalls) -> Message:
    fields = native_fields.read_map(name, value)
    role = native_fields.read_text(f"{name}.role", fields.get("role"))
    if role not in ROLES:
        raise ArgumentInvalid(f"{name}.role: must be system, developer, user, assistant or tool.")
    _check_fields(name, fields, role)
    called = _said_calls(f"{name}.tool_calls", native_fields.given(fields, "tool_calls", []), calls)
    # An assistant that refused has said so instead.
    said = native_fields.given(fields, "content", fields.get("refusal") if role == "assistant" else None)
    if said is None and not called:
        raise ArgumentInvalid(f"{name}.content: is missing.")
    content = read_content(f"{name}.content", "" if said is None else said, _PARTS)
    if role == "tool":
        field = f"{name}.tool_call_id"
        call_id = native_fields.read_text(field, fields.get("tool_call_id"))
        return Message("user", calls.result(field, call_id, content))
    if role == "function":
        return Message("user", said_result(content))
    words = "\n".join(part for part in (content, called) if part)
    return Message("system" if role == "developer" else role, words)


def _check_fields(name: str, fields: Mapping[str, Any], role: str) -> None:
    for key, given in fields.items():
        # The vendor's clients send what they read, with each field that they know; null says nothing.
        if given is None:
            continue
        if key in {"audio", "function_call"}:
            raise FeatureUnsupported(f"{name}.{key}: is not served here.")
        # What they made of the content of an answer, which they leave beside it.
        if key not in _FIELDS and not (key == "parsed" and role == "assistant"):
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a message.")


def _said_calls(name: str, value: Any, calls: ToldCalls) -> str:
    made = [_call(f"{name}[{at}]", call) for at, call in enumerate(native_fields.read_array(name, value))]
    return "\n".join(calls.call(call, alone=len(made) == 1) for call in made)


def _call(name: str, value: Any) -> ToolCall:
    fields = native_fields.read_map(name, value)
    function = native_fields.read_map(f"{name}.function", fields.get("function"))
    return ToolCall(
        native_fields.read_text(f"{name}.id", native_fields.given(fields, "id", "")),
        read_name(f"{name}.function.name", function.get("name")),
        native_fields.read_text(f"{name}.function.arguments", function.get("arguments")),
    )


def read_content(name: str, value: Any, kinds: Mapping[str, str]) -> str:
    """A text, or parts of it, put together.

    Args:
        name: What errors call it.
        value: What the caller sent.
        kinds: The types of parts that are served, and the field of each that holds its text.

    Raises:
        ArgumentInvalid: It is neither, or a part of it is not well-formed.
        FeatureUnsupported: A part is of another type.
    """
    if isinstance(value, str):
        return value
    parts = native_fields.read_array(name, value)
    return "".join(_part(f"{name}[{at}]", part, kinds) for at, part in enumerate(parts))


def _part(name: str, value: Any, kinds: Mapping[str, str]) -> str:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind not in kinds:
        raise FeatureUnsupported(f"{name}.type: parts of type {shown(kind)} are not served here.")
    return native_fields.read_text(f"{name}.{kinds[kind]}", fields.get(kinds[kind]))
