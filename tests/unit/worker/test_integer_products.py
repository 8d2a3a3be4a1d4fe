"""Integer products: every way gives the same sums."""

from __future__ import annotations

import pytest
import torch

from services.worker.adapters import few_rows
from services.worker.adapters.few_rows import FewRows
from services.worker.adapters.integer_products import (
    GradedProduct,
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
    return product(whole.view(torch.uint8) ^ product.flip(filled(rows)))[:rows].float()


@pytest.mark.parametrize("outputs", [48, 53, 4_099])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_gives_the_exact_sums(rows: int, outputs: int, threads: int) -> None:
    """Also for integers at their ends, where sums cut at 16 bits would show."""
    weight = torch.randint(-127, 128, (outputs, 256), dtype=torch.int8)
    weight[: outputs // 2] = 127
    integers = torch.randint(-127, 128, (rows, 256), dtype=torch.int8)
    integers[0] = 127
    wanted = (integers.double() @ weight.double().t()).float()
    ways: list[IntegerProduct] = [MappedProduct(weight), GradedProduct(weight, packed=False)]
    if packs():
        ways += [PackedProduct(weight), GradedProduct(weight, packed=True)]
    if few_rows.serves(weight) and rows <= few_rows.ROWS_MAX:
        ways.append(FewRows(weight))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in ways:
            assert torch.equal(multiplied(way, integers), wanted)
    finally:
        torch.set_num_threads(before)


def test_a_width_that_is_no_multiple_of_an_instruction_goes_the_other_way() -> None:
    """The few rows have no end of their own."""
    weight = torch.randint(-127, 128, (48, 100), dtype=torch.int8)
    assert not few_rows.serves(weight)
    integers = torch.randint(-127, 128, (3, 100), dtype=torch.int8)
    wanted = (integers.double() @ weight.double().t()).float()
    assert torch.equal(multiplied(GradedProduct(weight, packed=False), integers), wanted)


@pytest.mark.skipif(not packs(), reason="the processor packs nothing")
def test_a_copy_counts() -> None:
    """A weight that is packed takes its memory twice."""
    weight = torch.zeros((48, 64), dtype=torch.int8)
    assert GradedProduct(weight, packed=True).bytes == 2 * weight.nbytes
    assert GradedProduct(weight, packed=False).bytes == weight.nbytes
