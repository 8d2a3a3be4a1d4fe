"""Linear layers of the lean forward. Owns: their arithmetic, plain and LLM.int8.

LLM.int8 here is integer arithmetic with single precision around it, and every step of it looks at one row
alone: the scale is the row's, the integer products are exact in any order, and outliers are integers too.
So a row's result is the same, bit for bit, whatever rows are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from services.worker.adapters.integer_products import IntegerProduct, MappedProduct, PackedProduct
from services.worker.core.row_counts import filled

# The paper's outlier threshold (Dettmers et al., 2022).
OUTLIER_THRESHOLD = 6.0

INT8_MAX = 127

# Every integer up to here is exact in single precision, and so is every sum that stays below it.
EXACT_MAX = 1 << 24

# Outliers have 15 bits where few of them share the sum; this is better than the paper's half precision.
OUTLIER_MAX = 32_767

# Outliers come in the same few columns again and again; so many are kept ready as floats. A layer of 576
# inputs has up to five, and 26 before the vocabulary. More than these are gathered each time.
KEPT_COLUMNS = 64

# Keeps the scale of a row of zeros finite.
TINY = 1e-20


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalization: each row over its size, times a weight `[width]`."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension; computed in single precision."""
        wide = x.float()
        return self.weight * (wide * self.factor(wide)).to(x.dtype)

    def factor(self, x: torch.Tensor) -> torch.Tensor:
        """What each row is multiplied by, `[..., 1]`. Each operation rounds once, in every row alike."""
        size: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return size.mul_(size).mul_(1.0 / x.shape[-1]).add_(self.eps).rsqrt_()


class Linear(Protocol):
    """A matrix product with rows `[rows, inputs]`, after a normalization where one is given.

    Attributes:
        by_row: Whether a row's product is the same, bit for bit, beside any other rows.
        packed: Whether a few rows take hardly longer than one.
    """

    by_row: bool
    packed: bool

    def __call__(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """Returns `[rows, outputs]`."""
        ...

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        ...

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether its weight is this very tensor, and no copy."""
        ...


class PlainLinear:
    """A product in the precision of the weights."""

    # The matrix library chooses the order of its sums by the number of rows.
    by_row = False
    packed = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        # Single precision has the same bits in any batch only as it is; half precision has them in none.
        self._fills = weight.device.type == "cpu" and weight.dtype is torch.bfloat16

    def __call__(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """See `Linear`."""
        values, rows = norm(x) if norm else x, x.shape[0]
        if self._fills and (lacking := filled(rows) - rows):
            values = functional.pad(values, (0, 0, 0, lacking))
        return functional.linear(values, self._weight, self._bias)[:rows]

    @property
    def bytes(self) -> int:
        """See `Linear`."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def holds(self, weight: torch.Tensor) -> bool:
        """See `Linear`."""
        return self._weight.data_ptr() == weight.data_ptr()


class Int8Linear:
    """LLM.int8: integers for all but the outliers, which have more bits and a scale of their own.

    Args:
        weight: `[outputs, inputs]`, of any floating type, or int8 with its scales.
        bias: `[outputs]`, or None.
        scales: Of each output, `[outputs]`; None: the weight is quantized here.
        threshold: From which magnitude on an input is an outlier.
        packed: Whether a copy of the weight is kept in the order in which the processor multiplies.
    """

    by_row = True

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        scales: torch.Tensor | None = None,
        threshold: float = OUTLIER_THRESHOLD,
        packed: bool = False,
    ) -> None:
        # Integers are used as they are: they may be pages of a file that other workers share.
        self._weight, self._scales = quantized(weight) if scales is None else (weight, scales)
        self.packed = packed
        make = PackedProduct if packed else MappedProduct
        self._multiply: IntegerProduct = make(self._weight, self._scales)
        self._bias = None if bias is None else bias.float()
        self._threshold = threshold
        self._kept = torch.zeros(0, dtype=torch.long)
        self._kept_weight = torch.zeros(0, weight.shape[0])
        # One for each column that is not kept, else zero.
        self._unkept = torch.ones(weight.shape[1])

    def __call__(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """See `Linear`."""
        values = x if norm is None else norm(x)
        size = _largest(values)
        if (size if size.numel() == 1 else size.max()).item() > self._threshold:
            products = self._split(values, size)
        else:
            products = self._product(values, size)
        return products if self._bias is None else products.add_(self._bias)

    @property
    def bytes(self) -> int:
        """See `Linear`."""
        bias = 0 if self._bias is None else self._bias.nbytes
        return self._multiply.bytes + self._scales.nbytes + bias

    def holds(self, weight: torch.Tensor) -> bool:  # noqa: ARG002 - the port's signature
        """See `Linear`; integers are always a copy."""
        return False

    def _product(self, values: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """The integer product; `size` is the largest magnitude of each row."""
        step = size.clamp(min=TINY).mul_(1.0 / INT8_MAX)
        return self._multiply((values / step).round_()).mul_(step)

    def _split(self, values: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """The same with outliers apart; a row without any gets what `_product` gives it.

        All is arithmetic on floats, for the library computes with those many at a time, and with masks one
        by one.
        """
        outliers = functional.hardshrink(values, self._threshold)
        inner = values - outliers
        products = self._product(inner, _largest(inner))
        columns, weight = self._columns(outliers.abs().amax(0))
        chosen = outliers.index_select(1, columns)
        # The sum of a row's products stays below what single precision holds exactly.
        count = (chosen != 0).sum(1, keepdim=True).clamp_(min=1)
        steps = (EXACT_MAX // INT8_MAX // count).clamp_(max=OUTLIER_MAX).float()
        step = size.clamp(min=TINY).div_(steps)
        integers = (chosen / step).round_()
        return products.add_((integers @ weight).mul_(self._scales).mul_(step))

    def _columns(self, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns that hold all that are not zero, and their weights `[columns, outputs]` as floats.

        Columns too many do no harm: their integers are zero, and the sum is exact.
        """
        if not (largest * self._unkept).max().item() > 0:
            return self._kept, self._kept_weight
        wanted = largest > 0
        columns = (wanted | (self._unkept == 0)).nonzero().squeeze(1)
        if columns.numel() > KEPT_COLUMNS:
            columns = wanted.nonzero().squeeze(1)
            return columns, self._gathered(columns)
        self._unkept = torch.ones_like(self._unkept).index_fill_(0, columns, 0.0)
        self._kept, self._kept_weight = columns, self._gathered(columns)
        return self._kept, self._kept_weight

    def _gathered(self, columns: torch.Tensor) -> torch.Tensor:
        return self._weight.index_select(1, columns).float().t().contiguous()


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[outputs, inputs]` as int8, and the scale of each output; the weight is left as it is."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp_(min=TINY).div_(INT8_MAX)
    return (wide / scales.unsqueeze(1)).round_().to(torch.int8), scales


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, `[rows, 1]`. One operation for both would take six times as long."""
    return values.abs().amax(1, keepdim=True)
