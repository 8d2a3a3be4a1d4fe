"""The Anthropic paths of `/openapi.json`. Owns: what of the vendor's API is taken here, and what is answered.

A field that the vendor knows and that is refused by name is not described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.gateway.core.validation import UNBOUNDED_STOPS_MAX
from services.gateway.http import anthropic_fields
from services.gateway.http.openapi_parts import (
    BOOLEAN,
    COUNT,
    FUNCTION_NAME,
    NULL,
    OBJECT,
    REQUEST_ID,
    TEXT,
    VENDOR_ERRORS,
    VENDOR_TOP_K,
    VENDOR_TOP_P,
    Schema,
    any_of,
    array,
    body,
    closed,
    nullable,
    operation,
    ref,
    stops,
    with_optional,
)
from services.gateway.http.tool_calls import TOOLS_MAX

_ERRORS: Mapping[int, str] = {
    **VENDOR_ERRORS,
    # This vendor tells the two apart.
    429: "The tenant has used what it may.",
    529: "The queue is full.",
}
_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,128}$"}
# What it may say beside its kind is the vendor's.
_EDIT: Schema = {
    "type": "object",
    "properties": {"type": {"type": "string", "pattern": "^clear_thinking_"}},
    "required": ["type"],
}
_CALL_ID: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,256}$"}


def paths() -> dict[str, Any]:
    """The paths that no other vendor has as well."""
    create = operation(
        "createMessage",
        "Answers a conversation.",
        ref("AnthropicMessage"),
        _ERRORS,
        ref("AnthropicError"),
        posted=ref("AnthropicMessageRequest"),
        streams=True,
    )
    count = operation(
        "countMessageTokens",
        "Counts the tokens of a conversation.",
        ref("AnthropicCount"),
        _ERRORS,
        ref("AnthropicError"),
        posted=ref("AnthropicCountRequest"),
    )
    return {"/v1/messages": {"post": create}, "/v1/messages/count_tokens": {"post": count}}


def schemas() -> dict[str, Any]:
    """What the paths take and answer, by name."""
    fields = anthropic_fields.FIELDS
    own = _own_fields()
    counted = {name: reader for name, reader in fields.items() if name in anthropic_fields.COUNTED}
    told = {name: schema for name, schema in own.items() if name in counted}
    error = closed(type=TEXT, message=TEXT)
    return {
        "AnthropicMessageRequest": body(fields, "model", "messages", "max_tokens", own=own),
        "AnthropicMessage": _message(),
        "AnthropicCountRequest": body(counted, "model", "messages", own=told),
        "AnthropicCount": closed(input_tokens=COUNT),
        "AnthropicModel": _model(),
        "AnthropicModels": closed(
            data=array(ref("AnthropicModel")),
            has_more={"const": False},
            first_id=nullable(TEXT),
            last_id=nullable(TEXT),
        ),
        "AnthropicError": closed(type={"const": "error"}, error=error, request_id=REQUEST_ID),
    }


def _own_fields() -> dict[str, Schema]:
    ignored: dict[str, Schema] = {"cache_control": {}, "citations": {}}
    text = with_optional(closed(type={"const": "text"}, text=TEXT), **ignored)
    form = closed(type={"const": "json_schema"}, schema=OBJECT)
    tool = with_optional(
        closed(name=_NAME, input_schema=OBJECT),
        type={"enum": ["custom", None]},
        description=nullable(TEXT),
        cache_control={},
        strict={},
        input_examples={},
        eager_input_streaming={},
        allowed_callers={},
        defer_loading={},
    )
    alone = nullable(BOOLEAN)
    return {
        "messages": array(any_of(*_turns(text))) | {"minItems": 1},
        "top_p": VENDOR_TOP_P,
        "top_k": VENDOR_TOP_K,
        "stop_sequences": stops(UNBOUNDED_STOPS_MAX),
        "system": any_of(TEXT, array(text)),
        "thinking": with_optional(
            closed(type={"enum": ["disabled", "adaptive", "between_tools"]}), display={}
        ),
        "output_config": with_optional(closed(), format=nullable(form), effort={}),
        "context_management": with_optional(closed(), edits=nullable(array(_EDIT))),
        "tools": array(tool) | {"maxItems": TOOLS_MAX},
        "tool_choice": any_of(
            with_optional(closed(type={"enum": ["auto", "any", "none"]}), disable_parallel_tool_use=alone),
            with_optional(closed(type={"const": "tool"}, name=TEXT), disable_parallel_tool_use=alone),
        ),
    }


def _turns(text: Schema) -> tuple[Schema, ...]:
    """A turn of each side; the last must not be the assistant's."""
    use = with_optional(
        closed(type={"const": "tool_use"}, id=_CALL_ID, name=FUNCTION_NAME, input=OBJECT),
        cache_control={},
        caller={},
        toolset_name={},
    )
    result = with_optional(
        closed(type={"const": "tool_result"}, tool_use_id=_CALL_ID),
        content=nullable(any_of(TEXT, array(text))),
        is_error=nullable(BOOLEAN),
        cache_control={},
        toolset_name={},
    )
    thought: Schema = {
        "type": "object",
        "properties": {"type": {"enum": ["thinking", "redacted_thinking"]}},
        "required": ["type"],
    }
    return (
        closed(role={"const": "user"}, content=any_of(TEXT, array(any_of(text, result)))),
        closed(role={"const": "assistant"}, content=any_of(TEXT, array(any_of(text, use, thought)))),
        closed(role={"const": "system"}, content=any_of(TEXT, array(text))),
    )


def _message() -> dict[str, Any]:
    usage = closed(
        input_tokens=COUNT,
        cache_creation_input_tokens=COUNT,
        cache_read_input_tokens=COUNT,
        output_tokens=COUNT,
        output_tokens_details=NULL,
        server_tool_use=NULL,
        cache_creation=NULL,
        inference_geo=NULL,
        service_tier=TEXT,
    )
    use = closed(
        type={"const": "tool_use"}, id=TEXT, name=TEXT, input=OBJECT, caller=closed(type={"const": "direct"})
    )
    return closed(
        id=TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=TEXT,
        content=array(any_of(closed(type={"const": "text"}, text=TEXT, citations={"const": []}), use)),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        stop_sequence=nullable(TEXT),
        stop_details=NULL,
        container=NULL,
        usage=usage,
    )


def _model() -> dict[str, Any]:
    return closed(
        type={"const": "model"},
        id=TEXT,
        display_name=TEXT,
        created_at={"type": "string", "format": "date-time"},
        max_input_tokens=COUNT,
        max_tokens=COUNT,
        capabilities=NULL,
    )
