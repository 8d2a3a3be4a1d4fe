"""The Anthropic API. Owns: its bodies, its events and its errors, both ways. Pure; knows no dispatcher.

A stream is `message_start`, `ping`, then for each block of the message `content_block_start`, any number of
`content_block_delta` and `content_block_stop`, and at last `message_delta` and `message_stop`. One that fails
ends with `error` instead, and never with `message_stop`. `input_tokens` are those that no cache
had, as the vendor counts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from services.common import http_errors
from services.common.errors import ContextExceeded, InterlockError
from services.gateway.core.events import Finished, FinishReason, Usage
from services.gateway.http.bodies import dump
from services.gateway.http.tool_calls import ToolCall

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


def message_body(
    message_id: str, model: str, text: str, calls: Sequence[ToolCall], finished: Finished
) -> bytes:
    """A whole message."""
    content = [_text_block(text)] if text or not calls else []
    content += [{**_call_block(call), "input": json.loads(call.arguments)} for call in calls]
    ending = {"content": content, **_ending(finished, calls=bool(calls)), "usage": _usage(finished.usage)}
    return dump({**_message(message_id, model), **ending})


def opening_events(message_id: str, model: str, prompt_tokens: int) -> bytes:
    """What a stream begins with; how much of the prompt a cache had is not known yet."""
    message = {**_message(message_id, model), "usage": _usage(Usage(prompt_tokens=prompt_tokens))}
    return _event("message_start", message=message) + _event("ping")


def text_opening() -> bytes:
    """The text's block, which is the first of all."""
    return _event("content_block_start", index=0, content_block=_text_block(""))


def text_event(text: str) -> bytes:
    """Some text."""
    return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def text_closing() -> bytes:
    """The end of the text's block."""
    return _event("content_block_stop", index=0)


def call_events(index: int, call: ToolCall) -> bytes:
    """A whole block that is a call."""
    delta = {"type": "input_json_delta", "partial_json": call.arguments}
    return (
        _event("content_block_start", index=index, content_block=_call_block(call))
        + _event("content_block_delta", index=index, delta=delta)
        + _event("content_block_stop", index=index)
    )


def closing_events(finished: Finished, *, calls: bool) -> bytes:
    """What a stream ends with."""
    usage = _usage(finished.usage)
    for name in ("cache_creation", "inference_geo", "service_tier"):
        del usage[name]
    return _event("message_delta", delta=_ending(finished, calls=calls), usage=usage) + _event("message_stop")


def models_body(models: Sequence[tuple[str, int]]) -> bytes:
    """The models with their context lengths; all of them are one page."""
    names = [name for name, _ in models]
    ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
    return dump({"data": [_model(*model) for model in models], "has_more": False, **ends})


def model_body(name: str, context_tokens: int) -> bytes:
    """One model."""
    return dump(_model(name, context_tokens))


def count_body(prompt_tokens: int) -> bytes:
    """The size of a conversation."""
    return dump({"input_tokens": prompt_tokens})


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error."""
    return _STATUS_BY_REASON.get(error.reason, http_errors.status_of(error))


def headers(request_id: str) -> tuple[tuple[str, str], ...]:
    """The name by which the vendor's clients know a request."""
    return (("request-id", request_id),)


def error_body(error: InterlockError, request_id: str) -> bytes:
    """The reply of a request that failed before its first byte."""
    return dump(_error(error, request_id))


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"event: error\ndata: %s\n\n" % error_body(error, request_id)


def _error(error: InterlockError, request_id: str) -> dict[str, Any]:
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 499 else "api_error")
    message = _beyond_context(error) if isinstance(error, ContextExceeded) else error.message
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _beyond_context(error: ContextExceeded) -> str:
    """What does not fit, as the vendor says it: there is no code, and clients read these words."""
    prompt, context = error.prompt_tokens, error.context_tokens
    if not context:
        return error.message
    if error.max_tokens is None:
        # One token at least is the answer's.
        return f"prompt is too long: {prompt} tokens > {context - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt} + {error.max_tokens} > {context}, "
        "decrease input length or `max_tokens` and try again"
    )


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


def _model(name: str, context_tokens: int) -> dict[str, Any]:
    """A model; when it was made nobody here knows, and its output has the context's bound alone."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "max_input_tokens": context_tokens,
        "max_tokens": context_tokens,
        "capabilities": None,
    }


def _text_block(text: str) -> dict[str, Any]:
    # Not null: clients exist that take none here. The vendor's schema wants the key.
    return {"type": "text", "text": text, "citations": []}


def _call_block(call: ToolCall) -> dict[str, Any]:
    """A call whose arguments are still to come."""
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}, "caller": {"type": "direct"}}


def _ending(finished: Finished, *, calls: bool) -> dict[str, Any]:
    reason = "stop_sequence" if finished.stop_text else _STOP_REASONS[finished.reason]
    if calls:
        reason = "tool_use"
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
    return b"event: %s\ndata: %s\n\n" % (name.encode(), dump({"type": name, **fields}))
