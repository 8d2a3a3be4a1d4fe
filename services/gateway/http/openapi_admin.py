"""The admin paths of `/openapi.json`. Owns: how the protos' descriptors read as a description of JSON.

Paths and methods are those that Envoy maps, and the messages are `interlock.v1`'s, so that none can be served
and not described. Must not know: the controller, which answers these paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor
from interlock.http.v1 import http_service_pb2
from interlock.v1 import controller_service_pb2, rollout_pb2

from services.gateway.http.openapi_parts import (
    BOOLEAN,
    TEXT,
    Schema,
    array,
    closed,
    in_path,
    nullable,
    operation,
    ref,
    with_optional,
)

_ADMIN = http_service_pb2.DESCRIPTOR.services_by_name["AdminHttpService"]
_CONTROLLER = controller_service_pb2.DESCRIPTOR.services_by_name["ControllerService"]
# What is posted, where something of it is read.
_POSTED: Mapping[str, Descriptor] = {
    "CreateRollout": rollout_pb2.RolloutSpec.DESCRIPTOR,
    "ForceBreaker": controller_service_pb2.ForceBreakerRequest.DESCRIPTOR,
    "RevokeToken": controller_service_pb2.RevokeTokenRequest.DESCRIPTOR,
}
# Of whom a model must be named in the query; for others it is a choice.
_NEEDED = frozenset({"ListRevisions"})
_ERRORS: Mapping[int, str] = {
    400: "What was sent makes no sense; the message names it.",
    401: "The token is missing, or not believed.",
    403: "The token lacks a scope.",
    404: "No such model, revision, rollout, worker, breaker or path.",
    409: "It exists already, or something else is under way.",
    412: "Not now: the message says what must come first.",
    413: "The body is too large.",
    429: "Too much at once.",
    501: "It is known, and not served.",
    503: "The controller cannot answer now.",
    504: "The deadline passed.",
}
# Names are in paths as they are; the first of them is no path of its own.
_NAMES: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"}
_IN_PATH = re.compile(r"\{(\w+)\}")
_DURATION: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"}
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": _DURATION,
}
_LONG: Schema = {"type": "string", "pattern": "^-?[0-9]+$"}
_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BOOL: BOOLEAN,
    FieldDescriptor.TYPE_INT32: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    # JSON's numbers do not hold 64 bits everywhere.
    FieldDescriptor.TYPE_INT64: _LONG,
    FieldDescriptor.TYPE_UINT64: _LONG,
}


def paths() -> dict[str, Any]:
    """Every path of the AdminHttpService."""
    found: dict[str, Any] = {}
    for method in _ADMIN.methods:
        verb, path = _binding(method)
        entry = found.setdefault(path, {"parameters": [in_path(name, _NAMES) for name in _names(path)]})
        entry[verb] = _operation(method, path)
    return found


def schemas() -> dict[str, Any]:
    """The messages that the paths take and answer, by name."""
    answered: dict[str, Descriptor] = {}
    for method in _ADMIN.methods:
        _collect(_answer(method), answered)
    taken = {f"{message.name}Body": _taken(message) for message in _POSTED.values()}
    return {**{name: _message(message) for name, message in answered.items()}, **taken}


def _operation(method: MethodDescriptor, path: str) -> dict[str, Any]:
    name, posted = method.name, _POSTED.get(method.name)
    watches = _CONTROLLER.methods_by_name[name].server_streaming
    made = operation(
        f"admin{name}",
        f"{name} of the ControllerService.",
        None if watches else ref(_answer(method).name),
        _ERRORS,
        ref("Error"),
        posted=None if posted is None else ref(f"{posted.name}Body"),
        streams=watches,
    )
    asked = [
        {"name": field.name, "in": "query", "schema": _NAMES, "required": name in _NEEDED}
        for field in method.input_type.fields
        if method.input_type.file is _ADMIN.file
        and field.type == FieldDescriptor.TYPE_STRING
        and field.name not in _names(path)
    ]
    return made | ({"parameters": asked} if asked else {})


def _binding(method: MethodDescriptor) -> tuple[str, str]:
    """Method and path in HTTP."""
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    return verb, getattr(rule, verb)


def _names(path: str) -> list[str]:
    return _IN_PATH.findall(path)


def _answer(method: MethodDescriptor) -> Descriptor:
    return _CONTROLLER.methods_by_name[method.name].output_type


def _collect(message: Descriptor, found: dict[str, Descriptor]) -> None:
    """Adds a message and those within it."""
    if message.full_name in _WELL_KNOWN or message.name in found:
        return
    found[message.name] = message
    for field in message.fields:
        if field.message_type is not None:
            _collect(field.message_type, found)


def _message(message: Descriptor) -> dict[str, Any]:
    """A message as it is answered: what has no presence is always there."""
    always = {field.name: _field(field) for field in message.fields if not field.has_presence}
    return with_optional(closed(**always), **_fields(f for f in message.fields if f.has_presence))


def _taken(message: Descriptor) -> dict[str, Any]:
    """A message as it is posted: null says what leaving a field out says."""
    return with_optional(closed(), **{name: nullable(one) for name, one in _fields(message.fields).items()})


def _fields(fields: Iterable[FieldDescriptor]) -> dict[str, Schema]:
    return {field.name: _field(field) for field in fields}


def _field(field: FieldDescriptor) -> Schema:
    message = field.message_type
    if message is not None:
        one: Schema = _WELL_KNOWN.get(message.full_name) or ref(message.name)
    else:
        one = _enum(field.enum_type) if field.enum_type is not None else _SCALARS[field.type]
    return array(one) if field.is_repeated else one


def _enum(kind: EnumDescriptor) -> Schema:
    return {"enum": [value.name for value in kind.values]}
