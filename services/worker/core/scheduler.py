"""The scheduler. Owns: which sequences run, and what each step does for them. Pure.

Every step decodes all sequences that can, and carries one bounded amount of prefill beside them. So a
running stream waits for at most that amount, and a new one moves with every step. Prefills take turns.

A sequence holds a slot from its admission to its end, and a row of the KV cache while there is room. When
the room runs out, the newest one's row is taken; it waits inside for another, and what it had emitted is
prefilled again. The order of admission is the order of precedence, so the oldest always goes on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.worker.core.batch import Batch, Choice, Chunk, Decode, Draw
from services.worker.core.kv_budget import PREEMPTIONS_MAX, KvBudget
from services.worker.core.pace import PrefillPace
from services.worker.core.row_table import RowTable
from services.worker.core.sequence import NO_ROW, Finish, LiveSequence, Output, SequenceKey, SequenceStart

# What a runner returns for a row whose logits are not finite, or of which a constraint leaves nothing: the
# sequence cannot go on.
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a revision's scheduler stays within.

    Attributes:
        slots: Sequences at once.
        kv_tokens: Area of the KV cache: rows times positions, each row as long as the longest.
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
        prefix_tokens: The part of `kv_tokens` that rows of ended sequences may take; 0: none are kept.
        guess_tokens: Most tokens that are guessed for a sequence that decodes alone; 0: none.
    """

    slots: int
    kv_tokens: int
    chunk_tokens: int = 512
    shared_chunk_tokens: int = 128
    prefix_tokens: int = 0
    guess_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Planned:
    """A sequence of the step under way, how many of its tokens it takes in, and what is guessed to follow."""

    sequence: LiveSequence
    tokens: int
    draws: bool
    guess: tuple[int, ...] = ()


