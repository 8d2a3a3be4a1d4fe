"""The description of the gateway's own HTTP API. Owns: what `/openapi.json` says.

Made of the readers that read the fields, so that a field cannot be served and not described. The vendors'
paths are described by the vendors; the admin paths by `interlock.v1`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from services.gateway.core.events import FinishReason
from services.gateway.core.jobs import Band
from services.gateway.core.params import FormatKind
from services.gateway.http import native_fields as fields

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_SECONDS = {"type": "number", "minimum": 0}
_ID = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_FORMATS: Mapping[FormatKind, Any] = {
    FormatKind.JSON_SCHEMA: {"type": ["object", "string"]},
    FormatKind.REGEX: _TEXT,
    FormatKind.CHOICE: {"type": "array", "items": _TEXT},
    FormatKind.GRAMMAR: _TEXT,
}
# What each reader reads; one without an entry stops the start.
_READ: Mapping[Callable[[str, Any], Any], Any] = {
    fields.read_text: _TEXT,
    fields.read_boolean: {"type": "boolean"},
    fields.read_number: {"type": "number"},
    fields.read_int32: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    fields.read_integer: {"type": "integer"},
    fields.read_stop: {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]},
    fields.read_token_ids: {"type": "array", "items": _TOKEN_ID},
    fields.read_messages: {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"role": _TEXT, "content": _TEXT},
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
    fields.read_logit_bias: {"type": "object", "additionalProperties": {"type": "number"}},
    fields.read_format: {
        "type": "object",
        "properties": {kind.value: shape for kind, shape in _FORMATS.items()},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
    fields.read_priority: {"enum": [band.name.lower() for band in Band]},
}


def document() -> dict[str, Any]:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Interlock", "version": "1", "description": "The native HTTP API of a mesh."},
        "security": [{"bearer": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": {
                "Request": _request(),
                "Result": _result(),
                "Cancelled": _closed(request_id=_ID, cancelled={"type": "boolean"}),
                "Status": _closed(status={"enum": ["alive", "ready"]}),
                "Error": _closed(error=_error()),
            },
        },
    }


def _paths() -> dict[str, Any]:
    generate = {
        "post": _operation("generate", "Generates.", _ref("Result"), streams=True)
        | {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Request")}}}}
    }
    named = {"name": "request_id", "in": "path", "required": True, "schema": _ID}
    cursor = {
        "name": "last-event-id",
        "in": "header",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    }
    resume = _operation("resume", "Goes on with a resumable request.", None, streams=True)
    cancel = _operation("cancel", "Ends a request.", _ref("Cancelled"))
    return {
        "/v1/generate": generate,
        "/v1/generate/{request_id}": {
            "parameters": [named],
            "get": resume | {"parameters": [cursor]},
            "delete": cancel,
        },
        "/healthz": {"get": _operation("healthz", "The process answers.", _ref("Status")) | {"security": []}},
        "/readyz": {
            "get": _operation("readyz", "A request can be answered.", _ref("Status")) | {"security": []}
        },
    }


def _open_operation(name: str, summary: str) -> dict[str, Any]:
    """One that needs no token."""
    return _operation(name, summary, _ref("Status")) | {"security": []}


def _operation(name: str, summary: str, result: Any, *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": result}} if result else {}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    errors = {
        "400": "What was sent makes no sense; the message names it.",
        "401": "The token is missing, or not believed.",
        "403": "The token lacks a scope.",
        "404": "No such model, request or path.",
        "409": "The request's id stands for something else.",
        "413": "The body is too large.",
        "429": "The queue is full, or the tenant has used what it may.",
        "499": "The request was cancelled.",
        "501": "A known field has a value that is not served.",
        "503": "Nobody can answer now.",
        "504": "The deadline passed.",
    }
    told = {"application/json": {"schema": _ref("Error")}}
    responses = {code: {"description": why, "content": told} for code, why in errors.items()}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": content}, **responses},
    }


def _request() -> dict[str, Any]:
    # JSON's null says what leaving a field out says.
    return {
        "type": "object",
        "properties": {
            name: {"anyOf": [_READ[read], {"type": "null"}]} for name, read in fields.FIELDS.items()
        },
        "additionalProperties": False,
    }


def _result() -> dict[str, Any]:
    usage = _closed(prompt_tokens=_COUNT, cached_prompt_tokens=_COUNT, completion_tokens=_COUNT)
    timings = _closed(queue_s=_SECONDS, prefill_s=_SECONDS, decode_s=_SECONDS, total_s=_SECONDS)
    result = _closed(
        result=_TEXT,
        request_id=_ID,
        model=_TEXT,
        revision=_TEXT,
        finish_reason={"enum": [reason.value for reason in FinishReason]},
        usage=usage,
        timings=timings,
    )
    # More may come with what was asked for: scores, further sequences.
    return result | {"additionalProperties": True}


def _error() -> dict[str, Any]:
    # Envoy refuses some requests before they have an id.
    error = _closed(code=_TEXT, reason=_TEXT, message=_TEXT, request_id={"type": ["string", "null"]})
    return {**error, "properties": {**error["properties"], "retry_after_ms": _COUNT}}


def _closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


BODY = json.dumps(document()).encode()
