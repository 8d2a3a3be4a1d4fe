"""The prefix cache. Owns: which rows of ended sequences are kept, and what a new sequence finds. Pure.

A kept row is its token ids and where it lies. At most a few dozen are kept, so comparing with all of them
is cheaper than an index would be, and finds the longest match to the token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from services.worker.core.kv_budget import BUCKET_TOKENS, KvBudget, bucketed
from services.worker.core.sequence import LiveSequence

# Copying fewer tokens than that costs as much as computing them.
PREFIX_TOKENS_MIN = 16

# Every new sequence is compared with every kept row.
PREFIX_ROWS_MAX = 64

# Lists are compared by pieces, inside the interpreter's own loop.
_PIECE_TOKENS = 64


@dataclass(slots=True, eq=False)
class Prefix:
    """The row of an ended sequence: its tokens, all of whose keys and values are there."""

    ids: list[int]
    row: int


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `tokens` positions of `source` are those of the sequence that asked."""

    source: LiveSequence | Prefix
    tokens: int

    @property
    def consumes(self) -> bool:
        """Whether nothing worth keeping is left of the source: the sequence goes on in its place."""
        return isinstance(self.source, Prefix) and self.tokens + BUCKET_TOKENS >= len(self.source.ids)


class PrefixCache:
    """The kept rows, least recently used first."""

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._kept: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept or found."""
        return self._budget.prefix_tokens > 0

    def keep(self, ids: list[int], row: int) -> None:
        """Keeps a row, unless it is too short or another one holds the same; it replaces shorter ones."""
        if not self.enabled or len(ids) < PREFIX_TOKENS_MIN:
            return
        if any(prefix.ids[: len(ids)] == ids for prefix in self._kept):
            return
        self._kept = [prefix for prefix in self._kept if ids[: len(prefix.ids)] != prefix.ids]
        self._kept.append(Prefix(ids, row))

    def find(self, live: LiveSequence, running: Iterable[LiveSequence]) -> Hit | None:
        """The longest match among kept and running rows; at least one token is left to compute."""
        if not self.enabled:
            return None
        most = len(live.history) - 1
        found = [Hit(one, common_tokens(live.history, one.ids, most)) for one in reversed(self._kept)]
        found += [
            Hit(one, common_tokens(live.history, one.history, min(one.filled, most))) for one in running
        ]
        best = max(found, key=lambda hit: hit.tokens, default=None)
        return best if best is not None and best.tokens >= PREFIX_TOKENS_MIN else None

    def awaits(self, live: LiveSequence, running: Iterable[LiveSequence]) -> bool:
        """Whether a row that is being prefilled will soon hold more of the sequence than any does now."""
        if not self.enabled:
            return False
        coming = [
            common_tokens(live.history, one.history, len(live.history) - 1)
            for one in running
            if one.credit > 0 and one.pending > 1
        ]
        if max(coming, default=0) < PREFIX_TOKENS_MIN:
            return False
        hit = self.find(live, running)
        return max(coming) >= (hit.tokens if hit else 0) + PREFIX_TOKENS_MIN

    def touch(self, prefix: Prefix) -> None:
        """Notes that a row was used."""
        self._kept.remove(prefix)
        self._kept.append(prefix)

    def retain(self, rows: int, capacity: int, used: Collection[Prefix]) -> int:
        """Lets go of what the budget has no room for beside `rows` rows; returns the capacity with the rest.

        Args:
            rows: Rows that are not to be kept.
            capacity: Positions that each of them must have.
            used: Kept rows that a new sequence goes on in: they are let go, too.
        """
        kept: list[Prefix] = []
        for prefix in reversed(self._kept):
            wide = max(capacity, bucketed(len(prefix.ids)))
            more = len(kept) + 1
            fits = (rows + more) * wide <= self._budget.tokens and more * wide <= self._budget.prefix_tokens
            if fits and more <= PREFIX_ROWS_MAX and prefix not in used:
                kept.append(prefix)
                capacity = wide
        self._kept = kept[::-1]
        return capacity

    def clear(self) -> None:
        """Lets go of everything."""
        self._kept.clear()


def common_tokens(one: list[int], other: list[int], most: int) -> int:
    """How many tokens both begin with, up to `most`."""
    end = min(len(one), len(other), most)
    place = 0
    while place < end and one[place : place + _PIECE_TOKENS] == other[place : place + _PIECE_TOKENS]:
        place += _PIECE_TOKENS
    while place < end and one[place] == other[place]:
        place += 1
    return min(place, end)
