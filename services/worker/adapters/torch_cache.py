"""The KV cache. Owns: where the keys and values of each sequence lie, as rows of preallocated tensors.

A layer keeps `[rows, heads, capacity, head_dim]`. One forward pass either takes several tokens of one row
(prefill) or one token of several rows (decode); `look` says which before the pass begins. Knows positions,
never tokens or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from services.worker.core.kv_budget import BUCKET_TOKENS, bucketed

# Rows grow by longer pieces than attention does: each growth copies what is there.
GROWTH_TOKENS = 256


class RowCache(Protocol):
    """Rows of keys and values, as a runner handles them between passes."""

    area_tokens: int
    rows: int

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position of one row, in all layers."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory of what exists now."""
        ...

    def ensure(self, rows: int, capacity: int) -> None:
        """Grows to at least so many rows and positions; whatever is beyond them may be given up."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first positions of one row over another row."""
        ...

    def clear(self, row: int) -> None:
        """Overwrites a row with zeros."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor, ascending: all between the first and the last, or some of them.

    Attributes:
        first: The first one.
        span: Rows from there to the last one, both included.
        picks: Which of them, counted from the first; None: all, and nothing is copied.
    """

    first: int
    span: int
    picks: torch.Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int], device: torch.device) -> Rows:
        """These rows."""
        first, span = rows[0], rows[-1] - rows[0] + 1
        picks = None if span == len(rows) else torch.tensor(rows, device=device) - first
        return cls(first, span, picks)

    def taken(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows of a tensor along `dim`.

        What a library picks from it first makes contiguous, to the last row: so it is given no more than lies
        between the first and the last that are picked.
        """
        part = tensor.narrow(dim, self.first, self.span)
        return part if self.picks is None else part.index_select(dim, self.picks)


@dataclass(slots=True)
class _View:
    """The piece of the cache that the pass under way reads and writes.

    Attributes:
        rows: The rows.
        row_ids: The same rows as an index tensor, for writing.
        positions: For decode: the position of each row's token, shape `[batch]`.
        start: For prefill: the position of the first token.
        length: Positions that attention reads.
    """

    rows: Rows
    row_ids: torch.Tensor
    positions: torch.Tensor
    start: int
    length: int


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call] # the library's hook has no types
    """Keys and values of one layer of the model."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # the library has no types here
        self._owner = owner
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the rows; shapes and dtype are those that the model produces."""
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes each row at its own position and returns what attention reads.

        Args:
            key_states: `[batch, heads, tokens, head_dim]`, the new keys.
            value_states: The new values, of the same form.

        Returns:
            Keys and values of the batch's rows, `[batch, heads, length, head_dim]`.
        """
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        view = self._owner.view
        return _write(self.keys, key_states, view), _write(self.values, value_states, view)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - the library's signature
        """Length and offset of a mask; ours is explicit, so this is for completeness."""
        return self._owner.view.length, 0

    def get_seq_length(self) -> int:
        """Positions before the pass; meaningful for one row only."""
        return self._owner.view.start

    def get_max_length(self) -> int:
        """Positions that a row has."""
        return self._owner.capacity

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values; empty before the first pass."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def resize(self, rows: int, capacity: int) -> None:
        """Copies what fits into tensors of another size."""
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, rows, capacity)
            self.values = _resized(self.values, rows, capacity)

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        heads, dim = states.shape[1], states.shape[3]
        # Zeros, not whatever memory holds: a masked NaN would still spoil the sum.
        return states.new_zeros((self._owner.rows, heads, self._owner.capacity, dim))


class SlotCache(Cache):
    """The rows of all layers.

    Attributes:
        rows: Rows that exist.
        capacity: Positions that each has.
        view: The piece that the pass under way uses.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.rows = 0
        self.capacity = 0
        # What rows times capacity may come to; the first passes, which measure, need little.
        self.area_tokens = 2 * GROWTH_TOKENS
        self._device = device
        self.view = _View(Rows(0, 0, None), torch.empty(0), torch.empty(0), 0, 0)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position of one row, in all layers; known after the first pass."""
        tensors = [tensor for layer in self._slot_layers for tensor in layer.tensors]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    @property
    def held_bytes(self) -> int:
        """Memory of what exists now."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def look(self, rows: Sequence[int], positions: Sequence[int], tokens: int) -> int:
        """Says what the next pass is about, and returns the length that its attention reads.

        Args:
            rows: Ascending; one, unless each has one token.
            positions: Where the first token of each row stands.
            tokens: Tokens of each row.
        """
        length = min(bucketed(max(positions) + tokens), self.capacity)
        row_ids = torch.tensor(rows, device=self._device)
        places = torch.tensor(positions, device=self._device)
        self.view = _View(Rows.of(rows, self._device), row_ids, places, positions[0], length)
        return length

    def ensure(self, rows: int, capacity: int) -> None:
        """Grows to at least so many rows and positions; whatever is beyond them may be given up."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        self.rows, self.capacity = grown((self.rows, self.capacity), (rows, capacity), self.area_tokens)
        try:
            for layer in self._slot_layers:
                layer.resize(self.rows, self.capacity)
        except BaseException:
            # Half of it is of no use: the next step begins with nothing, as its sequences do.
            self.rows = self.capacity = 0
            self.give_up()
            raise

    def give_up(self) -> None:
        """Frees the memory now: cache and layers refer to each other, and collections are far between."""
        for layer in self._slot_layers:
            layer.keys = layer.values = None

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first positions of one row over another row."""
        for tensor in self._tensors():
            tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def clear(self, row: int) -> None:
        """Overwrites a row with zeros: what is not finite there would reach the row's next sequence."""
        for tensor in self._tensors():
            tensor[row].zero_()

    @property
    def _slot_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self._slot_layers for tensor in layer.tensors]


def grown(present: tuple[int, int], needed: tuple[int, int], area_tokens: int) -> tuple[int, int]:
    """Rows and positions of a cache that grows, inside its budget of rows times positions."""
    rows, capacity = needed
    wide = max(present[1], -(-capacity // GROWTH_TOKENS) * GROWTH_TOKENS)
    tall = max(present[0], 1 << (rows - 1).bit_length())
    # Room to spare is welcome while the budget has it. If not, all that it has for so many rows: each
    # further growth would copy everything again.
    fitting = [(tall, wide), (rows, wide), (tall, capacity)]
    rest = area_tokens // rows // BUCKET_TOKENS * BUCKET_TOKENS
    return next((size for size in fitting if size[0] * size[1] <= area_tokens), (rows, max(capacity, rest)))


def _write(cache: torch.Tensor, states: torch.Tensor, view: _View) -> torch.Tensor:
    batch, _, tokens, _ = states.shape
    if batch == 1:
        cache[view.rows.first, :, view.start : view.start + tokens] = states[0]
    else:
        cache[view.row_ids, :, view.positions] = states[:, :, 0]
    return view.rows.taken(cache[:, :, : view.length], 0)


def _resized(tensor: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    larger = tensor.new_zeros((rows, tensor.shape[1], capacity, tensor.shape[3]))
    kept_rows, kept = min(rows, tensor.shape[0]), min(capacity, tensor.shape[2])
    larger[:kept_rows, :, :kept] = tensor[:kept_rows, :, :kept]
    return larger
