"""The format of a call: what it holds an answer to, with schemas that refer to their own parts."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from services.gateway.core.params import FormatKind, OutputFormat
from services.gateway.http.tool_calls import Tool
from services.gateway.http.tool_schemas import call_format

WEATHER = Tool(
    "weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
)
# As libraries write models within models, one of them within itself.
TRIP = Tool(
    "trip",
    parameters={
        "$defs": {
            "Stop": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "next": {"anyOf": [{"$ref": "#/$defs/Stop"}, {"type": "null"}]},
                },
                "required": ["city"],
            }
        },
        "type": "object",
        "properties": {
            "first": {"$ref": "#/$defs/Stop"},
            "return": {"$ref": "#"},
            "$ref": {"type": "string"},
        },
        "required": ["first"],
    },
)
GOOD = {"city": "Rome", "next": {"city": "Paris", "next": None}}
ANSWER = OutputFormat(FormatKind.JSON_SCHEMA, (json.dumps(TRIP.parameters),))


def schema_of(form: OutputFormat) -> Any:
    """The schema of a format, which the library of the workers takes."""
    grammar = LLMatcher.grammar_from_json_schema(form.texts[0])
    assert LLMatcher.validate_grammar(grammar) == ""
    return json.loads(form.texts[0])


def test_references_of_several_schemas_keep_their_targets() -> None:
    """Into a schema's own definitions, and to its own root; a property may be called as they are."""
    other = Tool(
        "weather",
        parameters={"$defs": {"Stop": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/Stop"}}},
    )
    schema = schema_of(call_format([TRIP, other]))
    jsonschema.validate(
        {"name": "trip", "arguments": {"first": GOOD, "return": {"first": GOOD}, "$ref": "x"}}, schema
    )
    jsonschema.validate({"name": "weather", "arguments": {"n": 1}}, schema)
    for wrong in (
        {"name": "trip", "arguments": {"first": {"city": 1}}},
        {"name": "trip", "arguments": {"first": GOOD, "return": {}}},
        {"name": "weather", "arguments": {"n": "x"}},
        # Arguments are an object, also where a tool forgets to say so.
        {"name": "weather", "arguments": 1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_an_answer_may_be_a_call_or_what_was_asked_for() -> None:
    """One of both, each with its own references."""
    schema = schema_of(call_format([WEATHER], ANSWER))
    jsonschema.validate({"name": "weather", "arguments": {"city": "Rome"}}, schema)
    jsonschema.validate({"first": GOOD}, schema)
    broken: list[Any] = [{"name": "weather", "arguments": {}}, {"first": {}}, {}]
    for wrong in broken:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("text", ["{", "[" * 5_000])
def test_a_schema_that_is_none_is_left_to_those_who_check_it(text: str) -> None:
    """Nobody here has words for it."""
    answer = OutputFormat(FormatKind.JSON_SCHEMA, (text,))
    assert call_format([WEATHER], answer) == answer
