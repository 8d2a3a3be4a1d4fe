"""Linear layers of the lean forward. Owns: their arithmetic in the precision of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from services.worker.core.row_counts import filled


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


class Linear:
    """A product in the precision of the weights, with rows `[rows, inputs]`.

    Args:
        weight: `[outputs, inputs]`.
        bias: `[outputs]`, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        # Single precision has the same bits in any batch only as it is; half precision has them in none.
        self._fills = weight.device.type == "cpu" and weight.dtype is torch.bfloat16

    def __call__(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """Returns `[rows, outputs]`; the rows are normalized first where a norm is given."""
        values, rows = norm(x) if norm else x, x.shape[0]
        if self._fills and (lacking := filled(rows) - rows):
            values = functional.pad(values, (0, 0, 0, lacking))
        return functional.linear(values, self._weight, self._bias)[:rows]

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether its weight is this very tensor, and no copy."""
        return self._weight.data_ptr() == weight.data_ptr()
