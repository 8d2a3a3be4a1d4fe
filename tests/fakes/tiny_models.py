"""Tiny random models: real architectures of transformers, small enough to make in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec
from tests.fixtures import tiny_tokenizer

VOCABULARY = 96
SPEAKING_VOCABULARY = 272

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large weights make confident logits: ties between tokens would test rounding, not the cache.
    "initializer_range": 0.4,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    # Four query heads to one of keys, wide enough for outliers, and a rotation that scales.
    "llama-wide": lambda: transformers.LlamaConfig(
        **_COMMON | {"hidden_size": 128, "num_attention_heads": 8, "attention_bias": True, "mlp_bias": True},
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**_COMMON, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, head_dim=16, sliding_window=24),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_COMMON, head_dim=16, sliding_window=24),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=24),
    "mistral-full": lambda: transformers.MistralConfig(**_COMMON, sliding_window=None),
    "phi": lambda: transformers.PhiConfig(**_COMMON),
}


def save(name: str, directory: Path, *, seed: int = 0, speaks: bool = False) -> RevisionSpec:
    """Makes a random model of an architecture in `directory`, and the specification that names it.

    One that `speaks` has the tiny tokenizer beside it, and a few ids more than that, as real models do.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if speaks:
        config.vocab_size, config.eos_token_id = SPEAKING_VOCABULARY, tiny_tokenizer.END
        tiny_tokenizer.write_tokenizer(directory)
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config)
    model.save_pretrained(directory)
    return spec_of(directory)


def spec_of(
    directory: Path,
    quantization: Quantization = Quantization.NONE,
    compute_dtype: ComputeDtype = ComputeDtype.FP32,
) -> RevisionSpec:
    """The specification of what lies in `directory`."""
    files = tuple(RevisionFile(path.name, path.stat().st_size, "0" * 64) for path in directory.iterdir())
    return RevisionSpec("tiny", "r1", files, quantization, compute_dtype, local_path=str(directory))
