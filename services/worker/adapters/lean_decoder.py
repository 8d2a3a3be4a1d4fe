"""The lean decoder. Owns: the forward pass of the Llama family with plain weights, in few operations.

Queries, keys and values come from one product, gate and up from another. Pairs that turn together stand
side by side in each head, so that the position's turn is one complex product. Every operation treats each
row by itself, in the same way for one row and for many: see `attend` for what that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from services.worker.adapters.lean_cache import LeanCache, Place
from services.worker.adapters.lean_linear import Linear, Norm
from services.worker.core.row_counts import counts

# The matrix library adds in another order in the rows that are left over from whole fours, so there are none.
QUERY_ROWS = 4

# It also splits longer sums at places that depend on the length; so they are split here, at fixed places.
SUM_POSITIONS = 128

# A worker's steps unless it is told otherwise: 32 sequences that decode, beside 128 tokens of prompts.
REHEARSED_ROWS = 160
REHEARSED_DRAWS = 32

# The table of turns grows by blocks of this many positions; a block is always computed in the same way.
TURN_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer; most models have no norm of heads, `[heads + kv_heads, head_dim]`."""

    attention_norm: Norm
    qkv: Linear
    head_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention is cut.

    Attributes:
        queries: Query heads.
        shared: Heads of keys and values; each serves `queries / shared` query heads.
        dim: Width of a head.
        scale: Factor of the scores.
    """

    queries: int
    shared: int
    dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class Threads:
    """CPU threads of the matrix products, and of attention."""

    products: int
    attention: int


class Turns:
    """The rotation of each position.

    Args:
        frequencies: Of each pair, `[head_dim / 2]`.
        scaling: Factor of the rotated heads.
    """

    def __init__(self, frequencies: torch.Tensor, scaling: float) -> None:
        self._frequencies = frequencies.float()
        self._scaling = scaling
        self._table = self._block(0)

    def at(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Complex factors `[tokens, 1, head_dim / 2]`; positions are below `length`."""
        return self.table(length).index_select(0, positions).unsqueeze(1)

    def table(self, length: int) -> torch.Tensor:
        """Complex factors of at least the first `length` positions, `[positions, head_dim / 2]`."""
        while self._table.shape[0] < length:
            self._table = torch.cat((self._table, self._block(self._table.shape[0])))
        return self._table

    def _block(self, first: int) -> torch.Tensor:
        places = torch.arange(first, first + TURN_BLOCK, device=self._frequencies.device)
        angles = places.float().unsqueeze(1) * self._frequencies
        return torch.complex(angles.cos() * self._scaling, angles.sin() * self._scaling)


