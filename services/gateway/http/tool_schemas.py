"""The shape of a call. Owns: the format that holds an answer to a call of one of some tools.

Pure. A schema's references point into itself, so each gets a place of its own, and they are moved with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from services.gateway.core.params import FormatKind, OutputFormat
from services.gateway.http.tool_calls import Tool


def call_format(tools: Sequence[Tool], answer: OutputFormat | None = None) -> OutputFormat:
    """The format of an answer that is a call of one of `tools`, without marks.

    Args:
        tools: What can be called; at least one.
        answer: A schema that the answer may fit instead; None: it must be a call. One that is no JSON is
            returned as it is, for whoever checks formats to say so.
    """
    places = {f"tool_{at}": _arguments(tool) for at, tool in enumerate(tools)}
    shapes = [_call(tool, f"tool_{at}") for at, tool in enumerate(tools)]
    try:
        if answer is not None:
            places["answer"] = json.loads(answer.texts[0])
            shapes.append({"$ref": "#/$defs/answer"})
        moved = {place: _moved(schema, f"#/$defs/{place}") for place, schema in places.items()}
    except (ValueError, RecursionError):
        if answer is None:
            raise
        return answer
    schema = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return OutputFormat(FormatKind.JSON_SCHEMA, (json.dumps({**schema, "$defs": moved}, ensure_ascii=False),))


def blamed(own: str, *, forced: bool, bare: bool) -> str:
    """What a request calls its format, for errors; `own` is the field that holds the answer to a schema."""
    if forced:
        return "tools"
    return f"tools or {own}" if bare else own


def _arguments(tool: Tool) -> dict[str, Any]:
    """A tool's schema; arguments are an object, also where it does not say so."""
    said = "type" in tool.parameters or "$ref" in tool.parameters
    return tool.parameters if said else {"type": "object", **tool.parameters}


def _call(tool: Tool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{place}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """The same at another place of a document."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _target(value, place) if key == "$ref" else _moved(value, place) for key, value in schema.items()
    }


def _target(value: Any, place: str) -> Any:
    """Where a reference points from now on; what is none is part of a schema."""
    if not isinstance(value, str):
        return _moved(value, place)
    return place + value[1:] if value == "#" or value.startswith("#/") else value
