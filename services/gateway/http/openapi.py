"""The description of the HTTP API. Owns: what `/openapi.json` says, and of it the native paths.

Made of the readers that read the fields, so that a field cannot be served and not described.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.gateway.core import validation
from services.gateway.core.events import FinishReason
from services.gateway.http import native_fields, openapi_admin, openapi_anthropic, openapi_openai
from services.gateway.http.openapi_parts import (
    BOOLEAN,
    COUNT,
    ID,
    REQUEST_ID,
    SECONDS,
    TEXT,
    TOKEN_ID,
    Schema,
    any_of,
    array,
    body,
    closed,
    in_path,
    operation,
    ref,
    with_optional,
)

ERRORS: Mapping[int, str] = {
    400: "What was sent makes no sense; the message names it.",
    401: "The token is missing, or not believed.",
    403: "The token lacks a scope.",
    404: "No such model, request or path.",
    409: "The request's id stands for something else.",
    413: "The body is too large.",
    429: "The queue is full, or the tenant has used what it may.",
    499: "The request was cancelled.",
    501: "A known field has a value that is not served.",
    503: "Nobody can answer now.",
    504: "The deadline passed.",
}


_TURN = closed(role=TEXT | {"minLength": 1}, content=TEXT)
# What a request is about: exactly one of these.
_PROMPTS: Mapping[str, Schema] = {
    "text": TEXT | {"minLength": 1},
    "messages": array(_TURN) | {"minItems": 1, "maxItems": validation.MESSAGES_MAX},
    "tokens": array(TOKEN_ID) | {"minItems": 1},
}


def document() -> dict[str, Any]:
    """The whole description."""
    own = {
        "Request": any_of(*(_request(one) for one in _PROMPTS)),
        "Result": _result(),
        "Cancelled": closed(request_id=ID, cancelled=BOOLEAN),
        "Status": closed(status={"enum": ["alive", "ready"]}),
        "Error": closed(error=_error()),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Interlock", "version": "1", "description": "The HTTP API of a mesh."},
        "security": [{"bearer": []}],
        "paths": {**_paths(), **_vendors_paths(), **openapi_admin.paths()},
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": {
                **own,
                **openapi_openai.schemas(),
                **openapi_anthropic.schemas(),
                **openapi_admin.schemas(),
            },
        },
    }


def _paths() -> dict[str, Any]:
    cursor = {
        "name": "last-event-id",
        "in": "header",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    }
    posted = ref("Request")
    generate = _operation("generate", "Generates.", ref("Result"), posted=posted, streams=True)
    resume = _operation("resume", "Goes on with a resumable request.", None, streams=True)
    resume["responses"]["204"] = {"description": "The last event was the last one."}
    cancel = _operation("cancel", "Ends a request.", ref("Cancelled"))
    return {
        "/v1/generate": {"post": generate},
        "/v1/generate/{request_id}": {
            "parameters": [in_path("request_id")],
            "get": resume | {"parameters": [cursor]},
            "delete": cancel,
        },
        "/healthz": {"get": _open_operation("healthz", "The process answers.")},
        "/readyz": {"get": _open_operation("readyz", "A request can be answered.")},
    }


def _vendors_paths() -> dict[str, Any]:
    """The vendors' paths; where both have one, a header that only one sends decides whose it is."""
    asked = {"name": "anthropic-version", "in": "header", "schema": TEXT}
    error = any_of(ref("OpenAiError"), ref("AnthropicError"))
    models = any_of(ref("OpenAiModels"), ref("AnthropicModels"))
    model = any_of(ref("OpenAiModel"), ref("AnthropicModel"))
    listed = operation("listModels", "The models that can be asked.", models, ERRORS, error)
    one = operation("getModel", "One model.", model, ERRORS, error)
    return {
        **openapi_openai.paths(),
        **openapi_anthropic.paths(),
        "/v1/models": {"get": listed | {"parameters": [asked]}},
        "/v1/models/{model}": {"parameters": [in_path("model")], "get": one | {"parameters": [asked]}},
    }


def _operation(
    name: str, summary: str, result: Schema | None, *, posted: Schema | None = None, streams: bool = False
) -> dict[str, Any]:
    return operation(name, summary, result, ERRORS, ref("Error"), posted=posted, streams=streams)


def _open_operation(name: str, summary: str) -> dict[str, Any]:
    """One that needs no token."""
    return _operation(name, summary, ref("Status")) | {"security": []}


def _request(prompt: str) -> dict[str, Any]:
    """A request whose prompt is in one of the fields that can hold it; the others say nothing."""
    others = _PROMPTS.keys() - {prompt}
    read = {name: reader for name, reader in native_fields.FIELDS.items() if name not in others}
    return body(read, prompt, own={prompt: _PROMPTS[prompt], "request_id": ID})


def _result() -> dict[str, Any]:
    usage = closed(prompt_tokens=COUNT, cached_prompt_tokens=COUNT, completion_tokens=COUNT)
    timings = closed(queue_s=SECONDS, prefill_s=SECONDS, decode_s=SECONDS, total_s=SECONDS)
    result = closed(
        result=TEXT,
        request_id=ID,
        model=TEXT,
        revision=TEXT,
        finish_reason={"enum": [reason.value for reason in FinishReason]},
        usage=usage,
        timings=timings,
    )
    # More may come with what was asked for: scores, further sequences.
    return result | {"additionalProperties": True}


def _error() -> dict[str, Any]:
    error = closed(code=TEXT, reason=TEXT, message=TEXT, request_id=REQUEST_ID)
    return with_optional(error, retry_after_ms=COUNT)


BODY = json.dumps(document()).encode()
