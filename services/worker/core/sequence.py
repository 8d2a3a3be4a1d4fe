"""Sequences. Owns: what a sequence was asked to be, how far it is, and what it has to say.

Pure data: knows neither slots' tensors nor sessions' streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from services.common.sampling_bounds import is_greedy
from services.worker.core.format import Constraint
from services.worker.core.lookup import PromptLookup

# A sequence that waits for a row.
NO_ROW = -1


class Finish(StrEnum):
    """Why a sequence ended; the names are those of `interlock.v1.FinishReason`."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 is greedy, as is what is too small to divide by, and then no filter
            and no seed matters.
        top_k: Keeps the k most likely tokens; 0 keeps all.
        top_p: Keeps the smallest set with at least this mass; 1 keeps all.
        min_p: Keeps tokens at least this many times as likely as the likeliest; 0 keeps all.
        seed: Names the noise, 0..2**64-1.
        repetition_penalty: Divides positive logits of tokens in prompt or output, and multiplies negative
            ones; 1 leaves them.
        presence_penalty: Subtracted once from the logits of tokens in the output.
        frequency_penalty: Subtracted from them for each occurrence.
        logit_bias: Added to the logits, by token id; the first thing that is done to them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return is_greedy(self.temperature)

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before anything else looks at them."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
        )


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely the model itself found a token: before temperature, penalties, bias, filters and masks.

    Attributes:
        logprob: Natural logarithm of the chosen token's probability.
        alternatives: The likeliest tokens of the position with theirs, likeliest first.
    """

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceKey:
    """Names one continuation of one job of one session.

    Attributes:
        session: The session's number within this process.
        job: The job; unique within the session.
        attempt: Tells late tokens of an earlier grant apart.
        sequence: Which continuation, from 0.
    """

    session: int
    job: str
    attempt: int = 1
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What shall be generated.

    Attributes:
        key: Its name.
        prompt_ids: The prompt, at least one id.
        emitted_ids: What earlier workers have emitted; generation goes on behind it.
        max_tokens: Most tokens, the emitted ones included.
        credit_tokens: Tokens that may be produced before credit is added.
        sampling: How tokens are chosen.
        logprobs: Alternatives to report for each token; None: no scores at all.
        constraint: What the output is held to; None: nothing. It belongs to this sequence alone.
    """

    key: SequenceKey
    prompt_ids: tuple[int, ...]
    max_tokens: int
    emitted_ids: tuple[int, ...] = ()
    credit_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def reserved_tokens(self) -> int:
        """Positions of the KV cache that it may come to fill."""
        return len(self.prompt_ids) + max(self.max_tokens, len(self.emitted_ids))


@dataclass(frozen=True, slots=True)
class Output:
    """What one sequence produced.

    Attributes:
        key: The sequence.
        index: Position of the first of `token_ids` in the continuation.
        token_ids: The tokens; an end token is never among them.
        finish: Set when the sequence has ended.
        scores: One for each token where they were asked for, else none.
        cached_prompt_tokens: Prompt tokens that were found in the prefix cache; told with the first output.
        flaw: With ERROR, where what was asked is to blame and not the worker: why, in words.
    """

    key: SequenceKey
    index: int
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    scores: tuple[TokenScore, ...] = ()
    cached_prompt_tokens: int = 0
    flaw: str = ""

    def followed_by(self, later: Output) -> Output:
        """Both as one; `later` begins where this one ends."""
        token_ids, scores = self.token_ids + later.token_ids, self.scores + later.scores
        return replace(self, token_ids=token_ids, finish=later.finish, scores=scores, flaw=later.flaw)

    def split(self, tokens: int) -> tuple[Output, Output]:
        """Its first `tokens` tokens, and the rest with the end."""
        head = replace(
            self, token_ids=self.token_ids[:tokens], finish=None, scores=self.scores[:tokens], flaw=""
        )
        rest = replace(
            self,
            index=self.index + tokens,
            token_ids=self.token_ids[tokens:],
            scores=self.scores[tokens:],
            cached_prompt_tokens=0,
        )
        return head, rest


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence that holds a slot.

    Attributes:
        start: What was asked.
        history: Prompt and everything emitted, in order.
        filled: Positions whose keys and values are in the cache. The rest of `history` is pending: one
            token is a decode, more are a prefill. Setting it back recomputes.
        credit: Tokens that it may still produce; at 0 it is paused and keeps its slot.
        row: Its row of the KV cache, or NO_ROW. Rows are dense, so it changes when others leave.
        cached_tokens: Prompt tokens that were found in the prefix cache.
        preemptions: How often its row was taken for others.
        lookup: Guesses what it says next.
    """

    start: SequenceStart
    history: list[int]
    credit: int
    row: int = NO_ROW
    filled: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    lookup: PromptLookup = field(default_factory=PromptLookup)

    @property
    def pending(self) -> int:
        """Tokens that must pass the model before the next one is known."""
        return len(self.history) - self.filled

    @property
    def emitted(self) -> int:
        """The index of the next token."""
        return len(self.history) - len(self.start.prompt_ids)
