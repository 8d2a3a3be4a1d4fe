"""The scheduler. Owns: which sequences hold slots, and what each step does for them. Pure.

Every step decodes all sequences that can, and carries one bounded amount of prefill beside them. So a
running stream waits for at most that amount, and a new one moves with every step. Prefills take turns.

Rows are dense: a sequence that leaves is replaced by the one in the last row. Decodes then read one
contiguous piece of the cache most of the time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.core.batch import Batch, Choice, Chunk, Decode, Draw, Move
from services.worker.core.sequence import Finish, LiveSequence, Output, SequenceKey, SequenceStart

# What a runner returns for a row whose logits are not finite: the sequence cannot go on.
NO_TOKEN = -1

# Attention lengths are rounded up to it, so that few shapes occur and memory grows in steps.
BUCKET_TOKENS = 16

# A prefill step that takes longer than this is halved: streams wait for it, and gateways take two silent
# seconds for a hang. Slow machines and large models so get shorter chunks by themselves.
PREFILL_STEP_S_MAX = 0.5

# Chunks never get shorter than this; below it, reading the weights costs more than the tokens.
CHUNK_TOKENS_MIN = 16


def bucketed(tokens: int) -> int:
    """`tokens` rounded up to whole buckets."""
    return -(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS


@dataclass(frozen=True, slots=True)
class Limits:
    """What a revision's scheduler stays within.

    Attributes:
        slots: Sequences at once.
        kv_tokens: Area of the KV cache: rows times positions, each row as long as the longest.
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
    """

    slots: int
    kv_tokens: int
    chunk_tokens: int = 512
    shared_chunk_tokens: int = 128


@dataclass(frozen=True, slots=True)
class _Planned:
    """A sequence of the step under way, and how many of its tokens it takes in."""

    sequence: LiveSequence
    tokens: int
    draws: bool


class Scheduler:
    """Continuous batching for one revision. `schedule` and `apply` alternate; the rest goes between them."""

    def __init__(self, limits: Limits, end_ids: frozenset[int]) -> None:
        self._limits = limits
        self._end_ids = end_ids
        self._rows: list[LiveSequence] = []
        self._by_key: dict[SequenceKey, LiveSequence] = {}
        self._turns: deque[LiveSequence] = deque()
        self._moves: list[Move] = []
        self._planned: list[_Planned] = []
        self._halvings = 0

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._rows)

    @property
    def keys(self) -> tuple[SequenceKey, ...]:
        """The sequences, by row."""
        return tuple(live.start.key for live in self._rows)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: false when all sequences are paused."""
        return any(live.credit > 0 for live in self._rows)

    def paused_by_session(self) -> Counter[int]:
        """How many sequences of each session wait for credit."""
        return Counter(live.start.key.session for live in self._rows if live.credit == 0)

    def fits(self, start: SequenceStart) -> bool:
        """Whether a slot and its share of the KV cache are free."""
        rows = len(self._rows) + 1
        longest = max((bucketed(start.reserved_tokens), self._capacity()))
        return rows <= self._limits.slots and rows * longest <= self._limits.kv_tokens

    def admit(self, start: SequenceStart) -> tuple[Output, ...]:
        """Gives a sequence a slot; call it only when it `fits`. One that is complete ends at once."""
        emitted = len(start.emitted_ids)
        if emitted >= start.max_tokens:
            return (Output(start.key, emitted, finish=Finish.LENGTH),)
        history = [*start.prompt_ids, *start.emitted_ids]
        live = LiveSequence(start, len(self._rows), history, start.credit_tokens)
        self._rows.append(live)
        self._by_key[start.key] = live
        self._turns.append(live)
        return ()

    def add_credit(self, key: SequenceKey, tokens: int) -> None:
        """Lets a sequence run on; unknown ones are ignored, for they may just have ended."""
        if (live := self._by_key.get(key)) is not None:
            live.credit += tokens

    def end(self, key: SequenceKey, finish: Finish) -> tuple[Output, ...]:
        """Takes a sequence out, between steps; unknown ones are ignored."""
        live = self._by_key.get(key)
        if live is None:
            return ()
        self._release(live)
        return (Output(key, live.emitted, finish=finish),)

    def schedule(self) -> Batch | None:
        """Plans the next step; None when there is nothing to do."""
        decoding = [live for live in self._rows if live.credit > 0 and live.pending == 1]
        chunks = self._plan_chunks(shared=bool(decoding))
        decodes = tuple(_decode(live) for live in decoding)
        self._planned.extend(_Planned(live, 1, draws=True) for live in decoding)
        if not self._planned:
            return None
        moves, self._moves = tuple(self._moves), []
        return Batch(len(self._rows), self._capacity(), moves, chunks, decodes)

    def apply(self, choices: Sequence[Choice]) -> tuple[Output, ...]:
        """Takes in the step's choices, in the order of `Batch.draws`, and tells what came of them."""
        planned, self._planned = self._planned, []
        # All rows first: one that ends below makes another one move, with all that is in it.
        for plan in planned:
            plan.sequence.filled += plan.tokens
        drawing = [plan.sequence for plan in planned if plan.draws]
        return tuple(self._take(live, choice) for live, choice in zip(drawing, choices, strict=True))

    def pace(self, prefill_step_s: float) -> None:
        """Adapts the length of chunks to the time that the last step with one took."""
        if prefill_step_s > PREFILL_STEP_S_MAX:
            if self._limits.shared_chunk_tokens >> self._halvings > CHUNK_TOKENS_MIN:
                self._halvings += 1
        elif prefill_step_s < PREFILL_STEP_S_MAX / 4 and self._halvings:
            self._halvings -= 1

    def fail(self) -> tuple[Output, ...]:
        """Ends every sequence with ERROR: the step under way could not be done."""
        self._planned = []
        return tuple(output for key in self.keys for output in self.end(key, Finish.ERROR))

    def _plan_chunks(self, *, shared: bool) -> tuple[Chunk, ...]:
        whole = self._limits.shared_chunk_tokens if shared else self._limits.chunk_tokens
        budget = max(CHUNK_TOKENS_MIN, whole >> self._halvings)
        chunks: list[Chunk] = []
        waiting: list[LiveSequence] = []
        again: list[LiveSequence] = []
        while self._turns and budget > 0:
            live = self._turns.popleft()
            if live.pending == 1:
                continue
            if live.credit == 0:
                waiting.append(live)
                continue
            taken = min(live.pending, budget)
            budget -= taken
            chunks.append(_chunk(live, taken))
            self._planned.append(_Planned(live, taken, draws=taken == live.pending))
            if taken < live.pending:
                again.append(live)
        # Paused ones keep their place; whoever got a part of a prompt done goes to the end.
        self._turns.extendleft(reversed(waiting))
        self._turns.extend(again)
        return tuple(chunks)

    def _take(self, live: LiveSequence, choice: Choice) -> Output:
        index, key, token = live.emitted, live.start.key, choice.token_id
        if token == NO_TOKEN or token in self._end_ids:
            self._release(live)
            return Output(key, index, finish=Finish.ERROR if token == NO_TOKEN else Finish.STOP)
        live.history.append(token)
        live.credit -= 1
        scores = () if choice.score is None else (choice.score,)
        if live.emitted < live.start.max_tokens:
            return Output(key, index, (token,), scores=scores)
        self._release(live)
        return Output(key, index, (token,), Finish.LENGTH, scores)

    def _release(self, live: LiveSequence) -> None:
        """Frees the row and closes the gap with the last one."""
        del self._by_key[live.start.key]
        if live in self._turns:
            self._turns.remove(live)
        last = self._rows.pop()
        if not self._rows:
            self._moves.clear()
        if last is live:
            return
        if last.filled:
            self._moves.append(Move(last.row, live.row, last.filled))
        last.row = live.row
        self._rows[live.row] = last

    def _capacity(self) -> int:
        """Positions of a row: enough for the longest sequence at its end."""
        return max((bucketed(live.start.reserved_tokens) for live in self._rows), default=0)


def _draw(live: LiveSequence) -> Draw:
    start = live.start
    return Draw(
        start.sampling,
        start.key.sequence,
        live.emitted,
        live.history,
        len(start.prompt_ids),
        start.logprobs,
        start.constraint,
    )


def _chunk(live: LiveSequence, tokens: int) -> Chunk:
    ids = tuple(live.history[live.filled : live.filled + tokens])
    return Chunk(live.row, live.filled, ids, _draw(live) if tokens == live.pending else None)


def _decode(live: LiveSequence) -> Decode:
    return Decode(live.row, live.filled, live.history[-1], _draw(live))
