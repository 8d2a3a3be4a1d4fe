"""What a client hears of its request. Owns: the events of a generation, as `interlock.v1` names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits.

    Attributes:
        position: Estimated number of jobs before it.
        estimated_wait_s: Estimated time until it starts; None: not known.
    """

    position: int
    estimated_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A worker took the request; said again after a failover.

    Attributes:
        request_id: The request.
        model: The model that answers.
        revision: Its revision.
        worker_id: The worker.
        attempt: 1 for the first.
        queue_s: How long the request has waited.
        degraded: Whether the slot was lent without the store that all gateways share.
        failures: Workers that the request had used up by then, as its log tells another gateway; attempts
            count as well how often it was handed on. No client is told.
    """

    request_id: str
    model: str
    revision: str
    worker_id: str
    attempt: int
    queue_s: float
    degraded: bool = False
    failures: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a token.

    Attributes:
        logprob: Natural logarithm of the chosen token's probability.
        alternatives: The likeliest tokens of the position with theirs, likeliest first.
    """

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some text.

    Attributes:
        index: Position of the first of `token_ids`.
        text: The text that became certain; may be empty.
        token_ids: The tokens since the sequence's last chunk.
        logprobs: One for each token where they were asked for, else none.
        sequence: Which of the request's sequences, from 0.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens: of the prompt, of it those found in a cache, and generated ones."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """What both used."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_prompt_tokens + other.cached_prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds; the parts are those of `interlock.v1.Timings`."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a sequence.

    Attributes:
        reason: Why.
        stop_text: The stop string that was reached; empty: none.
        usage: Tokens used by it; the prompt is counted in sequence 0 alone.
        timings: Where the time went.
        sequence: Which of the request's sequences, from 0.
        is_last: Whether the request has ended with it.
    """

    reason: FinishReason
    stop_text: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    sequence: int = 0
    is_last: bool = True


Event = Queued | Started | Chunk | Finished
