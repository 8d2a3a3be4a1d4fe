"""Tools in a Responses request. Owns: how tools, the choice among them, calls and their results are read.

A call of an earlier turn is told to the model as it would have written it, a result as a turn of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.common.errors import ArgumentInvalid, FeatureUnsupported
from services.common.strict_json import shown
from services.gateway.http import native_fields, tool_calls
from services.gateway.http.told_calls import ToldCalls, read_name
from services.gateway.http.tool_calls import Tool, ToolCall

_TOOL_FIELDS = frozenset(
    {
        "type",
        "name",
        "description",
        "parameters",
        "strict",
        "defer_loading",
        "allowed_callers",
        "output_schema",
        "async",
    }
)
_CALL_FIELDS = frozenset(
    {"type", "id", "call_id", "name", "arguments", "status", "namespace", "caller", "async"}
)
_RESULT_FIELDS = frozenset({"type", "id", "call_id", "output", "status", "caller", "name", "namespace"})


def read_tools(name: str, value: Any) -> tuple[Tool, ...]:
    """Returns the functions that the caller defines; raises for tools that the vendor would run itself."""
    return tool_calls.read_tools(name, value, _tool)


def read_choice(name: str, value: Any) -> str:
    """Returns what `tool_choice` says, as `tool_calls.chosen` reads it."""
    if isinstance(value, str):
        if value not in {"auto", "none", "required"}:
            raise ArgumentInvalid(f"{name}: must be auto, none, required, or a function.")
        return value
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind != "function":
        raise FeatureUnsupported(f"{name}.type: {shown(kind)} is not served here; name one function.")
    native_fields.refuse_others(name, fields, frozenset({"type", "name"}))
    return "function:" + native_fields.read_text(f"{name}.name", fields.get("name"))


def told_tools(tools: Sequence[Tool], given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools as a response repeats them; `given` is what was posted, one for one."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": asked.get("description"),
            "parameters": asked.get("parameters"),
            "strict": bool(asked.get("strict")),
        }
        for tool, asked in zip(tools, given, strict=True)
    ]


def read_call(name: str, fields: Mapping[str, Any]) -> ToolCall:
    """A `function_call` item of an earlier response."""
    native_fields.refuse_others(name, fields, _CALL_FIELDS)
    _check_caller(name, fields)
    return ToolCall(
        native_fields.read_text(f"{name}.call_id", fields.get("call_id")),
        read_name(f"{name}.name", fields.get("name")),
        native_fields.read_text(f"{name}.arguments", fields.get("arguments")),
    )


def said_result(
    name: str, fields: Mapping[str, Any], read_content: Callable[[str, Any], str], calls: ToldCalls
) -> str:
    """A `function_call_output` item, as the model is told of it; `read_content` reads its output."""
    native_fields.refuse_others(name, fields, _RESULT_FIELDS)
    _check_caller(name, fields)
    field = f"{name}.call_id"
    called = native_fields.read_text(field, fields.get("call_id"))
    return calls.result(field, called, read_content(f"{name}.output", fields.get("output")))


def _tool(name: str, value: Any) -> Tool:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind != "function":
        raise FeatureUnsupported(f"{name}.type: tools of type {shown(kind)} are not served here.")
    native_fields.refuse_others(name, fields, _TOOL_FIELDS)
    for flag in ("strict", "defer_loading", "async"):
        asked = native_fields.read_boolean(f"{name}.{flag}", native_fields.given(fields, flag, False))
        if asked and flag != "strict":
            raise FeatureUnsupported(f"{name}.{flag}: is not served here; leave it out.")
    _check_callers(f"{name}.allowed_callers", native_fields.given(fields, "allowed_callers", ["direct"]))
    return Tool(
        read_name(f"{name}.name", fields.get("name")),
        native_fields.read_text(f"{name}.description", native_fields.given(fields, "description", "")),
        native_fields.read_map(f"{name}.parameters", native_fields.given(fields, "parameters", {})),
    )


def _check_callers(name: str, value: Any) -> None:
    """Programs of the vendor's, of which there are none here, may be allowed to call, but not alone."""
    callers = native_fields.read_array(name, value)
    if "direct" not in callers:
        raise FeatureUnsupported(f"{name}: only direct calls are served here; allow them.")


def _check_caller(name: str, fields: Mapping[str, Any]) -> None:
    caller = native_fields.read_map(
        f"{name}.caller", native_fields.given(fields, "caller", {"type": "direct"})
    )
    kind = native_fields.read_text(f"{name}.caller.type", caller.get("type"))
    if kind != "direct":
        raise FeatureUnsupported(f"{name}.caller.type: calls of a {shown(kind)} are not served here.")
