"""The pass of the fused decoder. Owns: how the tokens of a step go through its layers.

Four integer products a layer, and after each of them one call into `fused_parts`. All tokens go together,
prompts and decodes, whatever rows and positions they have: no token's numbers depend on its neighbours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from services.worker.adapters.fused_decoder import FusedDecoder, Int8Weight, KeptColumns
from services.worker.adapters.fused_parts import FIELDS, FusedShape, compiled
from services.worker.adapters.lean_cache import LeanRows

# Up to so many tokens a call takes some ten microseconds: a second thread costs as much to wake, and no other
# thread of the interpreter notices that it waits.
FEW_TOKENS = 4

# Scores of attention in a layer, of all heads, that take as long.
FEW_SCORES = 5_000

Frame = ctypes.Array[ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a pass: what is made of a weight's product, and where that lies."""

    weight: Int8Weight
    name: str
    frame: Frame


@dataclass(frozen=True, slots=True)
class _Plan:
    """The calls of a pass, and what they point to; they are made anew whenever that is."""

    first: Frame
    calls: tuple[_Call, ...]
    points_to: tuple[object, ...]


class _Space:
    """What the tokens of a step have besides the cache: numbers that live from one call to the next."""

    def __init__(self, tokens: int, shape: FusedShape) -> None:
        self.tokens = tokens
        self.tensors = {
            "states": torch.empty((tokens, shape.width)),
            "rows": torch.zeros(tokens, dtype=torch.long),
            "positions": torch.zeros(tokens, dtype=torch.long),
            "bytes": torch.zeros(tokens * shape.widest, dtype=torch.uint8),
            "steps": torch.zeros(tokens),
            "counts": torch.zeros(tokens, dtype=torch.int32),
            "columns": torch.empty((tokens, shape.widest), dtype=torch.int32),
            "outliers": torch.empty((tokens, shape.widest)),
        }
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def view(self, rows: int, inputs: int) -> torch.Tensor:
        """The bytes as the rows of a product, `[rows, inputs]`."""
        if (found := self._views.get((rows, inputs))) is None:
            found = self.tensors["bytes"][: rows * inputs].view(rows, inputs)
            self._views[rows, inputs] = found
        return found

    def multiply(self, weight: Int8Weight, rows: int, threads: int) -> torch.Tensor:
        """The product of the first rows, int32 `[rows, outputs]`."""
        return weight.product(self.view(rows, weight.inputs), threads)

    def pick(self, chosen: Sequence[int], tokens: int, inputs: int) -> None:
        """Brings what the next product wants of some tokens to the front, in their order."""
        if list(chosen) == list(range(tokens)):
            return
        index, count = torch.tensor(chosen), len(chosen)
        beside = [self.tensors[name] for name in ("steps", "counts", "columns", "outliers")]
        for part in (self.view(tokens, inputs), *beside):
            part[:count] = part.index_select(0, index)


