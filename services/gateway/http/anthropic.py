"""The Anthropic API. Owns: its bodies, its events and its errors, both ways. Pure; knows no dispatcher.

A stream is `message_start`, `content_block_start`, `ping`, any number of `content_block_delta`, then
`content_block_stop`, `message_delta`, `message_stop`. One that fails ends with `error` instead, and never
with `message_stop`. `input_tokens` are those that no cache had, as the vendor counts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.common import http_errors
from services.common.errors import InterlockError
from services.gateway.core.events import Finished, FinishReason, Usage

# Where the vendor has another status than the native API.
_STATUS_BY_REASON = {"QUEUE_FULL": 529, "FEATURE_UNSUPPORTED": 400}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens"}


def message_body(message_id: str, model: str, text: str, finished: Finished) -> bytes:
    """A whole message."""
    content = [{"type": "text", "text": text, "citations": None}]
    ending = {"content": content, **_ending(finished), "usage": _usage(finished.usage)}
    return _dump({**_message(message_id, model), **ending})


def opening_events(message_id: str, model: str, prompt_tokens: int) -> bytes:
    """What a stream begins with; how much of the prompt a cache had is not known yet."""
    message = {**_message(message_id, model), "usage": _usage(Usage(prompt_tokens=prompt_tokens))}
    block = {"type": "text", "text": "", "citations": None}
    return (
        _event("message_start", message=message)
        + _event("content_block_start", index=0, content_block=block)
        + _event("ping")
    )


def text_event(text: str) -> bytes:
    """Some text."""
    return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def closing_events(finished: Finished) -> bytes:
    """What a stream ends with."""
    usage = _usage(finished.usage)
    for name in ("cache_creation", "inference_geo", "service_tier"):
        del usage[name]
    return (
        _event("content_block_stop", index=0)
        + _event("message_delta", delta=_ending(finished), usage=usage)
        + _event("message_stop")
    )


def heartbeat_body() -> bytes:
    """A comment that keeps a waiting connection from looking dead."""
    return b": waiting\n\n"


def count_body(prompt_tokens: int) -> bytes:
    """The size of a conversation."""
    return _dump({"input_tokens": prompt_tokens})


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error."""
    return _STATUS_BY_REASON.get(error.reason, http_errors.status_of(error))


def headers(request_id: str) -> tuple[tuple[str, str], ...]:
    """The name by which the vendor's clients know a request."""
    return (("request-id", request_id),)


def error_body(error: InterlockError, request_id: str) -> bytes:
    """The reply of a request that failed before its first byte."""
    return _dump(_error(error, request_id))


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"event: error\ndata: %s\n\n" % error_body(error, request_id)


def _error(error: InterlockError, request_id: str) -> dict[str, Any]:
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 499 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def _message(message_id: str, model: str) -> dict[str, Any]:
    """A message of which nothing is said yet."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def _ending(finished: Finished) -> dict[str, Any]:
    reason = "stop_sequence" if finished.stop_text else _STOP_REASONS[finished.reason]
    return {
        "stop_reason": reason,
        "stop_sequence": finished.stop_text or None,
        "stop_details": None,
        "container": None,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": None,
        "server_tool_use": None,
        "cache_creation": None,
        "inference_geo": None,
        "service_tier": "standard",
    }


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _dump({"type": name, **fields}))


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
