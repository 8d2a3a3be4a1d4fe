"""The native HTTP API. Owns: its JSON, both ways. Pure; knows neither gRPC nor the dispatcher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from services.common import http_errors
from services.common.errors import ArgumentInvalid, InterlockError
from services.gateway.core.events import Chunk, Event, Finished, Queued, Started, Timings, Usage
from services.gateway.core.jobs import Band
from services.gateway.core.params import (
    ChatPrompt,
    GenerationRequest,
    Message,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.http.strict_json import read_object, shown

JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class NativeRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether events are wanted rather than one result.
    """

    generation: GenerationRequest
    stream: bool


def read_request(body: bytes, content_type: str) -> NativeRequest:
    """Returns what a body asks for.

    Raises:
        MessageTooLarge: The body is longer than the server reads.
        ArgumentInvalid: It is not JSON, or a field is unknown or of the wrong type; the message names it.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in {"", JSON_TYPE}:
        raise ArgumentInvalid(f"content-type: must be {JSON_TYPE}.")
    fields = read_object(body)
    for name in fields:
        if name not in _FIELDS:
            raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
    # JSON's null says what leaving the field out says.
    read = {name: _FIELDS[name](name, value) for name, value in fields.items() if value is not None}
    generation = GenerationRequest(
        request_id=read.get("request_id"),
        model=read.get("model"),
        prompt=_prompt(read),
        max_tokens=read.get("max_tokens"),
        sampling=SamplingParams(**{name: read[name] for name in _SAMPLING if name in read}),
        stop=read.get("stop", ()),
        logprobs=read.get("logprobs"),
        n=read.get("n"),
        formatted="format" in read,
        priority=read.get("priority", 0),
        resumable=read.get("resumable", False),
    )
    return NativeRequest(generation, stream=read.get("stream", False))


def result_body(text: str, started: Started, finished: Finished) -> bytes:
    """The one reply to a request that does not stream."""
    return _dump(
        {
            "result": text,
            "request_id": started.request_id,
            "model": started.model,
            "revision": started.revision,
            **_finished_fields(finished),
        }
    )


def event_body(cursor: int, event: Event) -> bytes:
    """One server-sent event."""
    name, fields = _event_fields(event)
    data = _dump({"cursor": cursor, name: fields})
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (cursor, name.encode(), data)


def heartbeat_body() -> bytes:
    """A comment that keeps a waiting connection from looking dead."""
    return b": waiting\n\n"


def error_body(error: InterlockError, request_id: str) -> bytes:
    """The reply of a request that failed before its first byte."""
    return _dump({"error": http_errors.fields(error, request_id)})


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"event: error\ndata: %s\n\n" % _dump({"error": http_errors.fields(error, request_id)})


# --- reading ------------------------------------------------------------------------------------------------


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentInvalid(f"{name}: must be a text.")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ArgumentInvalid(f"{name}: must be true or false.")
    return value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentInvalid(f"{name}: must be a whole number.")
    return value


def _int32(name: str, value: Any) -> int:
    number = _integer(name, value)
    if not -(2**31) <= number < 2**31:
        raise ArgumentInvalid(f"{name}: is out of range.")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentInvalid(f"{name}: must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentInvalid(f"{name}: is out of range.") from None


def _array(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ArgumentInvalid(f"{name}: must be an array.")
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else _array(name, value)
    return tuple(_text(f"{name}[{at}]", text) for at, text in enumerate(texts))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    token_ids = _array(name, value)
    # Names are made for mistakes alone: a body has room for a million ids.
    for at, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise ArgumentInvalid(f"{name}[{at}]: must be a token id.")
    return tuple(token_ids)


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    return tuple(_message(f"{name}[{at}]", turn) for at, turn in enumerate(_array(name, value)))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise ArgumentInvalid(f"{name}: must be an object.")
    for key in value:
        if key not in {"role", "content"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a message.")
    for key in ("role", "content"):
        if key not in value:
            raise ArgumentInvalid(f"{name}.{key}: is missing.")
    return Message(_text(f"{name}.role", value["role"]), _text(f"{name}.content", value["content"]))


def _priority(name: str, value: Any) -> int:
    names = {band.name.lower(): band.value for band in Band}
    text = _text(name, value)
    if text not in names:
        raise ArgumentInvalid(f"{name}: must be one of {', '.join(names)}.")
    return names[text]


def _logit_bias(name: str, value: Any) -> int:
    """The number of entries: whether there are any is all that matters to a version without them."""
    if not isinstance(value, dict):
        raise ArgumentInvalid(f"{name}: must be an object.")
    return len(value)


def _anything(_name: str, value: Any) -> Any:
    return value


_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "request_id": _text,
    "model": _text,
    "text": _text,
    "messages": _messages,
    "tokens": _token_ids,
    "max_tokens": _int32,
    "temperature": _number,
    "top_p": _number,
    "top_k": _int32,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "seed": _integer,
    "logit_bias": _logit_bias,
    "stop": _stop,
    "logprobs": _int32,
    "n": _int32,
    "format": _anything,
    "priority": _priority,
    "resumable": _boolean,
    "stream": _boolean,
}
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def _prompt(read: Mapping[str, Any]) -> Prompt:
    given = [name for name in ("text", "messages", "tokens") if name in read]
    if len(given) != 1:
        raise ArgumentInvalid("text, messages or tokens: exactly one of them is needed.")
    match given[0]:
        case "text":
            return TextPrompt(read["text"])
        case "messages":
            return ChatPrompt(read["messages"])
        case _:
            return TokenPrompt(read["tokens"])


# --- writing ------------------------------------------------------------------------------------------------


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _event_fields(event: Event) -> tuple[str, dict[str, Any]]:
    match event:
        case Queued(position, estimated_wait_s):
            return "queued", {"position": position, "estimated_wait_s": _seconds(estimated_wait_s)}
        case Started():
            return "started", {
                "request_id": event.request_id,
                "model": event.model,
                "revision": event.revision,
                "worker_id": event.worker_id,
                "attempt": event.attempt,
                "queue_time_s": _seconds(event.queue_s),
                "degraded": False,
            }
        case Chunk(index, text, token_ids):
            return "chunk", {"sequence": 0, "index": index, "text": text, "token_ids": token_ids}
        case Finished():
            return "finished", {
                "sequence": 0,
                "stop_text": event.stop_text,
                **_finished_fields(event),
            }


def _finished_fields(event: Finished) -> dict[str, Any]:
    return {
        "finish_reason": event.reason.value,
        "usage": _usage_fields(event.usage),
        "timings": _timings_fields(event.timings),
    }


def _usage_fields(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _timings_fields(timings: Timings) -> dict[str, float | None]:
    return {
        "queue_s": _seconds(timings.queue_s),
        "prefill_s": _seconds(timings.prefill_s),
        "decode_s": _seconds(timings.decode_s),
        "total_s": _seconds(timings.total_s),
    }


def _seconds(seconds: float | None) -> float | None:
    """Microseconds are as fine as anything here is measured."""
    return None if seconds is None else round(seconds, 6)
