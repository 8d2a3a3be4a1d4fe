"""Admission. Owns: which jobs a worker refuses before they reach a slot, and why.

BUSY is not decided here: only the scheduler knows its slots at the moment in which it starts a job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from services.worker.core.revision import ModelFacts, Phase, Residency
from services.worker.core.sequence import Sampling, SequenceKey, SequenceStart

# The contract's bound on temperature.
TEMPERATURE_MAX = 2.0

# More credit than any stream uses; it bounds what one message may ask to hold in memory.
CREDIT_TOKENS_MAX = 65_536


class Reason(StrEnum):
    """Why a job is not taken; the names are those of `interlock.v1.RefusalReason`."""

    BUSY = "BUSY"
    REVISION_NOT_READY = "REVISION_NOT_READY"
    EPOCH_STALE = "EPOCH_STALE"
    DRAINING = "DRAINING"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A job that was not taken. `message` is for people, and set for INVALID."""

    key: SequenceKey
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class JobStart:
    """A job as it arrives.

    Attributes:
        model: The model that the grant named.
        revision: The revision that was granted.
        epoch: The route's epoch at the grant.
        start: Its sequence.
        request_id: The client's id, for the log.
    """

    model: str
    revision: str
    epoch: int
    start: SequenceStart
    request_id: str = ""


def judge(job: JobStart, residency: Residency, facts: ModelFacts | None) -> Refusal | None:
    """Why the job cannot be taken, or None; `facts` are those of its revision, None when not loaded."""
    key = job.start.key
    if residency.draining:
        return Refusal(key, Reason.DRAINING)
    resident = residency.find(job.revision)
    if resident is None or resident.phase is not Phase.ACTIVE or resident.model != job.model or facts is None:
        return Refusal(key, Reason.REVISION_NOT_READY)
    if job.epoch < residency.epoch:
        return Refusal(key, Reason.EPOCH_STALE)
    flaw = find_flaw(job.start, facts)
    return None if flaw is None else Refusal(key, Reason.INVALID, flaw)


def find_flaw(start: SequenceStart, facts: ModelFacts) -> str | None:
    """What makes the job impossible on this revision, in words; None when it is well-formed."""
    if not start.prompt_ids:
        return "The prompt has no token."
    if start.max_tokens < 1:
        return "max_tokens must be at least 1."
    if start.reserved_tokens > min(facts.context_tokens, facts.kv_tokens):
        return "Prompt and max_tokens exceed what this worker can hold."
    if max((*start.prompt_ids, *start.emitted_ids)) >= facts.vocabulary:
        return "A token id is outside the vocabulary."
    if start.credit_tokens > CREDIT_TOKENS_MAX:
        return f"credit_tokens must be at most {CREDIT_TOKENS_MAX}."
    return _sampling_flaw(start.sampling)


def _sampling_flaw(sampling: Sampling) -> str | None:
    if not (math.isfinite(sampling.temperature) and 0 <= sampling.temperature <= TEMPERATURE_MAX):
        return "temperature must be within 0 and 2."
    if not 0 < sampling.top_p <= 1:
        return "top_p must be over 0 and at most 1."
    if not 0 <= sampling.min_p <= 1:
        return "min_p must be within 0 and 1."
    if sampling.top_k < 0:
        return "top_k must be at least 1."
    return None
