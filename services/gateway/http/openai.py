"""The OpenAI API. Owns: its bodies, its chunks and its errors. Pure; knows no dispatcher.

A stream is `data:` lines: for each choice a chunk with the role, chunks of text, and one with the finish
reason; after the last of them, on request, one with the usage, then `[DONE]`. One that fails ends with an
`error` instead, and never with `[DONE]`: the vendor's clients raise it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common import http_errors
from services.common.errors import InterlockError
from services.gateway.core.events import Chunk, Finished, FinishReason, TokenLogprob, Usage
from services.gateway.core.params import PieceOf
from services.gateway.http.bodies import SLICE_SCORES, Sliced, at_once, dump, pieces
from services.gateway.http.tool_calls import ToolCall

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_STATUS_BY_REASON = {"FEATURE_UNSUPPORTED": 400, "CONTEXT_EXCEEDED": 400}
_CODES = {
    "TOKEN_MISSING": "invalid_api_key",
    "TOKEN_INVALID": "invalid_api_key",
    "TOKEN_EXPIRED": "invalid_api_key",
    "TOKEN_REVOKED": "invalid_api_key",
    "MODEL_UNKNOWN": "model_not_found",
    "DEADLINE_EXCEEDED": "deadline_exceeded",
    "CONTEXT_EXCEEDED": "context_length_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
    "QUOTA_EXCEEDED": "rate_limit_exceeded",
}
# The field that a message names at its beginning.
_PARAM = re.compile(r"([a-z_]+(?:[.\[][A-Za-z0-9_.\[\]]*)?): ")

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every body of one reply says.

    Attributes:
        id: The completion's id.
        created_s: When it was asked for, in seconds since the epoch.
        model: The model that answers.
        revision: Its revision, which is what the vendor calls a fingerprint of the system.
    """

    id: str
    created_s: int
    model: str
    revision: str


# --- chat ---------------------------------------------------------------------------------------------------


def chat_body(head: Head, choices: Sequence[Mapping[str, Any]], usage: Usage) -> Iterator[bytes]:
    """A whole completion of a conversation, in pieces."""
    return pieces({**_head(head, "chat.completion"), "choices": choices, "usage": usage_fields(usage)})


