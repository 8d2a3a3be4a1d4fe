"""The native HTTP API. Owns: its bodies, both ways. Pure; knows neither gRPC nor the dispatcher."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from services.common import http_errors
from services.common.errors import ArgumentInvalid, InterlockError
from services.common.http_types import JSON_TYPE
from services.common.strict_json import read_object, shown
from services.gateway.core.events import Chunk, Event, Finished, Queued, Started, Timings, TokenLogprob, Usage
from services.gateway.core.params import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.http.bodies import Sliced, at_once, dump, pieces
from services.gateway.http.native_fields import FIELDS, SAMPLING_FIELDS
from services.gateway.http.whole import Answer, Said

# A cursor is a position in a log of at most some thousands; the contract's own type has 64 bits.
_CURSOR = re.compile(r"[0-9]{1,18}")


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
    check_json_type(content_type)
    fields = read_object(body)
    for name in fields:
        if name not in FIELDS:
            raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
    # JSON's null says what leaving the field out says.
    read = {name: FIELDS[name](name, value) for name, value in fields.items() if value is not None}
    generation = GenerationRequest(
        request_id=read.get("request_id"),
        model=read.get("model"),
        prompt=_prompt(read),
        max_tokens=read.get("max_tokens"),
        sampling=SamplingParams(**{name: read[name] for name in SAMPLING_FIELDS if name in read}),
        stop=read.get("stop", ()),
        logprobs=read.get("logprobs"),
        n=read.get("n"),
        form=read.get("format"),
        priority=read.get("priority", 0),
        resumable=read.get("resumable", False),
    )
    return NativeRequest(generation, stream=read.get("stream", False))


def check_json_type(content_type: str) -> None:
    """Raises ArgumentInvalid for a body that claims to be something else than JSON."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in {"", JSON_TYPE}:
        raise ArgumentInvalid(f"content-type: must be {JSON_TYPE}.")


def read_cursor(last_event_id: str | None) -> int:
    """The position behind which a client wants events: the `id:` of the last one that it has seen.

    Raises:
        ArgumentInvalid: It is no number of an event.
    """
    if not last_event_id:
        return 0
    if not _CURSOR.fullmatch(last_event_id):
        raise ArgumentInvalid("last-event-id: must be the id of an event, a whole number.")
    return int(last_event_id)


def result_body(answer: Answer) -> Iterator[bytes]:
    """The one reply to a request that does not stream, in pieces.

    What it says at its top is of the first sequence, but for the usage, which is of all; of several, each
    follows by itself.
    """
    started = answer.started
    several = len(answer.sequences) > 1
    return pieces(
        {
            **_said_fields(answer.sequences[0]),
            "request_id": started.request_id,
            "model": started.model,
            "revision": started.revision,
            **_finished_fields(answer.finished),
            "usage": _usage_fields(answer.usage),
            **({"sequences": list(map(_sequence_fields, answer.sequences))} if several else {}),
        }
    )


def event_body(cursor: int, event: Event) -> Iterable[bytes]:
    """One server-sent event, in pieces."""
    name, fields = _event_fields(event)
    told = {"cursor": cursor, name: fields}
    if isinstance(event, Chunk) and event.logprobs:
        return _event_pieces(cursor, name, told)
    return (b"id: %d\nevent: %s\ndata: %s\n\n" % (cursor, name.encode(), dump(told)),)


def _event_pieces(cursor: int, name: str, told: Mapping[str, Any]) -> Iterator[bytes]:
    yield b"id: %d\nevent: %s\ndata: " % (cursor, name.encode())
    yield from pieces(told)
    yield b"\n\n"


def cancelled_body(request_id: str, *, cancelled: bool) -> bytes:
    """The reply to a cancellation."""
    return dump({"request_id": request_id, "cancelled": cancelled})


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error."""
    return http_errors.status_of(error)


def headers(request_id: str) -> tuple[tuple[str, str], ...]:
    """Nothing beside `x-request-id`, which every reply has."""
    del request_id
    return ()


def error_body(error: InterlockError, request_id: str) -> bytes:
    """The reply of a request that failed before its first byte."""
    return dump({"error": http_errors.fields(error, request_id)})


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"event: error\ndata: %s\n\n" % dump({"error": http_errors.fields(error, request_id)})


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
                "degraded": event.degraded,
            }
        case Chunk(index, text, token_ids):
            fields = {"sequence": event.sequence, "index": index, "text": text, "token_ids": token_ids}
            return "chunk", fields | _scores(_scores_of(event))
        case Finished():
            return "finished", _end_fields(event)


def _said_fields(said: Said) -> dict[str, Any]:
    scores = [score for chunk in said.chunks for score in _scores_of(chunk)]
    return {"result": said.text, **_scores(scores)}


def _sequence_fields(said: Said) -> dict[str, Any]:
    return {**_said_fields(said), **_end_fields(said.finished)}


def _end_fields(event: Finished) -> dict[str, Any]:
    return {"sequence": event.sequence, "stop_text": event.stop_text, **_finished_fields(event)}


def _scores(scores: list[tuple[int, TokenLogprob]]) -> dict[str, Any]:
    return {"logprobs": Sliced(scores, _score, at_once(scores))} if scores else {}


def _scores_of(chunk: Chunk) -> list[tuple[int, TokenLogprob]]:
    """One entry a token; none where they were not asked for."""
    return list(zip(chunk.token_ids, chunk.logprobs, strict=True)) if chunk.logprobs else []


def _score(pair: tuple[int, TokenLogprob]) -> dict[str, Any]:
    token_id, score = pair
    alternatives = [{"token_id": other, "logprob": logprob} for other, logprob in score.alternatives]
    return {"token_id": token_id, "logprob": score.logprob, "alternatives": alternatives}


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
