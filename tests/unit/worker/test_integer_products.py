"""Integer products: every way gives the same sums."""

from __future__ import annotations

import pytest
import torch

from services.worker.adapters.integer_products import IntegerProduct, LibraryProduct, product_with
from services.worker.adapters.packed_product import BLOCK, PackedProduct, is_packed, packed, packs

needs_instruction = pytest.mark.skipif(not packs(256), reason="the processor multiplies no bytes")


def multiplied(product: IntegerProduct, integers: torch.Tensor) -> torch.Tensor:
    """The product with rows of signed bytes."""
    return product(integers.view(torch.uint8) ^ product.flip)


def case(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, rows, and the sums; also of integers at their ends, where sums cut at 16 bits would show."""
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    weight[: outputs // 2] = 127
    integers = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    integers[0] = 127
    return weight, integers, (integers.double() @ weight.double().t()).int()


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
def test_the_library_gives_the_exact_sums(rows: int) -> None:
    """Few rows one by one, many at once."""
    weight, integers, wanted = case(rows, 48, 256)
    assert torch.equal(multiplied(LibraryProduct(weight), integers), wanted)


@needs_instruction
@pytest.mark.parametrize("outputs", [1, BLOCK - 1, BLOCK, BLOCK + 17, 4_099])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_weight_gives_the_exact_sums(rows: int, outputs: int, threads: int) -> None:
    """For any count of rows and outputs, on any count of threads."""
    weight, integers, wanted = case(rows, outputs, 100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(multiplied(PackedProduct(packed(weight), outputs), integers), wanted)
    finally:
        torch.set_num_threads(before)


@needs_instruction
def test_nothing_is_written_behind_the_last_sum() -> None:
    """The product's memory may be followed by another's."""
    weight, integers, wanted = case(3, BLOCK + 5, 64)
    product = PackedProduct(packed(weight), BLOCK + 5)
    kept = [multiplied(product, integers) for _ in range(200)]
    assert all(torch.equal(sums, wanted) for sums in kept)


@needs_instruction
def test_a_weight_tells_how_it_lies() -> None:
    """A width that is no multiple of four bytes stays as it is."""
    weight, integers, wanted = case(3, 48, 256)
    assert not is_packed(weight)
    assert is_packed(packed(weight))
    assert isinstance(product_with(weight, 48), LibraryProduct)
    assert torch.equal(multiplied(product_with(packed(weight), 48), integers), wanted)
    assert not packs(258)
