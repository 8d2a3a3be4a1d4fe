"""Batches. Owns: what one step of the model is told to do. Data alone; runners obey it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.worker.core.format import Constraint
from services.worker.core.sequence import Sampling, TokenScore


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be chosen.

    Attributes:
        sampling: How.
        sequence: Which continuation, from 0.
        index: The token's index in it; with seed and sequence it names the noise.
        history: Prompt and output so far; nobody changes it while the step runs.
        prompt_tokens: How much of `history` is the prompt.
        logprobs: Alternatives to report; None: no score at all.
        constraint: What the output is held to.
    """

    sampling: Sampling
    sequence: int
    index: int
    history: Sequence[int] = ()
    prompt_tokens: int = 0
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before anything else looks at them."""
        return self.constraint is not None or self.sampling.adjusts

    @property
    def emitted_ids(self) -> Sequence[int]:
        """The output so far."""
        return self.history[self.prompt_tokens :]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a draw yielded.

    Attributes:
        token_id: The token; NO_TOKEN where the sequence cannot go on.
        score: How likely the model found it; None unless asked for.
        flaw: With NO_TOKEN, where what was asked is to blame and not the model: why, in words.
    """

    token_id: int
    score: TokenScore | None = None
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """The first `tokens` positions of row `source` are copied to row `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt for one row.

    Attributes:
        row: The row.
        position: Where the first of `token_ids` stands.
        token_ids: At least one.
        draw: Set when the chunk reaches the end of what is known: a token follows from it.
    """

    row: int
    position: int
    token_ids: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class Decode:
    """The last known token of one row; a token follows from it.

    Attributes:
        row: The row.
        position: Where the token stands.
        token_id: The token.
        draw: How the next one is chosen.
        guess: Tokens that may follow. Each is passed behind the one before it, and yields a choice of its
            own, which counts when all before it were right. Only a step that does nothing else has one.
    """

    row: int
    position: int
    token_id: int
    draw: Draw
    guess: tuple[int, ...] = ()

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The draw of the token, and of each of the guess."""
        later = (replace(self.draw, index=self.draw.index + at) for at in range(1, len(self.guess) + 1))
        return (self.draw, *later)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: first the moves in order, then chunks and decodes, of which each row has one at most.

    Rows that the step before did not have are added before the moves, for they may lead there; rows that
    the step does not have may be given up after them.

    Attributes:
        rows: Rows that must exist; some may be empty, or hold what later steps copy from.
        capacity: Positions that every row must have.
        moves: Rows to copy; the source stays as it is.
        chunks: Prefill.
        decodes: Decode, by ascending row.
    """

    rows: int
    capacity: int
    moves: tuple[Move, ...]
    chunks: tuple[Chunk, ...]
    decodes: tuple[Decode, ...]

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The tokens that the step yields, in this order: of the chunks, then of the decodes."""
        chosen = tuple(chunk.draw for chunk in self.chunks if chunk.draw)
        return (*chosen, *(draw for one in self.decodes for draw in one.draws))