class FusedPass:
    """Passes of one decoder over its rows of keys and values; one at a time.

    Another one of the same decoder and cache may pass at the same time, over other rows.

    Args:
        decoder: The model.
        rows: Its cache, in half precision and blocks of `fused_attention.BLOCK_POSITIONS`.
    """

    def __init__(self, decoder: FusedDecoder, rows: LeanRows) -> None:
        decoder.check()
        self._decoder = decoder
        self._rows = rows
        self._kept = tuple(KeptColumns(weight) for weight in decoder.weights)
        self._shape = decoder.shape
        self._functions = compiled(self._shape)
        self._space = _Space(FEW_TOKENS, self._shape)
        self._plan: _Plan | None = None

    def forward(
        self,
        token_ids: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        drawn: Sequence[int],
        threads: int,
    ) -> torch.Tensor:
        """Passes tokens through all layers; each attends to the positions of its row up to its own.

        Args:
            token_ids: At least one. Those of one row are in the order of positions.
            rows: Of the cache, for each token.
            positions: Where each stands in its row.
            drawn: Which tokens' logits are wanted, ascending, counted from 0.
            threads: How many may take part.

        Returns:
            `[drawn, vocabulary]`, in single precision.
        """
        if not 0 <= min(rows) <= max(rows) < self._rows.rows or max(positions) >= self._rows.capacity:
            raise ValueError("A token stands outside of the cache.")
        tokens, space = len(token_ids), self._roomy(len(token_ids))
        plan = self._planned(max(positions) + 1)
        ids = torch.tensor(token_ids)
        space.tensors["states"][:tokens] = self._decoder.embedding.index_select(0, ids)
        space.tensors["rows"][:tokens] = torch.tensor(rows)
        space.tensors["positions"][:tokens] = torch.tensor(positions)
        for row, position in zip(rows, positions, strict=True):
            self._rows.fill(row, position + 1)
        scores = (sum(positions) + tokens) * self._shape.queries
        call = self._caller(tokens, scores, threads)
        call("enter", plan.first, tokens, None)
        *calls, last = plan.calls
        for one in calls:
            call(one.name, one.frame, tokens, space.multiply(one.weight, tokens, threads))
        if not drawn:
            return torch.empty((0, self._shape.vocabulary))
        space.pick(drawn, tokens, last.weight.inputs)
        product = space.multiply(last.weight, len(drawn), threads)
        call(last.name, last.frame, len(drawn), product)
        return product.view(torch.float32)

    def give_up(self) -> None:
        """Lets go of layers and rows; nothing passes from then on."""
        self._decoder = replace(self._decoder, layers=())
        self._rows = LeanRows(self._rows.shape, 0)
        self._kept = ()
        self._plan = None

    @property
    def bytes(self) -> int:
        """Memory that the columns it keeps may come to take."""
        return sum(columns.bytes for columns in self._kept)

    def _caller(
        self, tokens: int, scores: int, most: int
    ) -> Callable[[str, Frame, int, torch.Tensor | None], None]:
        """What makes the calls of one pass, of `most` threads."""
        few = tokens <= FEW_TOKENS
        brief = few and scores <= FEW_SCORES
        threads = 1 if few else most
        attending = 1 if scores <= FEW_SCORES else most

        def call(name: str, frame: Frame, count: int, product: torch.Tensor | None) -> None:
            # A vocabulary is long, and a column of it that is met for the first time takes milliseconds.
            function = (self._functions.brief if brief and name != "leave" else self._functions.long)(name)
            place = 0 if product is None else product.data_ptr()
            function(ctypes.addressof(frame), count, threads, attending, place)

        return call

    def _roomy(self, tokens: int) -> _Space:
        """The workspace, with room for so many tokens."""
        if self._space.tokens < tokens:
            # A power of two, so that it is made anew a few times at most.
            self._space = _Space(1 << (tokens - 1).bit_length(), self._shape)
        return self._space

    def _planned(self, length: int) -> _Plan:
        """The calls of a pass, over what is there now."""
        turns = self._decoder.turns.table(length)
        points_to = (self._space, self._rows.layers, turns)
        if self._plan is None or any(
            now is not before for now, before in zip(points_to, self._plan.points_to, strict=True)
        ):
            shared = {name: tensor.data_ptr() for name, tensor in self._space.tensors.items()}
            norm = self._decoder.layers[0].attention_norm
            first = _frame(shared | {"norm": norm.data_ptr()})
            self._plan = _Plan(first, tuple(self._calls(shared, turns)), points_to)
        return self._plan

    def _calls(self, step: dict[str, int], turns: torch.Tensor) -> Iterator[_Call]:
        """The calls after each product of a pass, in their order."""
        decoder, rows = self._decoder, self._rows
        blocks = rows.capacity // rows.shape.block
        shared = step | {"turns": turns.data_ptr(), "blocks": blocks}
        norms = [layer.attention_norm for layer in decoder.layers[1:]] + [decoder.norm]

        kept = iter(self._kept)

        def made(weight: Int8Weight, name: str, **fields: int) -> _Call:
            return _Call(weight, name, _frame(shared | weight.fields | next(kept).fields | fields))

        for layer, norm, cache in zip(decoder.layers, norms, rows.layers, strict=True):
            keys, values = cache
            head_norm = 0 if layer.head_norm is None else layer.head_norm.data_ptr()
            area = {"keys": keys.data_ptr(), "values": values.data_ptr()}
            yield made(layer.qkv, "attend", head_norm=head_norm, **area)
            yield made(layer.output, "join", norm=layer.mlp_norm.data_ptr())
            yield made(layer.gate_up, "gate")
            yield made(layer.down, "join", norm=norm.data_ptr())
        yield made(decoder.head, "leave")


def _frame(fields: dict[str, int]) -> Frame:
    return (ctypes.c_int64 * len(FIELDS))(*(fields.get(name, 0) for name in FIELDS))
