"""Integer products: every way gives the same sums."""

from __future__ import annotations

import pytest
import torch

from services.worker.adapters.integer_products import (
    SINGLE_WEIGHT_BYTES,
    ZERO_POINT,
    IntegerProduct,
    MappedProduct,
    PackedProduct,
    packs,
)
from services.worker.core.row_counts import filled


def multiplied(product: IntegerProduct, integers: torch.Tensor) -> torch.Tensor:
    """The product with rows of signed bytes, in single precision."""
    rows = integers.shape[0]
    whole = torch.zeros((filled(rows), integers.shape[1]), dtype=torch.int8)
    whole[:rows] = integers
    return product(whole.view(torch.uint8) ^ product.flip(rows))[:rows].float()


@pytest.mark.parametrize("outputs", [48, (SINGLE_WEIGHT_BYTES >> 8) + 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33])
def test_every_way_gives_the_exact_sums(rows: int, outputs: int) -> None:
    """Also for integers at their ends, where sums cut at 16 bits would show."""
    weight = torch.randint(-127, 128, (outputs, 256), dtype=torch.int8)
    weight[: outputs // 2] = 127
    integers = torch.randint(-127, 128, (rows, 256), dtype=torch.int8)
    integers[0] = 127
    wanted = (integers.double() @ weight.double().t()).float()
    assert torch.equal(multiplied(MappedProduct(weight), integers), wanted)
    if packs():
        assert torch.equal(multiplied(PackedProduct(weight), integers), wanted)


@pytest.mark.skipif(not packs(), reason="the processor packs nothing")
def test_the_single_row_of_a_small_weight_is_not_packed() -> None:
    """Its bytes stay signed; more rows, and the vocabulary's weight, want them turned."""
    small = PackedProduct(torch.zeros((48, 64), dtype=torch.int8))
    large = PackedProduct(torch.zeros((SINGLE_WEIGHT_BYTES >> 6, 64), dtype=torch.int8))
    assert (small.flip(1), small.flip(2), large.flip(1)) == (0, ZERO_POINT, ZERO_POINT)
    assert small.bytes == 2 * 48 * 64
