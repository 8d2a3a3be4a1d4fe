"""OpenAI's Responses API. Owns: its bodies and its events. Pure; knows no dispatcher.

A stream is `response.created`, `response.in_progress`, the message that is added and its part, any number of
`response.output_text.delta`, then everything again as done, and `response.completed` (`response.incomplete`
at a limit). One that fails ends with `error`: its `error` field makes the vendor's clients raise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import InterlockError
from services.gateway.core.events import Finished, FinishReason, Usage
from services.gateway.http import openai

heartbeat_body = openai.heartbeat_body
status_of = openai.status_of
headers = openai.headers
error_body = openai.error_body


@dataclass(frozen=True, slots=True)
class Head:
    """What every body of one response says.

    Attributes:
        id: Names the request; the response and its message are called after it.
        created_s: When it was asked for, in seconds since the epoch.
        model: The model that answers.
        asked: The fields of the request that a response repeats.
    """

    id: str
    created_s: int
    model: str
    asked: Mapping[str, Any]


def response_body(head: Head, text: str, finished: Finished) -> bytes:
    """A whole response."""
    return _dump(_response(head, text, finished))


@dataclass(slots=True)
class Events:
    """The events of one response, numbered; it keeps the text, which the last of them say again."""

    head: Head
    _text: list[str] = field(default_factory=list)
    _number: int = 0

    def opening(self) -> bytes:
        """What a stream begins with."""
        response = _response(self.head, "", None)
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=_message(self.head, None, None))
            + self._event("response.content_part.added", **self._place, content_index=0, part=_part(""))
        )

    def delta(self, text: str) -> bytes:
        """Some text."""
        self._text.append(text)
        return self._event(
            "response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[]
        )

    def closing(self, finished: Finished) -> bytes:
        """What a stream ends with."""
        text = "".join(self._text)
        last = "response.completed" if finished.reason is FinishReason.STOP else "response.incomplete"
        return (
            self._event("response.output_text.done", **self._place, content_index=0, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place, content_index=0, part=_part(text))
            + self._event(
                "response.output_item.done", output_index=0, item=_message(self.head, text, finished)
            )
            + self._event(last, response=_response(self.head, text, finished))
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.head.id}", "output_index": 0}

    def _event(self, name: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return _event(name, {"type": name, "sequence_number": number, **fields})


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    told = json.loads(openai.error_body(error, request_id))["error"]
    plain = {key: told[key] for key in ("code", "message", "param")}
    # Nobody counts any further, so its number need not follow.
    return _event("error", {"type": "error", **plain, "sequence_number": 0, "error": told})


def _response(head: Head, text: str, finished: Finished | None) -> dict[str, Any]:
    at_limit = finished is not None and finished.reason is FinishReason.LENGTH
    status = "in_progress" if finished is None else "incomplete" if at_limit else "completed"
    return {
        "id": f"resp_{head.id}",
        "object": "response",
        "created_at": head.created_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if at_limit else None,
        "model": head.model,
        "output": [] if finished is None else [_message(head, text, finished)],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        **({} if finished is None else {"usage": _usage(finished.usage)}),
        **head.asked,
    }


def _message(head: Head, text: str | None, finished: Finished | None) -> dict[str, Any]:
    at_limit = finished is not None and finished.reason is FinishReason.LENGTH
    status = "in_progress" if finished is None else "incomplete" if at_limit else "completed"
    content = [] if text is None else [_part(text)]
    return {
        "id": f"msg_{head.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _event(name: str, fields: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _dump(fields))


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
