"""Integer products. Owns: how rows of bytes meet an int8 weight on this processor.

Every way gives the same sums, for those of integers are exact in any order. A weight is used as it lies in
its file, which all workers of a host share: in the order in which the processor multiplies, where it has the
instruction for it (`packed_product`), else as rows, by the matrix library.
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.adapters.packed_product import PackedProduct, is_packed

# One row has a kernel of its own that is so fast that up to here several calls beat one.
SINGLE_ROWS = 4


class IntegerProduct(Protocol):
    """A product of rows of bytes with an int8 weight.

    Attributes:
        flip: What signed bytes are to be combined with, by exclusive or.
        block: Outputs whose bytes lie together in the weight.
        word: Inputs whose bytes do.
    """

    flip: int
    block: int
    word: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiplies.

        Args:
            rows: uint8 `[rows, inputs]`, contiguous: bytes from -127 to 127, flipped.

        Returns:
            The exact sums, int32 `[rows, outputs]`, contiguous and nobody else's.
        """
        ...


class LibraryProduct:
    """A product by the matrix library.

    Args:
        weight: int8, `[outputs, inputs]`.
    """

    flip = 0
    block = 1
    word = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self._turned = weight.t()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`."""
        integers = rows.view(torch.int8)
        product = torch._int_mm  # noqa: SLF001 - its only name
        if 1 < integers.shape[0] <= SINGLE_ROWS:
            return torch.cat([product(row, self._turned) for row in torch.split(integers, 1)])
        return product(integers, self._turned)


def product_with(weight: torch.Tensor, outputs: int) -> IntegerProduct:
    """The product with a weight.

    Args:
        weight: int8, `[outputs, inputs]`, or as `packed_product.packed` makes it.
        outputs: How many outputs it has.
    """
    return PackedProduct(weight, outputs) if is_packed(weight) else LibraryProduct(weight)
