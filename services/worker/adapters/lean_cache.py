"""The KV cache of the lean forwards. Owns: where keys and values lie, and how there come to be more of them.

A layer keeps `[2, rows, heads, capacity, head_dim]`: keys, then values; in blocks, keys lie in an order of
their own (see `fused_parts`). Rows and heads are neighbours, so a
piece of the cache is one batch of matrices without a copy, and one copy writes both. Knows positions, never
tokens or requests.

In a host's memory the tensors have all rows that the budget allows, and take pages where something was
written alone: rows cost nothing until they are used, and no stream waits while the cache grows by some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.worker.adapters.lazy_memory import lazy_zeros
from services.worker.adapters.torch_cache import GROWTH_TOKENS, Rows, grown
from services.worker.core.kv_budget import BUCKET_TOKENS, bucketed


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The parts of the cache's shape that belong to the model."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    # Positions that lie together in an order of their own, and are moved together.
    block: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A piece of the cache that a pass reads and writes: several tokens of one row, or one token of each row.

    Attributes:
        rows: The rows.
        row_ids: The row of each token, `[tokens]`.
        positions: The position of each token, `[tokens]`.
        length: Positions that attention reads.
        shared: Whether all tokens belong to one row (prefill); else each has a row of its own.
    """

    rows: Rows
    row_ids: torch.Tensor
    positions: torch.Tensor
    length: int
    shared: bool

    @property
    def tokens(self) -> int:
        """Tokens that it takes in."""
        return self.positions.shape[0]


class LeanRows:
    """The rows of all layers.

    Attributes:
        shape: What does not change.
        rows: Rows that exist.
        capacity: Positions that each has.
        area_tokens: What rows times capacity may come to.
    """

    def __init__(self, shape: CacheShape, area_tokens: int) -> None:
        self.rows = 0
        self.capacity = 0
        self.area_tokens = area_tokens
        self.shape = shape
        # Of each layer; another list whenever they are made anew.
        self.layers: list[torch.Tensor] = []
        # Of each row: how many positions were written since it was last cleared. Zeros lie beyond its block.
        self._filled: list[int] = []

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position of one row, in all layers."""
        shape = self.shape
        return 2 * shape.layers * shape.heads * shape.head_dim * shape.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """Memory that the rows may come to take without growing."""
        return sum(tensor.nbytes for tensor in self.layers)

    def fill(self, row: int, positions: int) -> None:
        """Remembers that a row is written up to there."""
        self._filled[row] = max(self._filled[row], positions)

    def ensure(self, rows: int, capacity: int) -> None:
        """Grows to at least so many rows and positions; whatever is beyond them may be given up."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        before, lazy = (self.rows, self.capacity), self.shape.device.type == "cpu"
        size = spread if lazy else grown
        self.rows, self.capacity = size(before, (rows, self._whole(capacity)), self.area_tokens)
        filled = [min(count, self.capacity) for count in self._filled[: self.rows]]
        self._filled = filled + [0] * (self.rows - len(filled))
        old, self.layers = self.layers, []
        try:
            self._lay_out(old, filled, row_by_row=lazy)
        except BaseException:
            # Half of it is of no use: the next step begins with nothing, as its sequences do. Whoever still
            # has the list keeps no memory with it.
            old.clear()
            self.rows = self.capacity = 0
            self._filled, self.layers = [], []
            raise

    def _lay_out(self, old: list[torch.Tensor], filled: Sequence[int], *, row_by_row: bool) -> None:
        """Makes all layers with what was written in the old ones, which are given up one by one."""
        rows = 1 + max((row for row, count in enumerate(filled) if count), default=-1)
        longest = max(filled, default=0)
        for layer in range(self.shape.layers):
            tensor = self._empty()
            if old and row_by_row:
                for row, count in enumerate(map(self._whole, filled[:rows])):
                    tensor[:, row, :, :count] = old[layer][:, row, :, :count]
            elif old:
                tensor[:, :rows, :, :longest] = old[layer][:, :rows, :, :longest]
            if old:
                old[layer] = tensor.new_empty(0)
            self.layers.append(tensor)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first positions of one row over another row."""
        self.fill(target, tokens)
        count = self._whole(tokens)
        for tensor in self.layers:
            tensor[:, target, :, :count] = tensor[:, source, :, :count]

    def clear(self, row: int) -> None:
        """Overwrites a row with zeros: what is not finite there would reach the row's next sequence."""
        count, self._filled[row] = self._whole(self._filled[row]), 0
        for tensor in self.layers:
            tensor[:, row, :, :count] = 0

    def _whole(self, positions: int) -> int:
        return -(-positions // self.shape.block) * self.shape.block

    def _empty(self) -> torch.Tensor:
        shape = self.shape
        # Zeros, not whatever memory holds: a masked NaN would still spoil the sum.
        size = (2, self.rows, shape.heads, self.capacity, shape.head_dim)
        if shape.device.type == "cpu":
            return lazy_zeros(size, shape.dtype)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)


class LeanCache(LeanRows):
    """The rows as matrices."""

    def look(self, rows: Sequence[int], positions: Sequence[int], tokens: int) -> Place:
        """Where the next pass reads and writes: `tokens` of one row, or one token of each row.

        Args:
            rows: Ascending; one, unless each has one token.
            positions: Where the first token of each row stands.
            tokens: Tokens of each row.
        """
        device = self.shape.device
        for row, position in zip(rows, positions, strict=True):
            self.fill(row, position + tokens)
        length = min(bucketed(max(positions) + tokens), self.capacity)
        row_ids = torch.tensor(rows, device=device)
        places = torch.tensor(positions, device=device)
        if tokens > 1:
            row_ids, places = row_ids.expand(tokens), places + torch.arange(tokens, device=device)
        return Place(Rows.of(rows, device), row_ids, places, length, shared=len(rows) == 1)

    def targets(self, place: Place) -> torch.Tensor:
        """Where `write` puts the states of a place's tokens; it is the same in every layer."""
        heads, device = self.shape.heads, self.shape.device
        kinds = torch.arange(2, device=device).unsqueeze(1) * self.rows
        lines = (kinds + place.row_ids.view(-1, 1, 1)) * heads + torch.arange(heads, device=device)
        return (lines * self.capacity + place.positions.view(-1, 1, 1)).flatten()

    def write(self, layer: int, states: torch.Tensor, targets: torch.Tensor) -> None:
        """Writes the keys and values of each token, `[tokens, 2 * heads, head_dim]`."""
        lines = self.layers[layer].view(-1, self.shape.head_dim)
        lines.index_copy_(0, targets, states.reshape(-1, self.shape.head_dim))

    def read(self, layer: int, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a place's rows, each `[rows * heads, length, head_dim]`."""
        tensor = place.rows.taken(self.layers[layer][:, :, :, : place.length], 1)
        keys, values = tensor.flatten(1, 2).unbind(0)
        return keys, values


def spread(present: tuple[int, int], needed: tuple[int, int], area_tokens: int) -> tuple[int, int]:
    """Rows and positions of a cache whose rows cost nothing until they are used: all that the budget has.

    Positions double, so that a longer sequence seldom makes the cache anew. Where so many have no room, there
    are a quarter more than needed, as far as the budget goes.
    """
    rows, capacity = needed
    wide = max(present[1], GROWTH_TOKENS)
    while wide < capacity:
        wide *= 2
    if rows * wide > area_tokens:
        rest = area_tokens // rows // BUCKET_TOKENS * BUCKET_TOKENS
        wide = max(capacity, min(rest, bucketed(capacity + capacity // 4)))
    return max(rows, area_tokens // wide), wide