@dataclass(frozen=True, slots=True)
class LeanDecoder:
    """A model of the family.

    Attributes:
        embedding: `[vocabulary, width]`.
        layers: In their order.
        norm: After the last layer.
        head: To the vocabulary.
        heads: How attention is cut.
        turns: The rotation of each position.
        dtype: Of activations.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    heads: Heads
    turns: Turns
    dtype: torch.dtype

    def forward(
        self, token_ids: Sequence[int], cache: LeanCache, place: Place, threads: Threads
    ) -> torch.Tensor:
        """Passes the tokens of a place through all layers.

        Returns:
            The last states, `[tokens, width]`.
        """
        ids = torch.tensor(token_ids, device=self.embedding.device)
        x = self.embedding.index_select(0, ids).to(self.dtype)
        turn = self.turns.at(place.positions, place.length)
        targets, mask = cache.targets(place), _mask(place, self.heads, self.dtype)
        for number, layer in enumerate(self.layers):
            heads = self._turned(layer, x, turn)
            queries, states = torch.split(heads, [self.heads.queries, 2 * self.heads.shared], dim=1)
            cache.write(number, states, targets)
            _use(threads.attention)
            attended = attend(queries, *cache.read(number, place), mask, self.heads)
            _use(threads.products)
            x = x + layer.output(attended)
            gate, up = layer.gate_up(x, layer.mlp_norm).chunk(2, dim=1)
            x = x + layer.down(functional.silu(gate).mul_(up))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """From last states to `[tokens, vocabulary]`."""
        return self.head(x, self.norm)

    def rehearse(self) -> None:
        """Multiplies once with each shape of weight for each count of rows; see `row_counts`."""
        width = self.embedding.shape[1]
        layer = self.layers[0]
        for rows in counts(REHEARSED_ROWS):
            x = torch.zeros((rows, width), dtype=self.dtype, device=self.embedding.device)
            layer.qkv(x)
            layer.output(x.new_zeros((rows, self.heads.queries * self.heads.dim)))
            inner = layer.gate_up(x).shape[1] // 2
            layer.down(x.new_zeros((rows, inner)))
            if rows <= REHEARSED_DRAWS:
                self.head(x)

    @property
    def bytes(self) -> int:
        """Memory of the weights; a head that is the embedding counts once."""
        linears = [
            one for layer in self.layers for one in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ]
        weights = self.embedding.nbytes + sum(linear.bytes for linear in linears)
        return weights if self.head.holds(self.embedding) else weights + self.head.bytes

    def _turned(self, layer: Layer, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values `[tokens, heads, head_dim]`; the first two know their position."""
        heads = torch.unflatten(layer.qkv(x, layer.attention_norm), 1, (-1, self.heads.dim)).float()
        turning = heads[:, : self.heads.queries + self.heads.shared]
        if layer.head_norm is not None:
            turning.mul_(layer.head_norm.factor(turning)).mul_(layer.head_norm.weight)
        torch.view_as_complex(torch.unflatten(turning, 2, (-1, 2))).mul_(turn)
        return heads.to(self.dtype)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """Attention whose every row of queries has the same bits in any batch, chunk and bucket.

    Args:
        queries: `[tokens, queries, head_dim]`.
        keys: `[rows * shared, length, head_dim]`: one row for all tokens, or one for each.
        values: As keys.
        mask: Added to the scores, `[rows * shared or 1, tokens of a row, length]`.
        heads: How attention is cut.

    Returns:
        `[tokens, queries * head_dim]`.
    """
    tokens, group = queries.shape[0], heads.queries // heads.shared
    rows = keys.shape[0] // heads.shared
    grouped = queries.reshape(rows, tokens // rows, heads.shared, group, heads.dim).transpose(1, 2)
    stacked = grouped.reshape(keys.shape[0], -1, heads.dim)
    count = stacked.shape[1]
    if count % QUERY_ROWS:
        stacked = functional.pad(stacked, (0, 0, 0, -count % QUERY_ROWS))
    scores = torch.bmm(stacked, keys.transpose(1, 2))
    weights = torch.softmax(torch.add(mask, scores, alpha=heads.scale), dim=-1)
    sums = _weighted(weights, values)[:, :count]
    whole = sums.reshape(rows, heads.shared, tokens // rows, group, heads.dim).transpose(1, 2)
    return whole.reshape(tokens, -1)


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weighted sums, in pieces that begin at fixed positions.

    The pieces are added in float32: among many of them the last ones would be lost in bfloat16, of which a
    sum has eight bits.
    """
    total: torch.Tensor | None = None
    for first in range(0, values.shape[1], SUM_POSITIONS):
        piece = slice(first, first + SUM_POSITIONS)
        part = torch.bmm(weights[:, :, piece], values[:, piece])
        total = part.float() if total is None else total.add_(part)
    assert total is not None
    return total.to(values.dtype)


def _use(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _mask(place: Place, heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    keys = torch.arange(place.length, device=place.positions.device)
    hidden = keys > place.positions.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    if not place.shared:
        return mask.repeat_interleave(heads.shared, 0).unsqueeze(1)
    if mask.shape[0] == 1:
        return mask.unsqueeze(0)
    stacked = mask.repeat_interleave(heads.queries // heads.shared, 0)
    return functional.pad(stacked, (0, 0, 0, -stacked.shape[0] % QUERY_ROWS)).unsqueeze(0)