class Scheduler:
    """Continuous batching for one revision. `schedule` and `apply` alternate; the rest goes between them."""

    def __init__(self, limits: Limits, end_ids: frozenset[int]) -> None:
        self._slots = limits.slots
        self._guess_tokens = limits.guess_tokens
        self._end_ids = end_ids
        self._budget = KvBudget(limits.kv_tokens, limits.prefix_tokens)
        self._rows = RowTable(self._budget)
        self._pace = PrefillPace(limits.chunk_tokens, limits.shared_chunk_tokens)
        # By age, the oldest first.
        self._live: dict[SequenceKey, LiveSequence] = {}
        self._turns: deque[LiveSequence] = deque()
        self._planned: list[_Planned] = []

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._live)

    @property
    def cached_rows(self) -> int:
        """Rows of ended sequences that are kept."""
        return len(self._rows.prefixes)

    @property
    def keys(self) -> tuple[SequenceKey, ...]:
        """The sequences, by age."""
        return tuple(self._live)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: false when all sequences are paused."""
        return any(live.credit > 0 for live in self._live.values())

    def paused_by_session(self) -> Counter[int]:
        """How many sequences of each session wait for credit."""
        return Counter(live.start.key.session for live in self._live.values() if live.credit == 0)

    def fits(self, *starts: SequenceStart) -> bool:
        """Whether a slot is free for each, and room in the KV cache that no older sequence waits for."""
        if len(self._live) + len(starts) > self._slots:
            return False
        if any(live.row == NO_ROW and live.preemptions and live.credit for live in self._live.values()):
            return False
        return self._budget.admits(starts, self._live.values())

    def admit(self, start: SequenceStart) -> tuple[Output, ...]:
        """Gives a sequence a slot; call it only when it `fits`. One that is complete ends at once."""
        emitted = len(start.emitted_ids)
        if emitted >= start.max_tokens:
            return (Output(start.key, emitted, finish=Finish.LENGTH),)
        history = [*start.prompt_ids, *start.emitted_ids]
        self._live[start.key] = LiveSequence(start, history, start.credit_tokens)
        return ()

    def add_credit(self, key: SequenceKey, tokens: int) -> None:
        """Lets a sequence run on; unknown ones are ignored, for they may just have ended."""
        if (live := self._live.get(key)) is not None:
            live.credit += tokens

    def end(self, key: SequenceKey, finish: Finish) -> tuple[Output, ...]:
        """Takes a sequence out, between steps; unknown ones are ignored."""
        live = self._live.get(key)
        if live is None:
            return ()
        self._release(live, keep=finish is not Finish.ERROR)
        return (Output(key, live.emitted, finish=finish),)

    def schedule(self, *, beside: bool = False) -> Batch | None:
        """Plans the next step; None when there is nothing to do.

        Args:
            beside: Whether streams of another revision wait for the step, too.
        """
        if not self.has_work:
            return None
        self._make_room()
        newcomers = self._choose_newcomers()
        layout = self._rows.place(newcomers)
        for live in newcomers:
            if not live.preemptions:
                live.cached_tokens = min(live.filled, len(live.start.prompt_ids))
        self._turns.extend(newcomers)
        decoding = [live for live in self._rows.running if live.credit > 0 and live.pending == 1]
        chunks = self._plan_chunks(self._pace.budget(decodes=len(decoding), beside=beside))
        guess = () if chunks or len(decoding) > 1 else self._guess(decoding, layout.capacity)
        decodes = tuple(_decode(live, guess) for live in decoding)
        self._planned.extend(_Planned(live, 1, draws=True, guess=guess) for live in decoding)
        return Batch(layout.rows, layout.capacity, layout.moves, chunks, decodes)

    def apply(self, choices: Sequence[Choice]) -> tuple[Output, ...]:
        """Takes in the step's choices, in the order of `Batch.draws`, and tells what came of them."""
        planned, self._planned = self._planned, []
        # All rows first: what is kept of one that ends below is all that is in it.
        for plan in planned:
            plan.sequence.filled += plan.tokens
        outputs: list[Output] = []
        at = 0
        for plan in planned:
            if plan.draws:
                outputs.append(self._take_all(plan, choices[at : at + 1 + len(plan.guess)]))
                at += 1 + len(plan.guess)
        return tuple(outputs)

    def pace(self, batch: Batch, step_s: float) -> None:
        """Adapts the length of chunks to the time that a step took."""
        tokens = sum(len(chunk.token_ids) for chunk in batch.chunks)
        self._pace.note(step_s, chunk_tokens=tokens, decodes=len(batch.decodes))

    def fail(self) -> tuple[Output, ...]:
        """Ends every sequence with ERROR: the step under way could not be done."""
        self._planned = []
        outputs = tuple(output for key in self.keys for output in self.end(key, Finish.ERROR))
        self.clear()
        return outputs

    def clear(self) -> None:
        """Forgets the rows of ended sequences."""
        self._rows.prefixes.clear()

    def _make_room(self) -> None:
        """Takes rows until those that stay can do their next step."""
        while not self._budget.carries(self._rows.running):
            self._preempt(self._victims(self._rows.running)[0])

    def _choose_newcomers(self) -> list[LiveSequence]:
        """The sequences that get a row, the oldest first; nobody overtakes one that finds no room."""
        chosen: list[LiveSequence] = []
        for live in self._live.values():
            if live.row != NO_ROW or live.credit == 0:
                continue
            running = [*self._rows.running, *chosen]
            if self._rows.prefixes.awaits(live, running):
                continue
            if not self._takes(live, running):
                break
            chosen.append(live)
        return chosen

    def _takes(self, live: LiveSequence, running: Collection[LiveSequence]) -> bool:
        """Whether there is room for a sequence; the rows of paused ones are taken if that makes it."""
        paused = [one for one in self._victims(running) if one.credit == 0]
        if not self._budget.takes_back(live, set(running).difference(paused)):
            return False
        left = list(running)
        while not self._budget.takes_back(live, left):
            left.remove(paused[0])
            self._preempt(paused.pop(0))
        return True

    def _victims(self, running: Collection[LiveSequence]) -> list[LiveSequence]:
        """Whose rows may be taken, in this order: paused ones before others, new ones before old ones."""
        allowed = {one for one in running if one.credit == 0 or one.preemptions < PREEMPTIONS_MAX}
        newest_first = (one for one in reversed(self._live.values()) if one in allowed)
        return sorted(newest_first, key=lambda one: one.credit > 0)

    def _preempt(self, live: LiveSequence) -> None:
        live.preemptions += 1
        self._leave_row(live, keep=True)

    def _leave_row(self, live: LiveSequence, *, keep: bool) -> None:
        self._rows.vacate(live, keep=keep)
        if live in self._turns:
            self._turns.remove(live)

    def _plan_chunks(self, budget: int) -> tuple[Chunk, ...]:
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

    def _guess(self, decoding: Sequence[LiveSequence], capacity: int) -> tuple[int, ...]:
        """What the only sequence of a step may say next, where that can be checked for it alone."""
        if not decoding or not self._guess_tokens or _draw(decoding[0]).adjusts:
            return ()
        (live,) = decoding
        left = live.start.max_tokens - live.emitted
        most = min(self._guess_tokens, live.credit - 1, left - 1, capacity - live.filled - 1)
        return live.lookup.guess(live.history, most)

    def _take_all(self, plan: _Planned, choices: Sequence[Choice]) -> Output:
        """Takes in the choices of one sequence: the first, and each that follows a right guess."""
        live = plan.sequence
        broken = next((choice for choice in choices if choice.token_id == NO_TOKEN), None)
        output = self._take(live, broken or choices[0])
        right = 0
        for guessed, choice in zip(plan.guess, choices[1:], strict=True):
            if output.finish is not None or output.token_ids[-1] != guessed:
                break
            right += 1
            # Its keys and values are in the row already.
            live.filled += 1
            output = output.followed_by(self._take(live, choice))
        if plan.guess:
            live.lookup.learn(right)
        return output

    def _take(self, live: LiveSequence, choice: Choice) -> Output:
        index, key, token = live.emitted, live.start.key, choice.token_id
        cached = live.cached_tokens if index == len(live.start.emitted_ids) else 0
        if token == NO_TOKEN or token in self._end_ids:
            finish = Finish.ERROR if token == NO_TOKEN else Finish.STOP
            self._release(live, keep=finish is Finish.STOP)
            return Output(key, index, (), finish, cached_prompt_tokens=cached, flaw=choice.flaw)
        live.history.append(token)
        live.credit -= 1
        scores = () if choice.score is None else (choice.score,)
        if live.emitted < live.start.max_tokens:
            return Output(key, index, (token,), None, scores, cached)
        self._release(live, keep=True)
        return Output(key, index, (token,), Finish.LENGTH, scores, cached)

    def _release(self, live: LiveSequence, *, keep: bool) -> None:
        """Frees slot and row."""
        del self._live[live.start.key]
        self._leave_row(live, keep=keep)


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


def _decode(live: LiveSequence, guess: tuple[int, ...]) -> Decode:
    return Decode(live.row, live.filled, live.history[-1], _draw(live), guess)
