"""The fused decoder. Owns: the weights of the Llama family in LLM.int8, as the processor uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from services.worker.adapters.fused_int8 import INT8_MAX, KEPT_COLUMNS, TINY
from services.worker.adapters.fused_parts import FusedShape
from services.worker.adapters.lean_decoder import Heads, Turns
from services.worker.adapters.packed_product import BLOCK, WORD, PackedProduct


class Int8Weight:
    """A weight of LLM.int8. Nothing of it changes: any number of passes may use it at once.

    Args:
        weight: int8, as `packed_product.packed` makes it; used as it is: it may be pages of a file that other
            workers share.
        scales: Of each output, `[outputs]`.
        bias: `[outputs]`, or None.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.outputs = scales.shape[0]
        self.product = PackedProduct(weight, self.outputs)
        self.inputs = weight.shape[1] * WORD
        _agree("weight", tuple(weight.shape), (-(-self.outputs // BLOCK), self.inputs // WORD, BLOCK, WORD))
        if bias is not None:
            _agree("bias", tuple(bias.shape), (self.outputs,))
        self._stored = {"weight": weight, "scales": scales}
        if bias is not None:
            self._stored["bias"] = bias.float()

    @property
    def fields(self) -> dict[str, int]:
        """What of a frame of `fused_parts` belongs to the weight."""
        return {"inputs": self.inputs} | _addresses(self._stored)

    @property
    def bytes(self) -> int:
        """Memory of the weight."""
        return sum(tensor.nbytes for tensor in self._stored.values())


class KeptColumns:
    """The columns of a weight that the outliers of one pass after another have met; one pass at a time.

    Args:
        weight: Whose columns they are.
    """

    def __init__(self, weight: Int8Weight) -> None:
        self._tensors = {
            # Pages that nothing was written to take no memory.
            "kept": torch.empty((KEPT_COLUMNS, weight.outputs), dtype=torch.int8),
            "slots": torch.full((weight.inputs,), -1, dtype=torch.int32),
            "owners": torch.full((KEPT_COLUMNS,), -1, dtype=torch.int32),
            "uses": torch.zeros(KEPT_COLUMNS, dtype=torch.long),
            "clock": torch.zeros(2, dtype=torch.long),
        }

    @property
    def fields(self) -> dict[str, int]:
        """What of a frame of `fused_parts` belongs to them."""
        return _addresses(self._tensors)

    @property
    def bytes(self) -> int:
        """Memory that they may come to take."""
        return self._tensors["kept"].nbytes


def _addresses(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """The weights of one layer; most models have no norm of heads.

    Attributes:
        attention_norm: float, `[width]`.
        qkv: To queries, keys and values.
        head_norm: float, `[heads that turn, head_dim]`, or None.
        output: From what was attended to.
        mlp_norm: float, `[width]`.
        gate_up: To the two halves of the inner state.
        down: From their product.
    """

    attention_norm: torch.Tensor
    qkv: Int8Weight
    head_norm: torch.Tensor | None
    output: Int8Weight
    mlp_norm: torch.Tensor
    gate_up: Int8Weight
    down: Int8Weight

    @property
    def weights(self) -> tuple[Int8Weight, ...]:
        """Its weights, in the order in which a token meets them."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class FusedDecoder:
    """A model of the family.

    Attributes:
        embedding: `[vocabulary, width]`, of any floating type.
        layers: In their order.
        norm: After the last layer; float, `[width]`.
        head: To the vocabulary.
        heads: How attention is cut.
        turns: The rotation of each position.
        eps: Of the normalizations.
    """

    embedding: torch.Tensor
    layers: tuple[FusedLayer, ...]
    norm: torch.Tensor
    head: Int8Weight
    heads: Heads
    turns: Turns
    eps: float

    @property
    def shape(self) -> FusedShape:
        """What its functions are compiled for."""
        heads = self.heads
        return FusedShape(
            width=self.embedding.shape[1],
            inner=self.layers[0].down.inputs,
            vocabulary=self.head.outputs,
            queries=heads.queries,
            shared=heads.shared,
            head_dim=heads.dim,
            scale=heads.scale,
            eps=self.eps,
        )

    @property
    def weights(self) -> tuple[Int8Weight, ...]:
        """All of them, in the order in which a token meets them."""
        return (*(weight for layer in self.layers for weight in layer.weights), self.head)

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return self.embedding.nbytes + sum(weight.bytes for weight in self.weights)

    def check(self) -> None:
        """Makes sure that every tensor is as large as the functions take it to be: they would not notice.

        Raises:
            ValueError: One is not.
        """
        shape = self.shape
        outer = {"norm": self.norm.shape, "head": (self.head.inputs,), "embedding": self.embedding.shape[1:]}
        for name, found in outer.items():
            _agree(name, tuple(found), (shape.width,))
        _agree("turns", tuple(self.turns.table(1).shape[1:]), (shape.head_dim // 2,))
        for layer in self.layers:
            for name in ("attention_norm", "mlp_norm"):
                _agree(name, tuple(getattr(layer, name).shape), (shape.width,))
            if layer.head_norm is not None:
                turning = (shape.queries + shape.shared, shape.head_dim)
                _agree("head_norm", tuple(layer.head_norm.shape), turning)
            wanted = (
                (shape.width, shape.projected),
                (shape.attended, shape.width),
                (shape.width, 2 * shape.inner),
                (shape.inner, shape.width),
            )
            for weight, sizes in zip(layer.weights, wanted, strict=True):
                _agree("weight", (weight.inputs, weight.outputs), sizes)


def _agree(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"{name} is {found}, not {wanted}")


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[outputs, inputs]` as int8, and the scale of each output; the weight is left as it is."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp_(min=TINY).div_(INT8_MAX)
    return (wide / scales.unsqueeze(1)).round_().to(torch.int8), scales
