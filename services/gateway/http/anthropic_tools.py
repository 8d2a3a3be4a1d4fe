"""Tools in an Anthropic request. Owns: how tools, the choice among them and their blocks are read.

A call of an earlier turn is told to the model as it would have written it, a result as a turn of the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import ArgumentInvalid, FeatureUnsupported
from services.common.strict_json import shown
from services.gateway.http import native_fields, tool_calls
from services.gateway.http.told_calls import ToldCalls, read_name
from services.gateway.http.tool_calls import Tool, ToolCall

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_ID = re.compile(r"[a-zA-Z0-9_-]{1,256}")
_TOOL_FIELDS = frozenset(
    {
        "type",
        "name",
        "description",
        "input_schema",
        "cache_control",
        "strict",
        "input_examples",
        "eager_input_streaming",
        "allowed_callers",
        "defer_loading",
    }
)
_USE_FIELDS = frozenset({"type", "id", "name", "input", "cache_control", "caller", "toolset_name"})
_RESULT_FIELDS = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"})
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What the model may do with its tools.

    Attributes:
        named: As `tool_calls.chosen` reads it.
        single: Whether one call at most is wanted.
    """

    named: str = "auto"
    single: bool = False


def read_tools(name: str, value: Any) -> tuple[Tool, ...]:
    """Returns the tools that the caller defines; raises for those that the vendor would run itself."""
    return tool_calls.read_tools(name, value, _tool)


def read_choice(name: str, value: Any) -> Choice:
    """Returns what `tool_choice` says."""
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    allowed = {"type", "disable_parallel_tool_use", *(("name",) if kind == "tool" else ())}
    native_fields.refuse_others(name, fields, allowed)
    alone = fields.get("disable_parallel_tool_use")
    single = alone is not None and native_fields.read_boolean(f"{name}.disable_parallel_tool_use", alone)
    if kind == "tool":
        return Choice("function:" + native_fields.read_text(f"{name}.name", fields.get("name")), single)
    if kind not in _CHOICES:
        raise ArgumentInvalid(f"{name}.type: must be auto, any, tool or none.")
    return Choice(_CHOICES[kind], single)


def read_use(name: str, fields: Mapping[str, Any]) -> ToolCall:
    """A `tool_use` block of an earlier turn."""
    native_fields.refuse_others(name, fields, _USE_FIELDS)
    called = _matching(_ID, f"{name}.id", fields.get("id"))
    function = read_name(f"{name}.name", fields.get("name"))
    arguments = native_fields.read_map(f"{name}.input", fields.get("input"))
    return ToolCall(called, function, json.dumps(arguments, ensure_ascii=False))


def said_result(name: str, fields: Mapping[str, Any], text: str, calls: ToldCalls) -> str:
    """A `tool_result` block whose content is `text`, as the model is told of it."""
    native_fields.refuse_others(name, fields, _RESULT_FIELDS)
    field = f"{name}.tool_use_id"
    called = _matching(_ID, field, fields.get("tool_use_id"))
    failed = fields.get("is_error")
    if failed is not None and native_fields.read_boolean(f"{name}.is_error", failed):
        text = f"Error: {text}"
    return calls.result(field, called, text)


def _tool(name: str, value: Any) -> Tool:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", native_fields.given(fields, "type", "custom"))
    if kind != "custom":
        raise FeatureUnsupported(f"{name}.type: tools of type {shown(kind)} are not served here.")
    native_fields.refuse_others(name, fields, _TOOL_FIELDS)
    return Tool(
        _matching(_NAME, f"{name}.name", fields.get("name")),
        native_fields.read_text(f"{name}.description", native_fields.given(fields, "description", "")),
        native_fields.read_map(f"{name}.input_schema", fields.get("input_schema")),
    )


def _matching(pattern: re.Pattern[str], name: str, value: Any) -> str:
    text = native_fields.read_text(name, value)
    if pattern.fullmatch(text) is None:
        raise ArgumentInvalid(f"{name}: letters, digits, _ and - are allowed, at least one of them.")
    return text
