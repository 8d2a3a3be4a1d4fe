"""The fused parts: what they compute against double precision, and bits that depend on no neighbour."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from services.worker.adapters.fused_attention import BLOCK_POSITIONS
from services.worker.adapters.fused_decoder import Int8Weight, KeptColumns, quantized
from services.worker.adapters.fused_int8 import KEPT_COLUMNS
from services.worker.adapters.fused_parts import FIELDS, FusedShape, compiled
from services.worker.adapters.packed_product import packed

EPS = 1e-5
WIDTH = 200
OUTPUTS = 52


def call(name: str, shape: FusedShape, tensors: dict[str, torch.Tensor], *numbers: int, **words: int) -> None:
    """Calls one of the functions over a frame of these tensors and words."""
    fields = {key: tensor.data_ptr() for key, tensor in tensors.items()} | words
    frame = (ctypes.c_int64 * len(FIELDS))(*(fields.get(field, 0) for field in FIELDS))
    compiled(shape).long(name)(ctypes.addressof(frame), *numbers)


class Layer:
    """A normalization and a product in LLM.int8."""

    def __init__(self, *, bias: bool = True) -> None:
        torch.manual_seed(3)
        self.shape = FusedShape(WIDTH, 32, OUTPUTS, 2, 1, 16, 0.25, EPS)
        self.norm = torch.rand(WIDTH) + 2
        integers, scales = quantized(torch.randn(OUTPUTS, WIDTH))
        # Of the weight as it is held: what its own bytes cost is not these functions' doing.
        self.plain = integers * scales.unsqueeze(1)
        self.bias = torch.randn(OUTPUTS) if bias else None
        self.weight = Int8Weight(packed(integers), scales, self.bias)
        self.kept = KeptColumns(self.weight)
        self.counts: list[int] = []

    def __call__(self, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
        """`[rows, OUTPUTS]`."""
        rows, widest = x.shape[0], self.shape.widest
        step = {
            "states": x.clone(),
            "bytes": torch.zeros((rows, WIDTH), dtype=torch.uint8),
            "steps": torch.zeros(rows),
            "counts": torch.zeros(rows, dtype=torch.int32),
            "columns": torch.zeros((rows, widest), dtype=torch.int32),
            "outliers": torch.zeros((rows, widest)),
            "norm": self.norm,
        }
        product = self.weight.product
        call("enter", self.shape, step, rows, threads, threads, 0)
        self.counts = step["counts"].tolist()
        sums = product(step["bytes"], threads)
        numbers = (rows, threads, threads, sums.data_ptr())
        call("leave", self.shape, step, *numbers, **self.weight.fields, **self.kept.fields)
        return sums.view(torch.float32)[:rows]

    def exactly(self, x: torch.Tensor) -> torch.Tensor:
        """The same in double precision."""
        wide = x.double()
        normed = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * self.norm.double()
        product = normed @ self.plain.double().t()
        return product if self.bias is None else product + self.bias.double()


def rows_with_outliers(rows: int, most: int = 100) -> torch.Tensor:
    """Rows of which every second has outliers, up to `most` in one row."""
    torch.manual_seed(4)
    x = torch.randn(rows, WIDTH)
    for row in range(0, rows, 2):
        x[row, torch.randperm(WIDTH)[: min(1 + 5 * row, most)]] *= 40
    return x


@pytest.mark.parametrize("threads", [1, 2])
def test_outliers_of_one_row_do_not_touch_another(threads: int) -> None:
    """Bit for bit, whatever columns the neighbours' outliers are in."""
    layer, x = Layer(), rows_with_outliers(20)
    together = layer(x, threads)
    for row in range(20):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    assert torch.equal(torch.cat((layer(x[:7], threads), layer(x[7:], threads))), together)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_as_close_as_bytes_are(bias: bool) -> None:  # noqa: FBT001 - a parameter
    """Rows with outliers no less than others."""
    layer, x = Layer(bias=bias), rows_with_outliers(20, most=30)
    wanted = layer.exactly(x)
    errors = (layer(x).double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() < 0.01


def test_outliers_keep_more_bits_than_the_rest() -> None:
    """Without them apart, one scale for all would leave the others a few steps."""
    layer, x = Layer(bias=False), rows_with_outliers(2)[:1]
    wanted = layer.exactly(x)
    mixed = quantized(x)[0].double() * quantized(x)[1].double()
    coarse = (layer.exactly(mixed.float()) - wanted).norm()
    assert (layer(x).double() - wanted).norm() < coarse / 2


def test_more_outlier_columns_than_are_kept_change_nothing() -> None:
    """A call that meets more of them than there are places, and calls that take places from each other."""
    layer, fresh = Layer(), Layer()
    crowded = torch.randn(1, WIDTH) * 0.01
    crowded[0, : KEPT_COLUMNS + 40] = 3.0
    some = torch.randn(3, WIDTH)
    some[:, 150:] *= 30
    first = [layer(crowded), layer(some)]
    for _ in range(3):
        assert torch.equal(layer(some), first[1])
        assert torch.equal(layer(crowded), first[0])
    assert torch.equal(fresh(some), first[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    """The row is not finite, so that it is noticed; its neighbours are what they were."""
    layer, x = Layer(), rows_with_outliers(5)
    before = layer(x)
    x[2, 17] = bad
    after = layer(x)
    assert not after[2].isfinite().any()
    assert layer.counts[2] == 1, "it costs no more than one outlier"
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


class Attention:
    """One layer's attention over a cache of half precision, without a rotation."""

    def __init__(self, queries: int, shared: int, dim: int, capacity: int = 512, rows: int = 3) -> None:
        self.shape = FusedShape(16, 16, 16, queries, shared, dim, dim**-0.5, EPS)
        self.capacity = capacity
        self.cache = torch.zeros((2, rows, shared, capacity, dim), dtype=torch.float16)
        turns = torch.zeros((capacity, dim // 2, 2))
        turns[:, :, 0] = 1.0
        outputs = self.shape.projected
        weight = packed(torch.zeros((outputs, 16), dtype=torch.int8))
        # Sums are whole numbers: these are thousandths, and the scale says so.
        self.weight = Int8Weight(weight, torch.full((outputs,), 0.001), None)
        self.kept = KeptColumns(self.weight)
        self.turns = turns

    def __call__(
        self,
        projected: torch.Tensor,
        rows: list[int],
        positions: list[int],
        *,
        threads: int = 1,
        spoilt: int | None = None,
    ) -> torch.Tensor:
        """Takes tokens in, `[tokens, projected]`; returns what each attended to, `[tokens, attended]`.

        One that is `spoilt` has an outlier that is no number.
        """
        tokens, product = len(rows), (projected * 1000).round().int()
        step = {
            "rows": torch.tensor(rows),
            "positions": torch.tensor(positions),
            "bytes": torch.zeros((tokens, self.shape.attended), dtype=torch.uint8),
            "steps": torch.ones(tokens),
            "counts": torch.zeros(tokens, dtype=torch.int32),
            "columns": torch.zeros((tokens, self.shape.widest), dtype=torch.int32),
            "outliers": torch.zeros((tokens, self.shape.widest)),
            "keys": self.cache[0],
            "values": self.cache[1],
            "turns": self.turns,
        }
        if spoilt is not None:
            step["counts"][spoilt], step["outliers"][spoilt, 0] = 1, math.nan
        numbers = (tokens, threads, threads, product.data_ptr())
        blocks = self.capacity // BLOCK_POSITIONS
        call("attend", self.shape, step, *numbers, blocks=blocks, **self.weight.fields, **self.kept.fields)
        return product.view(torch.float32)[:, : self.shape.attended]

    def exactly(self, projected: torch.Tensor) -> torch.Tensor:
        """The same in double precision, of the tokens of one row from its beginning."""
        shape, tokens = self.shape, projected.shape[0]
        parts = [shape.queries * shape.head_dim, *[shape.shared * shape.head_dim] * 2]
        rounded = (projected * 1000).round() * torch.tensor(0.001)
        query, key, value = torch.split(rounded, parts, dim=1)
        group = shape.queries // shape.shared
        heads = query.double().view(tokens, shape.queries, -1)
        keys, values = (
            part.half().double().view(tokens, shape.shared, -1).repeat_interleave(group, 1)
            for part in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", heads, keys) * shape.scale
        hidden = torch.ones(tokens, tokens).triu(1).bool()
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(tokens, -1)


HEADS = [(4, 2, 16), (9, 3, 64), (2, 1, 128), (4, 4, 24), (7, 1, 40)]


@pytest.mark.parametrize(("queries", "shared", "dim"), HEADS)
def test_attention_is_what_it_is_in_double_precision(queries: int, shared: int, dim: int) -> None:
    """For every position of a row that is longer than three spans; heads need not be whole vectors."""
    attention = Attention(queries, shared, dim)
    projected = torch.randn(400, attention.shape.projected) * 2
    found = attention(projected, [1] * 400, list(range(400)), threads=2)
    assert (found.double() - attention.exactly(projected)).abs().max() < 5e-5


def test_a_token_attends_alike_in_any_company() -> None:
    """Bit for bit: a row's tokens at once, in pieces, one by one, beside another row, on two threads."""
    attention = Attention(4, 2, 16)
    projected, other = torch.randn(2, 300, attention.shape.projected).unbind(0)
    whole = attention(projected, [0] * 300, list(range(300)))
    pieces = [
        attention(projected[a:b], [1] * (b - a), list(range(a, b)), threads=2)
        for a, b in ((0, 7), (7, 135), (135, 300))
    ]
    assert torch.equal(torch.cat(pieces), whole)
    for position in range(300):
        both = torch.stack((projected[position], other[position]))
        found = attention(both, [0, 2], [position, position], threads=2)
        assert torch.equal(found[0], whole[position])


def test_what_lies_behind_a_row_is_not_read() -> None:
    """Whatever an earlier sequence has left there, up to what is no number."""
    clean, dirty = Attention(4, 2, 16), Attention(4, 2, 16)
    dirty.cache.fill_(math.nan)
    projected = torch.randn(140, clean.shape.projected)
    rows, positions = [0] * 140, list(range(140))
    assert torch.equal(dirty(projected, rows, positions), clean(projected, rows, positions))


def test_keys_too_large_for_half_precision_are_the_largest() -> None:
    """A head that overflows would lose its row."""
    attention = Attention(2, 1, 16)
    projected = torch.randn(3, attention.shape.projected)
    projected[1, 32:48] = 1e6
    found = attention(projected, [0] * 3, [0, 1, 2])
    assert torch.all(found.isfinite())
    assert torch.equal(attention.cache[0, 0, 0, :16].view(16, 16)[:, 1], torch.full((16,), 65_504.0).half())


def test_keys_that_are_no_numbers_are_noticed_in_their_row() -> None:
    """By the token that has them and those behind it; another row knows nothing of it."""
    attention = Attention(2, 1, 16)
    projected = torch.randn(4, attention.shape.projected)
    rows, positions = [0, 0, 0, 1], [0, 1, 2, 0]
    clean = attention(projected, rows, positions)
    found = attention(projected, rows, positions, spoilt=1)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert not found[[1, 2]].isfinite().any()
