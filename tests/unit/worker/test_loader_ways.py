"""Which forward a revision gets on which device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from services.worker.adapters.packed_product import INPUTS_MAX, WORD
from services.worker.adapters.torch_loader import TorchSettings, _way
from services.worker.core.revision import ComputeDtype, Quantization, RevisionSpec
from tests.fakes import tiny_models


def settings_on(device: str) -> TorchSettings:
    """Settings for a device, which need not be there: a way is chosen before anything is moved."""
    return TorchSettings(torch.device(device), threads=1, slots=8, kv_bytes=lambda: 1 << 20)


def spec_of(quantization: Quantization) -> RevisionSpec:
    """A revision with these weights."""
    return RevisionSpec("m", "r", quantization=quantization, compute_dtype=ComputeDtype.AUTO)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP4])
def test_quantized_weights_on_cuda_run_as_the_librarys_modules(quantization: Quantization) -> None:
    """The integer product of the lean forward is the processor's: CUDA's wants other shapes."""
    way = _way(spec_of(quantization), tiny_models.CONFIGS["llama"](), settings_on("cuda"))
    assert (way.quantization, way.lean, way.dtype) == (quantization, False, torch.bfloat16)


def test_auto_on_cuda_is_plain() -> None:
    """Nobody who asked for nothing gets integers on a GPU; there plain weights are faster."""
    config = tiny_models.CONFIGS["llama"]()
    assert _way(spec_of(Quantization.AUTO), config, settings_on("cuda")).quantization is Quantization.NONE


def test_on_the_processor_int8_is_lean_where_the_model_is_served() -> None:
    """Llama's family has the integer product; others have the library's modules."""
    cpu = settings_on("cpu")
    way = _way(spec_of(Quantization.AUTO), tiny_models.CONFIGS["llama"](), cpu)
    assert (way.quantization, way.lean, way.dtype) == (Quantization.INT8, True, torch.float32)
    assert not _way(spec_of(Quantization.INT8), transformers.GPT2Config(), cpu).lean
    assert not _way(spec_of(Quantization.NF4), tiny_models.CONFIGS["llama"](), cpu).lean


@pytest.mark.parametrize(
    "odd", [{"intermediate_size": 126}, {"hidden_size": 66, "num_attention_heads": 3, "head_dim": 16}]
)
def test_widths_that_are_no_whole_words_are_the_librarys(odd: dict[str, int]) -> None:
    """The product takes four inputs at a time."""
    config = transformers.LlamaConfig(**tiny_models._COMMON | {"num_key_value_heads": 1} | odd)
    assert not _way(spec_of(Quantization.INT8), config, settings_on("cpu")).lean
    assert _way(spec_of(Quantization.AUTO), config, settings_on("cpu")).quantization is Quantization.NONE


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"intermediate_size": INPUTS_MAX // WORD * WORD + WORD},
    ],
    ids=["weights that come quantized", "sums beyond a word"],
)
def test_what_the_integer_products_cannot_hold_is_left_to_the_library(fields: dict[str, Any]) -> None:
    """Numbers of another kind, and rows so wide that a sum could wrap around."""
    config = tiny_models.CONFIGS["llama"]()
    assert _way(spec_of(Quantization.INT8), config, settings_on("cpu")).lean
    config.update(fields)
    assert not _way(spec_of(Quantization.INT8), config, settings_on("cpu")).lean
    assert _way(spec_of(Quantization.AUTO), config, settings_on("cpu")).quantization is Quantization.NONE
