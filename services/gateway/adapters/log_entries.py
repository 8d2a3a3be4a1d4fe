"""The entries of a log as text. Owns: their JSON, both ways."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from services.common.errors import ForeignError, InterlockError, InternalError, every_error
from services.gateway.core.events import (
    Chunk,
    Finished,
    FinishReason,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from services.gateway.core.log import Entry, Failed

_ERRORS = {error.reason: error for error in every_error() if error is not ForeignError}


def write_entry(entry: Entry) -> str:
    """One entry as JSON."""
    fields: dict[str, Any] = {"at_s": round(entry.at_s, 6), **_event_fields(entry.event)}
    if entry.cached_prompt_tokens:
        fields["cached"] = entry.cached_prompt_tokens
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def read_entry(text: str) -> Entry:
    """The entry that `write_entry` wrote."""
    fields: dict[str, Any] = json.loads(text)
    return Entry(_read_event(fields), fields["at_s"], fields.get("cached", 0))


def _event_fields(event: Started | Chunk | Finished | Failed) -> dict[str, Any]:
    match event:
        case Started():
            # Beside it: gateways of an earlier version take no field more in it.
            started = asdict(event)
            return {"failures": started.pop("failures"), "started": started}
        case Chunk(index, text, token_ids, logprobs, sequence):
            fields: dict[str, Any] = {"index": index, "text": text, "ids": token_ids}
            if sequence:
                fields["sequence"] = sequence
            if logprobs:
                fields["logprobs"] = [[score.logprob, score.alternatives] for score in logprobs]
            return {"chunk": fields}
        case Finished():
            return {"finished": asdict(event)}
        case Failed(error):
            return {
                "failed": {
                    "reason": error.reason,
                    "message": error.message,
                    "retry_after_s": error.retry_after_s,
                }
            }


def _read_event(fields: dict[str, Any]) -> Started | Chunk | Finished | Failed:
    if "chunk" in fields:
        return _read_chunk(fields["chunk"])
    if "started" in fields:
        started = fields["started"]
        # An earlier version took every attempt for a worker that was used up.
        return Started(**started, failures=fields.get("failures", started["attempt"] - 1))
    if "finished" in fields:
        return _read_finished(fields["finished"])
    return Failed(_read_error(fields["failed"]))


def _read_chunk(fields: dict[str, Any]) -> Chunk:
    logprobs = tuple(
        TokenLogprob(logprob, tuple((int(token), float(score)) for token, score in alternatives))
        for logprob, alternatives in fields.get("logprobs", ())
    )
    sequence = fields.get("sequence", 0)
    return Chunk(fields["index"], fields["text"], tuple(fields["ids"]), logprobs, sequence)


def _read_finished(fields: dict[str, Any]) -> Finished:
    return Finished(
        FinishReason(fields["reason"]),
        fields["stop_text"],
        Usage(**fields["usage"]),
        Timings(**fields["timings"]),
        # An earlier version's log tells of one sequence.
        fields.get("sequence", 0),
        fields.get("is_last", True),
    )


def _read_error(fields: dict[str, Any]) -> InterlockError:
    kind = _ERRORS.get(fields["reason"], InternalError)
    return kind(fields["message"], retry_after_s=fields["retry_after_s"])
