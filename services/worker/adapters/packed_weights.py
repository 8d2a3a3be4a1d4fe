"""Four-bit weights as the processor's own kernel wants them. Owns: storing that layout, and giving it back.

Where the processor multiplies bfloat16, bitsandbytes packs a four-bit weight anew before its first product:
a copy of the whole model in each worker. So it is packed once, stored, and mapped. The library is large and
talks on the terminal when it is imported: only who needs it imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from services.worker.adapters import mapped_tensors

_FILE = "packed.safetensors"


def packs() -> bool:
    """Whether this machine's kernel has a layout of its own."""
    from bitsandbytes import functional  # noqa: PLC0415 - see above

    ask: Any = functional.has_avx512bf16
    return bool(ask())


def store(module: Any, directory: Path) -> None:
    """Packs the weights of a module on CPU and writes them; without such weights nothing is written."""
    layers = list(_layers(module))
    if layers:
        mapped_tensors.write(directory / _FILE, _packed(layers))


def restore(module: Any, directory: Path, progress: mapped_tensors.Progress) -> None:
    """Puts what `store` has written in the place of a module's weights."""
    if not (directory / _FILE).exists():
        return
    tensors = mapped_tensors.read(directory / _FILE, progress)
    for name, layer in _layers(module):
        state = layer.weight.quant_state
        state.original_dtype, state.original_nested = state.dtype, state.nested
        state.original_qshape = layer.weight.data.shape
        layer.weight.data, state.absmax = tensors[f"{name}.weight"], tensors[f"{name}.absmax"]
        state.dtype, state.nested, state.packing_format_for_cpu = torch.bfloat16, False, True
        state.state2 = None


def _layers(module: Any) -> Iterator[tuple[str, Any]]:
    """The layers that the library would pack."""
    from bitsandbytes import nn  # noqa: PLC0415 - see above

    kind: Any = nn.Linear4bit  # type: ignore[attr-defined] # the library names it in no `__all__`
    for name, layer in module.named_modules():
        if isinstance(layer, kind) and layer.support_avx512bf16_for_cpu and layer.weight.device.type == "cpu":
            yield name, layer


def _packed(layers: list[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes import functional  # noqa: PLC0415 - see above

    for name, layer in layers:
        convert: Any = functional._convert_weight_packed_for_cpu  # noqa: SLF001 - its only name
        weight, state = convert(layer.weight.data, layer.weight.quant_state)
        yield f"{name}.weight", weight
        yield f"{name}.absmax", state.absmax
        layer.weight.data = weight.new_empty(0)
