"""Admission. Owns: which jobs a worker refuses before they reach a slot, and why.

BUSY is not decided here: only the scheduler knows its slots at the moment in which it starts a job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from services.common.sampling_bounds import REPETITION_PENALTY_MIN
from services.worker.core.format import Format, format_flaw
from services.worker.core.kv_budget import KvBudget
from services.worker.core.revision import ModelFacts, Phase, Residency
from services.worker.core.sequence import Sampling, SequenceKey, SequenceStart

# The contract's bounds.
TEMPERATURE_MAX = 2.0
REPETITION_PENALTY_MAX = 10.0
PENALTY_MAX = 2.0
BIAS_MAX = 100.0
BIASES_MAX = 1_024
LOGPROBS_MAX = 20

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
        starts: Its sequences, at least one; those that ended on earlier workers are left out. They share the
            prompt, and the first to be prefilled is what the others copy it from.
        request_id: The client's id, for the log.
        form: A shape to hold the output to; None: none.
    """

    model: str
    revision: str
    epoch: int
    starts: tuple[SequenceStart, ...]
    request_id: str = ""
    form: Format | None = None

    @property
    def key(self) -> SequenceKey:
        """Names the job, by its first sequence."""
        return self.starts[0].key


def judge(job: JobStart, residency: Residency, facts: ModelFacts | None, slots: int) -> Refusal | None:
    """Why the job cannot be taken, or None.

    Args:
        job: The job.
        residency: What is resident.
        facts: Those of the job's revision; None when it is not loaded.
        slots: Sequences that the worker runs at once.
    """
    key = job.key
    if residency.draining:
        return Refusal(key, Reason.DRAINING)
    resident = residency.find(job.revision)
    if resident is None or resident.phase is not Phase.ACTIVE or resident.model != job.model or facts is None:
        return Refusal(key, Reason.REVISION_NOT_READY)
    if job.epoch < residency.epoch:
        return Refusal(key, Reason.EPOCH_STALE)
    flaw = _job_flaw(job, facts, slots)
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
    return _sampling_flaw(start.sampling) or _adjustment_flaw(start.sampling, facts) or _score_flaw(start)


def _job_flaw(job: JobStart, facts: ModelFacts, slots: int) -> str | None:
    flaws = (find_flaw(start, facts) for start in job.starts)
    if (flaw := next((flaw for flaw in flaws if flaw), None)) is not None:
        return flaw
    if len(job.starts) > slots:
        return f"n: {len(job.starts)} sequences at once are more than the {slots} slots of this worker."
    if not KvBudget(facts.kv_tokens).admits(job.starts, ()):
        return "n: so many sequences of this prompt exceed what this worker can hold."
    return format_flaw(job.form) if job.form else None


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


def _adjustment_flaw(sampling: Sampling, facts: ModelFacts) -> str | None:
    if not REPETITION_PENALTY_MIN <= sampling.repetition_penalty <= REPETITION_PENALTY_MAX:
        low, high = REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX
        return f"repetition_penalty must be within {low:g} and {high:g}."
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(sampling, name)) <= PENALTY_MAX:
            return f"{name} must be within -{PENALTY_MAX:g} and {PENALTY_MAX:g}."
    if len(sampling.logit_bias) > BIASES_MAX:
        return f"logit_bias may have {BIASES_MAX} entries."
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < facts.vocabulary:
            return "logit_bias names a token id outside the vocabulary."
        if not abs(bias) <= BIAS_MAX:
            return f"logit_bias must be within -{BIAS_MAX:g} and {BIAS_MAX:g}."
    return None


def _score_flaw(start: SequenceStart) -> str | None:
    if start.logprobs is not None and not 0 <= start.logprobs <= LOGPROBS_MAX:
        return f"logprobs must be within 0 and {LOGPROBS_MAX}."
    return None
