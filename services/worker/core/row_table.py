"""The rows. Owns: which sequence or kept prefix lies in which row of the KV cache, and what must move. Pure.

Running sequences have the first rows, without gaps: decodes then read one contiguous piece of the cache
most of the time. Kept prefixes lie behind them. Between steps only the table changes; `place` works out
the copies once, when the next step is known.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.worker.core.batch import Move
from services.worker.core.kv_budget import KvBudget
from services.worker.core.prefix_cache import Hit, Prefix, PrefixCache
from services.worker.core.sequence import NO_ROW, LiveSequence


@dataclass(frozen=True, slots=True)
class Layout:
    """What a step's rows are: their number, their positions, and the copies that lead to them."""

    rows: int
    capacity: int
    moves: tuple[Move, ...]


class RowTable:
    """The rows of one revision's KV cache."""

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self.prefixes = PrefixCache(budget)
        self._live: dict[int, LiveSequence] = {}
        self._moves: list[Move] = []
        # Rows that are kept no longer, and from which newcomers of the step copy.
        self._reading: frozenset[int] = frozenset()

    @property
    def running(self) -> list[LiveSequence]:
        """The sequences that have rows, by row."""
        return [self._live[row] for row in sorted(self._live)]

    def vacate(self, live: LiveSequence, *, keep: bool) -> None:
        """Takes a sequence's row; what is in it is kept for others on request, while there is room."""
        if live.row == NO_ROW:
            return
        del self._live[live.row]
        if keep:
            self.prefixes.keep(live.history[: live.filled], live.row)
        live.row, live.filled = NO_ROW, 0

    def place(self, newcomers: Sequence[LiveSequence]) -> Layout:
        """Gives rows to newcomers, with what is known of their tokens, and closes gaps.

        The newcomers fit beside what runs; kept prefixes yield as far as they must.
        """
        self._moves = []
        hits = {live: hit for live in newcomers if (hit := self._find(live)) is not None}
        everyone = [*self._live.values(), *newcomers]
        capacity = self._retain(everyone, hits)
        # Budgets hold at least one whole sequence, so the rows are never fewer than those that run.
        limit = self._budget.tokens // max(capacity, 1)
        gaps = [row for row in range(len(everyone)) if row not in self._live]
        waiting = self._settle_in_place(newcomers, hits, gaps)
        for row in sorted((row for row in self._live if row >= len(everyone)), reverse=True):
            live, target = self._live[row], self._open(gaps, len(everyone), limit)
            del self._live[row]
            self._enter(live, target, Hit(live, live.filled))
        for live in waiting:
            self._enter(live, self._open(gaps, len(everyone), limit), hits.get(live))
        self._lower(len(everyone), limit)
        highest = max([*self._live, *(prefix.row for prefix in self.prefixes)], default=-1)
        return Layout(highest + 1, capacity, tuple(self._moves))

    def _find(self, live: LiveSequence) -> Hit | None:
        hit = self.prefixes.find(live, self._live.values())
        if hit is not None and isinstance(hit.source, Prefix):
            self.prefixes.touch(hit.source)
        return hit

    def _retain(self, everyone: Collection[LiveSequence], hits: dict[LiveSequence, Hit]) -> int:
        """Lets go of what has no room; returns the capacity."""
        sources = {hit.source for hit in hits.values() if isinstance(hit.source, Prefix)}
        used = {hit.source for hit in hits.values() if isinstance(hit.source, Prefix) and hit.consumes}
        # One row more than is filled, and those that are read from: exchanging two rows takes a third.
        rows = len(everyone) + len(sources) + 1
        capacity = self.prefixes.retain(rows, self._budget.capacity(everyone), used)
        self._reading = frozenset(source.row for source in sources.difference(self.prefixes))
        return capacity

    def _settle_in_place(
        self, newcomers: Sequence[LiveSequence], hits: dict[LiveSequence, Hit], gaps: list[int]
    ) -> list[LiveSequence]:
        """Lets newcomers go on in rows that are no longer kept; returns the others."""
        waiting: list[LiveSequence] = []
        for live in newcomers:
            hit = hits.get(live)
            if hit is not None and hit.source.row in gaps and hit.source.row in self._reading:
                gaps.remove(hit.source.row)
                self._enter(live, hit.source.row, hit)
            else:
                waiting.append(live)
        return waiting

    def _open(self, gaps: list[int], first: int, limit: int) -> int:
        """Takes a gap; a prefix that lies there moves behind the rows that run."""
        kept = {prefix.row: prefix for prefix in self.prefixes}
        row = next((row for row in gaps if row not in kept), gaps[0])
        gaps.remove(row)
        if (prefix := kept.get(row)) is not None:
            self._shift(prefix, first, limit)
        return row

    def _lower(self, first: int, limit: int) -> None:
        """Moves prefixes down that lie behind the last row that the budget has."""
        for prefix in self.prefixes:
            if prefix.row >= limit:
                self._shift(prefix, first, limit)

    def _shift(self, prefix: Prefix, first: int, limit: int) -> None:
        taken = {*self._live, *(one.row for one in self.prefixes), *self._reading}
        row = next(row for row in range(first, limit) if row not in taken)
        self._moves.append(Move(prefix.row, row, len(prefix.ids)))
        prefix.row = row

    def _enter(self, live: LiveSequence, row: int, hit: Hit | None) -> None:
        """Puts a sequence into a row, with a copy of what was found."""
        if hit is not None:
            if hit.source.row != row and hit.tokens:
                self._moves.append(Move(hit.source.row, row, hit.tokens))
            live.filled = hit.tokens
        live.row = row
        self._live[row] = live
