"""Integer products. Owns: how rows of integers meet an int8 weight on this processor.

Every way gives the same integers, for sums of integers are exact in any order; they differ in speed and in
memory. A mapped weight is used as it lies in its file, which all workers of a host share. A packed one is a
copy in the order in which the processor multiplies: many rows take two thirds of the time. Rows come in few
counts, see `row_counts`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.adapters import few_rows
from services.worker.adapters.few_rows import ZERO_POINT

# One row has a kernel of its own that is so fast that up to here several calls beat one.
SINGLE_ROWS = 4


class IntegerProduct(Protocol):
    """A product of rows of bytes with an int8 weight `[outputs, inputs]`."""

    def flip(self, rows: int) -> int:
        """What the bytes of so many rows are to be combined with by exclusive or: 0 or ZERO_POINT."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiplies.

        Args:
            rows: uint8 `[rows, inputs]`, as many as `row_counts.filled` says: signed bytes from -127 to 127,
                flipped as `flip` says.

        Returns:
            `[rows, outputs]`, contiguous and nobody else's: the exact sums as int32, or in single precision,
            each rounded once.
        """
        ...

    @property
    def bytes(self) -> int:
        """Memory of the weight, copies included."""
        ...


class MappedProduct:
    """A product with a weight as it lies in memory or in its file.

    Args:
        weight: int8, `[outputs, inputs]`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._turned = weight.t()

    def flip(self, rows: int) -> int:  # noqa: ARG002 - the port's signature
        """See `IntegerProduct`: signed bytes stay as they are."""
        return 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`; int32."""
        integers = rows.view(torch.int8)
        product = torch._int_mm  # noqa: SLF001 - its only name
        if 1 < integers.shape[0] <= SINGLE_ROWS:
            return torch.cat([product(row, self._turned) for row in torch.split(integers, 1)])
        return product(integers, self._turned)

    @property
    def bytes(self) -> int:
        """See `IntegerProduct`."""
        return self._weight.nbytes


class PackedProduct:
    """A product with a copy of the weight in the processor's own order; see `packs`.

    Args:
        weight: int8, `[outputs, inputs]`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._bytes = weight.nbytes
        # The scales are another's business: sums are what every way has in common.
        self._scales = torch.ones(weight.shape[0])
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def flip(self, rows: int) -> int:  # noqa: ARG002 - the port's signature
        """See `IntegerProduct`: unsigned bytes are multiplied with signed ones, and zero is in the middle."""
        return ZERO_POINT

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`; single precision."""
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rows,
            1.0,
            ZERO_POINT,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product

    @property
    def bytes(self) -> int:
        """Memory of the copy."""
        return self._bytes


class GradedProduct:
    """A product that takes few rows in one way, and more in another.

    Args:
        weight: int8, `[outputs, inputs]`.
        packed: Whether a copy of the weight is kept for many rows.
    """

    def __init__(self, weight: torch.Tensor, *, packed: bool) -> None:
        self._few = few_rows.FewRows(weight) if few_rows.serves(weight) else None
        self._many: IntegerProduct = PackedProduct(weight) if packed else MappedProduct(weight)
        self._bytes = weight.nbytes + (self._many.bytes if packed else 0)

    def flip(self, rows: int) -> int:
        """See `IntegerProduct`."""
        return self._way(rows).flip(rows)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`."""
        return self._way(rows.shape[0])(rows)

    @property
    def bytes(self) -> int:
        """See `IntegerProduct`."""
        return self._bytes

    def _way(self, rows: int) -> IntegerProduct:
        return self._many if self._few is None or rows > few_rows.ROWS_MAX else self._few


def packs() -> bool:
    """Whether this processor multiplies packed weights exactly, and faster.

    Without instructions that add four products of bytes at once the sums of two would be cut at 16 bits.
    """
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_vnni")) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
