"""Attempts. Owns: what gateway and worker tell each other about one attempt at a job. Data alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from services.gateway.core.breaker import Verdict
from services.gateway.core.events import FinishReason, TokenLogprob
from services.gateway.core.params import OutputFormat, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """What a worker needs to begin a job, or to go on with it.

    Attributes:
        job_id: The job.
        attempt: Tells this start from every earlier one of the job.
        request_id: For the worker's log.
        model: The model's name.
        revision: The granted revision.
        epoch: The route's epoch at the grant.
        prompt_ids: The prompt.
        emitted: What earlier workers generated, for each sequence.
        max_tokens: Most tokens of a sequence, the emitted ones included.
        sampling: How tokens are chosen.
        credit_tokens: How many tokens of each sequence may be sent before more credit comes.
        ended: The sequences of which nothing more is wanted; never all of them.
        logprobs: Alternatives to report for each token; None: no scores at all.
        form: The shape of the output; None: any.
    """

    job_id: str
    attempt: int
    request_id: str
    model: str
    revision: str
    epoch: int
    prompt_ids: tuple[int, ...]
    emitted: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: SamplingParams
    credit_tokens: int
    ended: frozenset[int] = frozenset()
    logprobs: int | None = None
    form: OutputFormat | None = None

    @property
    def open(self) -> frozenset[int]:
        """The sequences that go on."""
        return frozenset(range(len(self.emitted))) - self.ended


@dataclass(frozen=True, slots=True)
class Output:
    """What a worker produced for one sequence of an attempt.

    Attributes:
        index: Position of the first of `token_ids`.
        token_ids: The tokens; empty when only the end is told.
        finish: Set when the sequence ended as it should.
        cached_prompt_tokens: Prompt tokens found in a cache; told with the first output.
        logprobs: One for each token where they were asked for, else none.
        sequence: Which of the request's sequences, from 0.
        others: How many other sequences of the attempt have not ended.
    """

    index: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    cached_prompt_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    sequence: int = 0
    others: int = 0

    @property
    def ends_attempt(self) -> bool:
        """Whether nothing of the attempt comes after it."""
        return self.finish is not None and self.others == 0


class AttemptEnd(StrEnum):
    """How a worker's part in a request ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    LOST = "lost"
    BROKEN = "broken"


class Loss(StrEnum):
    """What was lost.

    JOB: the worker lives, and ended the attempt without finishing it. PROCESS: its session broke, as it does
    with the process. SILENCE: it was silent, or stood still, or was left. ABSENCE: this gateway stood still
    itself, for so long that the worker has let go of it.
    """

    JOB = "job"
    PROCESS = "process"
    SILENCE = "silence"
    ABSENCE = "absence"

    @property
    def crashed(self) -> bool:
        """Whether its process, or the job in it, came to an end; silence may be a busy machine's."""
        return self in {Loss.JOB, Loss.PROCESS}

    @property
    def verdict(self) -> Verdict:
        """What it says of the worker."""
        return Verdict.NEUTRAL if self is Loss.ABSENCE else Verdict.FAILURE


class RefusalReason(StrEnum):
    """Why a worker did not take an attempt.

    INVALID: the request is to blame. A worker says so after tokens too, of a format that can be followed no
    further; all its other reasons come before the first. UNREACHABLE: nothing of it has reached the worker.
    BREAKER_OPEN: the gateway did not even ask. BUDGET_SPENT: the worker was lost, and the gateway cannot
    afford to go on elsewhere.
    """

    BUSY = "busy"
    REVISION_NOT_READY = "revision_not_ready"
    EPOCH_STALE = "epoch_stale"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    INVALID = "invalid"
    BREAKER_OPEN = "breaker_open"
    BUDGET_SPENT = "budget_spent"
