"""Integer products. Owns: how rows of integers meet an int8 weight on this processor.

Every way gives the same integers, for sums of integers are exact in any order; they differ in speed and in
memory. A mapped weight is used as it lies in its file, which all workers of a host share. A packed one is a
copy in the order in which the processor multiplies: from two rows on it is faster by a third to a half. Rows
are filled up to few counts, see `row_counts`, with whatever memory holds.
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.core.row_counts import filled

# One row has a kernel of its own that is so fast that up to here several calls beat one.
SINGLE_ROWS = 4

# The kernel of one row loses to the packed weight only where there is much to read: before the vocabulary.
SINGLE_WEIGHT_BYTES = 1 << 24

# The packed product multiplies unsigned bytes with signed ones; zero is in the middle. Turning the highest
# bit of a signed byte adds as much.
ZERO_POINT = 128


class IntegerProduct(Protocol):
    """A product of rows with an int8 weight `[outputs, inputs]`, scaled by output."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiplies.

        Args:
            rows: `[rows, inputs]`, whole numbers from -127 to 127 in single precision.

        Returns:
            `[rows, outputs]` in single precision: the integer sum, rounded once, times the output's scale.
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
        scales: Of each output, `[outputs]`.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        self._weight = weight
        self._turned = weight.t()
        self._scales = scales

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`."""
        integers = _as_bytes(rows)
        product = torch._int_mm  # noqa: SLF001 - its only name
        if 1 < integers.shape[0] <= SINGLE_ROWS:
            sums = torch.cat([product(row, self._turned) for row in torch.split(integers, 1)])
        else:
            sums = product(integers, self._turned)
        return _unfilled(sums, rows).float().mul_(self._scales)

    @property
    def bytes(self) -> int:
        """See `IntegerProduct`."""
        return self._weight.nbytes


class PackedProduct:
    """A product with a copy of the weight in the processor's own order; see `packs`.

    Args:
        weight: int8, `[outputs, inputs]`; single rows go on using it.
        scales: Of each output, `[outputs]`.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        self._single = MappedProduct(weight, scales)
        self._singly = weight.nbytes < SINGLE_WEIGHT_BYTES
        self._bytes = 2 * weight.nbytes
        self._scales = scales
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `IntegerProduct`."""
        if self._singly and rows.shape[0] == 1:
            return self._single(rows)
        # To unsigned bytes the library converts one number at a time.
        unsigned = _as_bytes(rows).view(torch.uint8).bitwise_xor_(ZERO_POINT)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned,
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
        return _unfilled(product, rows)

    @property
    def bytes(self) -> int:
        """See `IntegerProduct`."""
        return self._bytes


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The rows as int8, in a new tensor of as many as they are filled up to."""
    count = rows.shape[0]
    if (wanted := filled(count)) == count:
        # Where few rows decode, each operation is noticed.
        return rows.to(torch.int8, memory_format=torch.contiguous_format)
    whole = torch.empty((wanted, rows.shape[1]), dtype=torch.int8, device=rows.device)
    whole[:count] = rows
    return whole


def _unfilled(products: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The products of the rows themselves."""
    count = rows.shape[0]
    return products if products.shape[0] == count else products[:count]


def packs() -> bool:
    """Whether this processor multiplies packed weights exactly, and faster.

    Without instructions that add four products of bytes at once the sums of two would be cut at 16 bits.
    """
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_vnni")) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
