"""What every part of `/openapi.json` is written with. Owns: what each shared reader reads, as a schema.

Must not know: any path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from services.gateway.core import validation
from services.gateway.core.jobs import Band
from services.gateway.core.params import STOPS_MAX, FormatKind
from services.gateway.http import native_fields as fields
from services.gateway.http.told_calls import NAME_CHARACTERS_MAX

Schema = dict[str, Any]
Reader = Callable[[str, Any], Any]

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "number", "minimum": 0}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
# One of the server-sent events that an answer may be: the document describes each, as there is no whole.
EVENT: Schema = {
    "type": "object",
    "properties": {"event": TEXT, "id": TEXT, "data": TEXT},
    "required": ["data"],
    "description": "Each event; its data is JSON, or the vendor's mark of the end.",
}
FUNCTION_NAME: Schema = {"type": "string", "maxLength": NAME_CHARACTERS_MAX}
TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
# Envoy refuses some requests before they have an id.
REQUEST_ID: Schema = {"type": ["string", "null"]}

# What the vendors' APIs here have in common of their bounds, which are others than the native API's.
VENDOR_TOP_P: Schema = {"type": "number", "minimum": 0, "maximum": 1}
VENDOR_TOP_K: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}

# What the vendors' APIs here have in common of their errors.
VENDOR_ERRORS: Mapping[int, str] = {
    400: "What was sent makes no sense, or is not served; the message names it.",
    401: "The token is missing, or not believed.",
    403: "The token lacks a scope.",
    404: "No such model or path.",
    413: "The body is too large.",
    429: "The queue is full, or the tenant has used what it may.",
    499: "The request was cancelled.",
    503: "Nobody can answer now.",
    504: "The deadline passed.",
}

# Bytes are counted, so that a text of as many characters may be too long all the same.
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": validation.STOP_BYTES_MAX}


def stops(most: int) -> Schema:
    """A stop string, or several."""
    return {"oneOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": most}]}


_TEXT_OF: Mapping[FormatKind, Schema] = {
    kind: {"type": "string", "minLength": 1, "maxLength": limit}
    for kind, limit in validation.FORMAT_BYTES_MAX.items()
}
_FORMATS: Mapping[FormatKind, Any] = {
    FormatKind.JSON_SCHEMA: {"type": ["object", "string"]},
    FormatKind.REGEX: _TEXT_OF[FormatKind.REGEX],
    FormatKind.CHOICE: {
        "type": "array",
        "items": _TEXT_OF[FormatKind.CHOICE],
        "minItems": 1,
        "maxItems": validation.CHOICES_MAX,
    },
    FormatKind.GRAMMAR: _TEXT_OF[FormatKind.GRAMMAR],
}
# What each reader reads that two APIs share, or that reads nothing of its API's own.
_READ: Mapping[Reader, Schema] = {
    fields.read_text: TEXT,
    fields.read_boolean: BOOLEAN,
    fields.read_number: {"type": "number"},
    fields.read_int32: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    fields.read_integer: {"type": "integer"},
    fields.read_map: OBJECT,
    fields.ignore: {},
    fields.read_stop: stops(STOPS_MAX),
    fields.read_logit_bias: {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {
            "type": "number",
            "minimum": -validation.BIAS_MAX,
            "maximum": validation.BIAS_MAX,
        },
        "maxProperties": validation.BIASES_MAX,
    },
    fields.read_format: {
        "type": "object",
        "properties": {kind.value: shape for kind, shape in _FORMATS.items()},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
    fields.read_priority: {"enum": [band.name.lower() for band in Band]},
}
_AT_LEAST_ONE: Schema = {"minimum": 1}
_SCORED: Schema = {"minimum": 0, "maximum": validation.LOGPROBS_MAX}
# The bounds of numbers, which are the same in every API that does not say its own.
_BOUNDS: Mapping[str, Schema] = {
    **{
        # As a person would write it: a bound in single precision has digits that say nothing.
        name: {"minimum" if inclusive else "exclusiveMinimum": float(f"{lowest:g}"), "maximum": highest}
        for name, lowest, inclusive, highest in validation.RANGES
    },
    "max_tokens": _AT_LEAST_ONE,
    "max_completion_tokens": _AT_LEAST_ONE,
    "max_output_tokens": _AT_LEAST_ONE,
    "top_k": _AT_LEAST_ONE,
    "seed": {"minimum": 0, "maximum": 2**64 - 1},
    "n": {"minimum": 1, "maximum": validation.SEQUENCES_MAX},
    "logprobs": _SCORED,
    "top_logprobs": _SCORED,
}


def body(
    read: Mapping[str, Reader], *required: str, own: Mapping[str, Schema] | None = None
) -> dict[str, Any]:
    """A request's body.

    Args:
        read: Its fields with their readers.
        required: The fields that it cannot do without.
        own: What the readers of an API's own read, by field.

    Raises:
        KeyError: A field has a reader of which nothing is known, so that it would be served and not
            described; or one is described and not served.
    """
    own = own or {}
    if unknown := own.keys() - read.keys():
        raise KeyError(*sorted(unknown))
    taken = {name: own[name] if name in own else _read(name, reader) for name, reader in read.items()}
    return {
        "type": "object",
        "properties": {
            name: schema if name in required else nullable(schema) for name, schema in taken.items()
        },
        "required": list(required),
        "additionalProperties": False,
    }


def _read(name: str, reader: Reader) -> Schema:
    """What a shared reader reads, in a field of that name."""
    schema = _READ[reader]
    is_number = schema.get("type") in {"integer", "number"}
    return {**schema, **_BOUNDS.get(name, {})} if is_number else schema


def nullable(schema: Schema) -> Schema:
    """The same, or null: which says what leaving a field out says."""
    return {"anyOf": [schema, NULL]} if schema else schema


def closed(**properties: Schema) -> dict[str, Any]:
    """An object with exactly these properties."""
    return with_optional({"type": "object", "properties": {}, "required": []}, **properties) | {
        "required": list(properties)
    }


def with_optional(schema: Schema, /, **properties: Schema) -> dict[str, Any]:
    """An object that may have these properties as well, and no others."""
    return {**schema, "properties": {**schema["properties"], **properties}, "additionalProperties": False}


def array(items: Schema) -> dict[str, Any]:
    """An array."""
    return {"type": "array", "items": items}


def any_of(*schemas: Schema) -> dict[str, Any]:
    """One of several."""
    return {"anyOf": list(schemas)}


def ref(name: str) -> dict[str, str]:
    """A schema by its name in the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def operation(
    name: str,
    summary: str,
    result: Schema | None,
    errors: Mapping[int, str],
    error: Schema,
    *,
    posted: Schema | None = None,
    streams: bool = False,
) -> dict[str, Any]:
    """One operation.

    Args:
        name: Its id; no other has it.
        summary: What it does.
        result: What 200 answers; None: events alone.
        errors: The other statuses, with what each means.
        error: What those answer.
        posted: The body that it takes; None: none.
        streams: Whether 200 may be server-sent events.
    """
    content: dict[str, Any] = {"application/json": {"schema": result}} if result else {}
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    told = {"application/json": {"schema": error}}
    failed = {str(code): {"description": why, "content": told} for code, why in errors.items()}
    taken = {"required": True, "content": {"application/json": {"schema": posted}}}
    return {
        "operationId": name,
        "summary": summary,
        **({} if posted is None else {"requestBody": taken}),
        "responses": {"200": {"description": "Done.", "content": content}, **failed},
    }


def in_path(name: str, schema: Schema = ID) -> dict[str, Any]:
    """A name in a path."""
    return {"name": name, "in": "path", "required": True, "schema": schema}
