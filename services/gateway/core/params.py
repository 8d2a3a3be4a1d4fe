"""What a caller asks for. Owns: the shape of a request before and after validation. Data alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from services.common.conversation import Message
from services.common.token_pieces import TokenPiece
from services.gateway.core.jobs import Band
from services.gateway.core.tenancy import TenantLimits

# What an absent `max_tokens` means in the native API.
MAX_TOKENS_DEFAULT = 50
# Stop strings in the native API and in OpenAI's.
STOPS_MAX = 4


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """One user message."""

    text: str


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """Text that is tokenized as it is, without a chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest turn first."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    ids: tuple[int, ...]


Prompt = TextPrompt | RawPrompt | ChatPrompt | TokenPrompt


def prompt_size(prompt: Prompt) -> int:
    """Bytes of a prompt's text, or token ids where it was given by them."""
    match prompt:
        case TokenPrompt(ids):
            return len(ids)
        case ChatPrompt(messages):
            return sum(len(message.content.encode()) for message in messages)
        case TextPrompt(text) | RawPrompt(text):
            return len(text.encode())


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; None: the caller said nothing.

    Attributes:
        temperature: Divides the logits; 0, or below 0.00001: greedy.
        top_p: Probability mass that is kept.
        top_k: Number of tokens that are kept.
        min_p: Smallest probability that is kept, relative to the likeliest.
        repetition_penalty: Divides scores of tokens in prompt or output; 1: none.
        presence_penalty: Subtracted once for tokens in the output; 0: none.
        frequency_penalty: Subtracted per occurrence in the output; 0: none.
        seed: Names the noise.
        logit_bias: Added to the scores, by token id.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


class FormatKind(StrEnum):
    """The kinds of shapes; the names are those of the fields of `interlock.v1.OutputFormat`."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A shape that the output is held to.

    Attributes:
        kind: How `texts` are read; None: the caller named none.
        texts: The schema, expression or grammar as one text; or the choices.
    """

    kind: FormatKind | None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request as it came in; None: absent. The fields are those of `interlock.v1.GenerateRequest`.

    Attributes:
        tokens_where_absent: What an absent `max_tokens` means, where the context leaves as many.
        stops_max: How many stop strings its API allows.
    """

    request_id: str | None = None
    model: str | None = None
    prompt: Prompt | None = None
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int | None = None
    form: OutputFormat | None = None
    priority: int = 0
    resumable: bool = False
    tokens_where_absent: int = MAX_TOKENS_DEFAULT
    stops_max: int = STOPS_MAX

    @property
    def named(self) -> bool:
        """Whether it may be under way already: an id that a gateway drew is nobody's business but its own."""
        return bool(self.request_id) or self.resumable


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What is asked of the worker, validated.

    Attributes:
        max_tokens: Most tokens of each sequence, at least 1.
        sampling: How they are chosen; the seed is set.
        stop: Strings before which the text ends.
        logprobs: Alternatives to report for each token; None: no scores at all.
        form: The shape of the output; None: any.
        n: Sequences, each of its own noise.
    """

    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    form: OutputFormat | None = None
    n: int = 1


Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text; special tokens become nothing."""

PieceOf = Callable[[int], TokenPiece]
"""Says what one token stands for."""


class Words(Protocol):
    """A tokenizer's way back to text; `core.ports.Tokenizer` has it."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; special tokens become nothing."""
        ...

    def piece(self, token_id: int) -> TokenPiece:
        """What one token stands for beside others; a special one for its name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """A request that is ready to queue.

    Attributes:
        job_id: Hash of subject and request id.
        request_id: The caller's name for it, or the one that was drawn.
        tenant: The subject that is charged.
        model: The model's name.
        prompt_ids: The prompt's tokens.
        params: What is asked of the worker.
        band: How urgent it is.
        timeout_s: Time until its deadline.
        submission: Nonce of this submission.
        words: The tokenizer's way back to text.
        limits: What the tenant may take.
        digest: Digest of what was asked.
        resumable: Whether its events are logged, so that another gateway can go on with it.
        waited_s: Time since it arrived, where another process began with it; `timeout_s` counts from there.
        unclaimed: Whether its id was to stand for it, and the store could not be told.
    """

    job_id: str
    request_id: str
    tenant: str
    model: str
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    band: Band
    timeout_s: float
    submission: str
    words: Words
    limits: TenantLimits = field(default_factory=TenantLimits)
    digest: str = ""
    resumable: bool = False
    waited_s: float = 0.0
    unclaimed: bool = False

    @property
    def cost_tokens(self) -> int:
        """The prompt, and the most tokens of each sequence: what is charged until more is known."""
        return len(self.prompt_ids) + self.params.n * self.params.max_tokens
