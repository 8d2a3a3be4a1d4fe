"""OpenAI's Responses API. Owns: its bodies and its events. Pure; knows no dispatcher.

A stream is `response.created`, `response.in_progress`, the message that is added and its part, any number of
`response.output_text.delta`, then everything again as done, each call as an item of its own, and
`response.completed` (`response.incomplete` at a limit). One that fails ends with `error`: its `error` field
makes the vendor's clients raise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import InterlockError
from services.gateway.core.events import Finished, FinishReason, Usage
from services.gateway.http import openai
from services.gateway.http.bodies import dump
from services.gateway.http.tool_calls import ToolCall

# What the ids of calls begin with.
CALL_PREFIX = "call_"

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


def response_body(head: Head, text: str, calls: Sequence[ToolCall], finished: Finished) -> bytes:
    """A whole response; beside calls, an empty text is none."""
    return dump(
        _response(head, finished, _output(head, text if text or not calls else None, calls, finished))
    )


@dataclass(slots=True)
class Events:
    """The events of one response, numbered; it keeps the text, which the last of them say again."""

    head: Head
    _text: list[str] = field(default_factory=list)
    _opened: bool = False
    _number: int = 0

    def opening(self) -> bytes:
        """What a stream begins with."""
        response = _response(self.head, None, [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, text: str) -> bytes:
        """Some text; the message begins with the first."""
        begun = b"" if self._opened else self._message_opening()
        self._text.append(text)
        return begun + self._event(
            "response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[]
        )

    def closing(self, finished: Finished, calls: Sequence[ToolCall]) -> bytes:
        """What a stream ends with; its message stays out where there are calls and no text."""
        begun = b"" if self._opened or calls else self._message_opening()
        text = "".join(self._text) if self._opened else None
        items = _output(self.head, text, calls, finished)
        said = b"" if text is None else self._message_done(text, items[0])
        first = len(items) - len(calls)
        for at, call in enumerate(calls):
            said += self._call(first + at, call)
        last = "response.completed" if finished.reason is FinishReason.STOP else "response.incomplete"
        return begun + said + self._event(last, response=_response(self.head, finished, items))

    def _message_opening(self) -> bytes:
        self._opened = True
        return self._event(
            "response.output_item.added", output_index=0, item=_message(self.head, None, "in_progress")
        ) + self._event("response.content_part.added", **self._place, content_index=0, part=_part(""))

    def _message_done(self, text: str, item: Mapping[str, Any]) -> bytes:
        return (
            self._event("response.output_text.done", **self._place, content_index=0, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place, content_index=0, part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=item)
        )

    def _call(self, index: int, call: ToolCall) -> bytes:
        """A whole item that is a call."""
        begun = {**_call(call), "arguments": "", "status": "in_progress"}
        place = {"item_id": begun["id"], "output_index": index}
        told = {"name": call.name, "arguments": call.arguments}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self._event("response.function_call_arguments.done", **place, **told)
            + self._event("response.output_item.done", output_index=index, item=_call(call))
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.head.id}", "output_index": 0}

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return _event(name, {"type": name, "sequence_number": number, **fields})


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    told = json.loads(openai.error_body(error, request_id))["error"]
    plain = {key: told[key] for key in ("code", "message", "param")}
    # Nobody counts any further, so its number need not follow.
    return _event("error", {"type": "error", **plain, "sequence_number": 0, "error": told})


def _response(head: Head, finished: Finished | None, output: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        "output": output,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        **({} if finished is None else {"usage": _usage(finished.usage)}),
        **head.asked,
    }


def _output(
    head: Head, text: str | None, calls: Sequence[ToolCall], finished: Finished
) -> list[dict[str, Any]]:
    """The items of an answer: its message, if it has one, then its calls, which are always whole."""
    cut = finished.reason is FinishReason.LENGTH and not calls
    message = [] if text is None else [_message(head, text, "incomplete" if cut else "completed")]
    return [*message, *map(_call, calls)]


def _message(head: Head, text: str | None, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{head.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if text is None else [_part(text)],
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        # The item and the call have names of their own.
        "id": f"fc_{call.id.removeprefix(CALL_PREFIX)}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
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
    return b"event: %s\ndata: %s\n\n" % (name.encode(), dump(fields))
