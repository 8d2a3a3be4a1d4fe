"""Envoy's own replies. Owns: their shape, which is that of the API that was asked, and what they may say.

What reaches a gateway is answered by it; these are for what does not: unknown paths, bodies that are too
large, a mesh that is away. A client's library finds the error where it looks for it, and nothing internal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deploy.envoy.routes import BODY_BYTES_MAX

# Paths of the two vendors' APIs, also those that are not served, as far as Envoy's bound of a regular
# expression goes; every other path is ours.
_OPENAI = "/v1/(chat|completions|responses|models|embeddings|moderations|images|audio|files)([/?].*)?"
_ANTHROPIC = "/v1/(messages|complete)([/?].*)?"
# Both have these, and one vendor's clients always name their version.
_SHARED = "/v1/(models|files)([/?].*)?"
_ANTHROPIC_VERSION = {"header_filter": {"header": {"name": "anthropic-version", "present_match": True}}}

BAD_MESSAGE = "The request is not valid HTTP for this path, or its query names a field of the path."
HEADERS_MESSAGE = "The headers are too large or too many."


@dataclass(frozen=True, slots=True)
class _Reply:
    """What one status means.

    Attributes:
        status: Of HTTP.
        code: Of gRPC, for the native API.
        reason: Of `ErrorReason`, without its prefix.
        openai, anthropic: The vendors' names for the kind of error.
        message: For people.
    """

    status: int
    code: str
    reason: str
    openai: str
    anthropic: str
    message: str


_BAD, _OAI_BAD, _ANT_BAD = "INVALID_ARGUMENT", "invalid_request_error", "invalid_request_error"
_REPLIES = (
    _Reply(400, _BAD, "ARGUMENT_INVALID", _OAI_BAD, _ANT_BAD, BAD_MESSAGE),
    _Reply(
        403, "PERMISSION_DENIED", "UNSPECIFIED", _OAI_BAD, "permission_error", "The request is not allowed."
    ),
    _Reply(
        404, "NOT_FOUND", "UNSPECIFIED", _OAI_BAD, "not_found_error", "No such path, or not with this method."
    ),
    _Reply(405, "UNIMPLEMENTED", "UNSPECIFIED", _OAI_BAD, _ANT_BAD, "The path does not have this method."),
    _Reply(
        408,
        "DEADLINE_EXCEEDED",
        "DEADLINE_EXCEEDED",
        "timeout",
        "timeout_error",
        "The request did not arrive in time.",
    ),
    _Reply(
        413,
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
        _OAI_BAD,
        "request_too_large",
        f"The body is larger than {BODY_BYTES_MAX} bytes.",
    ),
    _Reply(
        415,
        _BAD,
        "ARGUMENT_INVALID",
        _OAI_BAD,
        _ANT_BAD,
        "The content type is not supported; send application/json.",
    ),
    _Reply(
        429,
        "RESOURCE_EXHAUSTED",
        "UNSPECIFIED",
        "rate_limit_exceeded",
        "rate_limit_error",
        "Too many requests; try again later.",
    ),
    _Reply(431, _BAD, "ARGUMENT_INVALID", _OAI_BAD, _ANT_BAD, HEADERS_MESSAGE),
    _Reply(
        502,
        "UNAVAILABLE",
        "UNSPECIFIED",
        "server_error",
        "api_error",
        "The mesh gave no usable answer; try again.",
    ),
    _Reply(
        503,
        "UNAVAILABLE",
        "UNSPECIFIED",
        "server_error",
        "api_error",
        "The mesh cannot answer now; try again in a moment.",
    ),
    _Reply(
        504,
        "DEADLINE_EXCEEDED",
        "DEADLINE_EXCEEDED",
        "server_error",
        "timeout_error",
        "The mesh did not answer in time.",
    ),
)

# Who asked by HTTP: without gRPC's content type (an absent one counts as empty), or with the path that the
# transcoder keeps when it makes a gRPC call of a request.
_FROM_HTTP = [
    {
        "header_filter": {
            "header": {
                "name": "content-type",
                "string_match": {"prefix": "application/grpc"},
                "invert_match": True,
                "treat_missing_header_as_empty": True,
            }
        }
    },
    {"header_filter": {"header": {"name": "x-envoy-original-path", "present_match": True}}},
]


def mappers() -> list[dict[str, Any]]:
    """Of one status the first that matches is taken: a vendor's path before every other one."""
    found = []
    is_shared = {"or_filter": {"filters": _on_paths(_SHARED)}}
    by_version = [{"and_filter": {"filters": [_ANTHROPIC_VERSION, is_shared]}}]
    for reply in _REPLIES:
        found.append(_mapper(reply, [*_on_paths(_ANTHROPIC), *by_version], _anthropic(reply)))
        found.append(_mapper(reply, _on_paths(_OPENAI), _openai(reply)))
        found.append(_mapper(reply, _FROM_HTTP, _native(reply)))
    # gRPC calls match none of these, and keep a plain message; in two cases Envoy's status, UNKNOWN, would
    # mislead: a gateway tells a message that is too large by RESOURCE_EXHAUSTED, and what is late is late.
    found += [_told_to_grpc(413, 8), _told_to_grpc(408, 4)]
    return found


def _on_paths(regex: str) -> list[dict[str, Any]]:
    """The path as it was asked for, whether or not it was transcoded."""
    return [
        {"header_filter": {"header": {"name": name, "string_match": {"safe_regex": {"regex": regex}}}}}
        for name in (":path", "x-envoy-original-path")
    ]


def _told_to_grpc(status: int, code: int) -> dict[str, Any]:
    return {"filter": _is_status(status), "headers_to_add": [_header("grpc-status", str(code))]}


def _mapper(reply: _Reply, conditions: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    return {
        "filter": {
            "and_filter": {"filters": [_is_status(reply.status), {"or_filter": {"filters": conditions}}]}
        },
        "headers_to_add": [_header("x-request-id", "%REQ(X-REQUEST-ID)%")],
        "body_format_override": {**body, "content_type": "application/json"},
    }


def _is_status(status: int) -> dict[str, Any]:
    # The runtime key is required; nothing sets it.
    value = {"default_value": status, "runtime_key": "interlock.none"}
    return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _native(reply: _Reply) -> dict[str, Any]:
    error = {
        "code": reply.code,
        "reason": f"ERROR_REASON_{reply.reason}",
        "message": reply.message,
        "request_id": "%REQ(X-REQUEST-ID)%",
    }
    return {"json_format": {"error": error}}


def _openai(reply: _Reply) -> dict[str, Any]:
    # As text, which holds nothing of the request: Envoy's JSON has no null.
    error = {"message": reply.message, "type": reply.openai, "param": None, "code": None}
    return {"text_format_source": {"inline_string": json.dumps({"error": error})}}


def _anthropic(reply: _Reply) -> dict[str, Any]:
    error = {"type": reply.anthropic, "message": reply.message}
    return {"json_format": {"type": "error", "error": error, "request_id": "%REQ(X-REQUEST-ID)%"}}
