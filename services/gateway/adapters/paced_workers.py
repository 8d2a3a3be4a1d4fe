"""Workers whose tokens are told in turns. Owns: what of an attempt waits for its turn, and what never does.

A pool around the pool that speaks with workers. The first token and every end are told as they come; tokens
that come between two turns are told in the next one as one output. Nothing is lost by it: what waits is told
before an end of any kind, unless the request itself has ended the attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace

from services.common import logs
from services.gateway.adapters.pace import Pace
from services.gateway.core.attempts import Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import TokenLogprob
from services.gateway.core.ports import Attempt, AttemptSink, WorkerPool


class PacedWorkerPool:
    """`WorkerPool` over another one.

    Args:
        pool: Who speaks with workers.
        pace: The turns of all attempts.
    """

    def __init__(self, pool: WorkerPool, pace: Pace) -> None:
        self._pool = pool
        self._pace = pace

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """See `WorkerPool.start`."""
        # The worker shall never pause because tokens wait here.
        paced = _Paced(sink, self._pace, max(1, order.credit_tokens // 4))
        paced.attempt = self._pool.start(worker_id, address, order, paced)
        return paced


@dataclass(slots=True)
class _Gathered:
    """Tokens of a sequence that wait, and what came with the first of them."""

    first: Output
    token_ids: list[int]
    logprobs: list[TokenLogprob]

    def takes(self, output: Output) -> bool:
        """Whether an output goes on where these end, and is like them: what does not fit is told as it is."""
        scores = len(output.token_ids) if self.logprobs else 0
        return output.index == self.first.index + len(self.token_ids) and len(output.logprobs) == scores

    def add(self, output: Output) -> None:
        """Takes an output in."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs

    def whole(self, last: Output) -> Output:
        """All of it as one output, with the end that the last one told."""
        return replace(
            last,
            index=self.first.index,
            token_ids=tuple(self.token_ids),
            cached_prompt_tokens=self.first.cached_prompt_tokens,
            logprobs=tuple(self.logprobs),
        )


@dataclass(slots=True, eq=False)
class _Paced:
    """One attempt, and the sink of it."""

    sink: AttemptSink
    pace: Pace
    tokens_max: int
    # Set before anything can be heard: a pool calls no sink before `start` has returned.
    attempt: Attempt = field(init=False)
    _gathered: dict[int, _Gathered] = field(default_factory=dict)
    # Those that have had a token, and have not ended.
    _begun: set[int] = field(default_factory=set)
    # When each was told last, on the loop's clock.
    _told_s: dict[int, float] = field(default_factory=dict)
    _waits: bool = False
    _over: bool = False

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        sequence = output.sequence
        held = self._gathered.get(sequence)
        if held is not None and not held.takes(output):
            self._tell(sequence)
            if sequence not in self._begun:
                # What heard it has ended the sequence, or the attempt.
                return
            held = None
        if held is not None:
            held.add(output)
        if output.finish is not None:
            self._end(sequence)
            self.sink.output(output if held is None else held.whole(output))
        elif held is not None:
            if len(held.token_ids) >= self.tokens_max:
                self._tell(sequence)
        elif self._may_tell(sequence) or len(output.token_ids) >= self.tokens_max:
            self._pass_on(output)
        else:
            self._gathered[sequence] = _Gathered(output, list(output.token_ids), list(output.logprobs))

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        if self._conclude():
            self.sink.refused(reason, message)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        if self._conclude():
            self.sink.lost(cause, loss)

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""
        self.attempt.add_credit(sequence, tokens)

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""
        self._end(sequence)
        self.attempt.end(sequence)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None]:
        """See `Attempt.cancel`."""
        self._drop()
        return self.attempt.cancel(verdict)

    def _may_tell(self, sequence: int) -> bool:
        """Whether a token need not wait: it is the first, or it is a turn."""
        if sequence not in self._begun:
            self._begun.add(sequence)
            self.pace.begin(1)
            return True
        if not self._waits:
            self._waits = not self.pace.await_turn(self._told_s[sequence], self._come)
        return not self._waits

    def _come(self) -> None:
        """It is a turn: tells all that waits. What hears it may end the attempt meanwhile."""
        self._waits = False
        while self._gathered:
            self._tell(next(iter(self._gathered)))

    def _tell(self, sequence: int) -> None:
        held = self._gathered.pop(sequence)
        self._pass_on(held.whole(held.first))

    def _pass_on(self, output: Output) -> None:
        self._told_s[output.sequence] = asyncio.get_running_loop().time()
        self.sink.output(output)

    def _conclude(self) -> bool:
        """Tells what waits before an end; returns whether the end is still to be told after it."""
        try:
            self._come()
        except Exception:  # noqa: BLE001 - a defect there must not keep the end from those who wait for it
            logs.get_logger().error("attempt.crashed", exc_info=True)
        was_over = self._over
        self._drop()
        return not was_over

    def _end(self, sequence: int) -> None:
        """Nothing of a sequence waits any more, or will."""
        self._gathered.pop(sequence, None)
        if sequence in self._begun:
            self._begun.discard(sequence)
            self.pace.end(1)

    def _drop(self) -> None:
        """The attempt is over."""
        self._over = True
        self.pace.forgo(self._come)
        self._waits = False
        for sequence in tuple(self._begun):
            self._end(sequence)