def chat_choice(
    text: str, calls: Sequence[ToolCall], finished: Finished, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """One of the answers of a whole completion."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if calls:
        message["content"] = text or None
        message["tool_calls"] = [_call(call) for call in calls]
    return {
        "index": finished.sequence,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": _finish_reason(finished, calls=bool(calls)),
    }


def chat_opening(head: Head, index: int, *, usage: bool) -> bytes:
    """The chunk that a choice begins with: who speaks."""
    delta = {"role": "assistant", "content": "", "refusal": None}
    return b"".join(_chat_chunk(head, index, delta, usage=usage))


def chat_text(
    head: Head, index: int, text: str, logprobs: dict[str, Any] | None, *, usage: bool
) -> Iterable[bytes]:
    """A chunk of text, in pieces."""
    return _chat_chunk(head, index, {"content": text}, logprobs=logprobs, usage=usage)


def chat_calls(
    head: Head, index: int, calls: Sequence[ToolCall], logprobs: dict[str, Any] | None, *, usage: bool
) -> Iterable[bytes]:
    """A chunk with tool calls, and with the scores of what they were said with, in pieces."""
    deltas = [{"index": at, **_call(call)} for at, call in enumerate(calls)]
    return _chat_chunk(head, index, {"tool_calls": deltas}, logprobs=logprobs, usage=usage)


def chat_end(head: Head, finished: Finished, *, calls: bool, usage: bool) -> bytes:
    """What a choice ends with."""
    reason = _finish_reason(finished, calls=calls)
    return b"".join(_chat_chunk(head, finished.sequence, {}, finish_reason=reason, usage=usage))


def chat_closing(head: Head, usage: Usage | None) -> bytes:
    """What a stream ends with, after its last choice; with the usage, where it was asked for."""
    return _closing(head, "chat.completion.chunk", usage)


def chat_logprobs(chunks: Iterable[Chunk], piece_of: PieceOf) -> dict[str, Any]:
    """The scores of some tokens."""
    scored = _scores_of(chunks)

    def write(pair: tuple[int, TokenLogprob]) -> dict[str, Any]:
        token_id, score = pair
        others = [_scored(piece_of, other, logprob) for other, logprob in score.alternatives]
        return {**_scored(piece_of, token_id, score.logprob), "top_logprobs": others}

    return {"content": Sliced(scored, write, at_once(scored)), "refusal": None}


# --- completions --------------------------------------------------------------------------------------------


def completion_body(head: Head, choices: Sequence[Mapping[str, Any]], usage: Usage) -> Iterator[bytes]:
    """A whole completion of a text, in pieces."""
    return pieces({**_head(head, "text_completion"), "choices": choices, "usage": usage_fields(usage)})


def completion_choice(text: str, finished: Finished, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """One of the continuations of a whole completion."""
    return {
        "index": finished.sequence,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": _FINISH_REASONS[finished.reason],
    }


def completion_text(
    head: Head, index: int, text: str, logprobs: dict[str, Any] | None, *, usage: bool
) -> Iterable[bytes]:
    """A chunk of text, in pieces."""
    return _completion_chunk(head, index, text, logprobs, None, usage=usage)


def completion_end(head: Head, finished: Finished, *, usage: bool) -> bytes:
    """What a choice ends with."""
    reason = _FINISH_REASONS[finished.reason]
    return b"".join(_completion_chunk(head, finished.sequence, "", None, reason, usage=usage))


def completion_closing(head: Head, usage: Usage | None) -> bytes:
    """What a stream ends with, after its last choice; with the usage, where it was asked for."""
    return _closing(head, "text_completion", usage)


def completion_logprobs(
    chunks: Iterable[Chunk], piece_of: PieceOf, offset_of: Callable[[int], int]
) -> dict[str, Any]:
    """The scores of some tokens; `offset_of` says, of one after the other, where it begins in the text."""
    scored = _scores_of(chunks)
    step = at_once(scored)
    return {
        "tokens": Sliced(scored, lambda pair: piece_of(pair[0]).text, SLICE_SCORES),
        "token_logprobs": [score.logprob for _, score in scored],
        "top_logprobs": Sliced(scored, lambda pair: _top(piece_of, pair[1]), step),
        "text_offset": Sliced(scored, lambda pair: offset_of(pair[0]), SLICE_SCORES),
    }


# --- models -------------------------------------------------------------------------------------------------


def models_body(models: Iterable[str], created_s: int) -> bytes:
    """The models that can be asked."""
    return dump({"object": "list", "data": [_model(name, created_s) for name in models]})


def model_body(name: str, created_s: int) -> bytes:
    """One model."""
    return dump(_model(name, created_s))


# --- errors -------------------------------------------------------------------------------------------------


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error."""
    return _STATUS_BY_REASON.get(error.reason, http_errors.status_of(error))


def headers(request_id: str) -> tuple[tuple[str, str], ...]:
    """Nothing beside `x-request-id`, which every reply has."""
    del request_id
    return ()


def error_body(error: InterlockError, request_id: str) -> bytes:
    """The reply of a request that failed before its first byte."""
    del request_id
    return dump({"error": _error(error)})


def error_event_body(error: InterlockError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %s\n\n" % error_body(error, request_id)


def _error(error: InterlockError) -> dict[str, Any]:
    status = status_of(error)
    kind = "invalid_request_error" if status < 499 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    param = _PARAM.match(error.message) if status == 400 else None
    return {
        "message": error.message,
        "type": kind,
        "param": param.group(1) if param else None,
        "code": _CODES.get(error.reason),
    }


# --- parts --------------------------------------------------------------------------------------------------


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Tokens, as the vendor counts them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _finish_reason(finished: Finished, *, calls: bool) -> str:
    whole = calls and finished.reason is FinishReason.STOP
    return "tool_calls" if whole else _FINISH_REASONS[finished.reason]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _head(head: Head, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created_s,
        "model": head.model,
        "system_fingerprint": head.revision,
    }


def _closing(head: Head, kind: str, usage: Usage | None) -> bytes:
    if usage is None:
        return DONE
    return _data({**_head(head, kind), "choices": [], "usage": usage_fields(usage)}) + DONE


def _chat_chunk(
    head: Head,
    index: int,
    delta: Mapping[str, Any],
    *,
    usage: bool,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> Iterable[bytes]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    # Where the usage comes at the end, every chunk before says that it does not know it yet.
    told = {"usage": None} if usage else {}
    fields = {**_head(head, "chat.completion.chunk"), "choices": [choice], **told}
    return (_data(fields),) if logprobs is None else _data_pieces(fields)


def _completion_chunk(
    head: Head,
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    *,
    usage: bool,
) -> Iterable[bytes]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    told = {"usage": None} if usage else {}
    fields = {**_head(head, "text_completion"), "choices": [choice], **told}
    return (_data(fields),) if logprobs is None else _data_pieces(fields)


def _scores_of(chunks: Iterable[Chunk]) -> list[tuple[int, TokenLogprob]]:
    """Tokens with their scores."""
    return [pair for chunk in chunks for pair in zip(chunk.token_ids, chunk.logprobs, strict=False)]


def _scored(piece_of: PieceOf, token_id: int, logprob: float) -> dict[str, Any]:
    piece = piece_of(token_id)
    return {"token": piece.text, "logprob": logprob, "bytes": list(piece.raw)}


def _top(piece_of: PieceOf, score: TokenLogprob) -> dict[str, float]:
    told: dict[str, float] = {}
    for token_id, logprob in score.alternatives:
        # Of tokens that look the same the first is the likeliest.
        told.setdefault(piece_of(token_id).text, logprob)
    return told


def _model(name: str, created_s: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "interlock"}


def _data(fields: Mapping[str, Any]) -> bytes:
    return b"data: %s\n\n" % dump(fields)


def _data_pieces(fields: Mapping[str, Any]) -> Iterator[bytes]:
    yield b"data: "
    yield from pieces(fields)
    yield b"\n\n"
