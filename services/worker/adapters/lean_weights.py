"""Weights of the lean forward. Owns: which models it serves, and how a loaded module becomes one."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from services.worker.adapters.lean_decoder import Heads, Layer, LeanDecoder, Turns
from services.worker.adapters.lean_linear import Int8Linear, Linear, Norm, PlainLinear

# What the decoder was written for, and is tested with. Others run as the library's modules.
KINDS = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Rotations whose frequencies do not depend on the length of the sequence.
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})


class MakeLinear(Protocol):
    """Makes a linear layer of a weight `[outputs, inputs]` and a bias."""

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Returns the layer; the weight may be used up."""
        ...


def serves(config: Any) -> bool:
    """Whether the lean forward computes what a configuration describes."""
    rope = getattr(config, "rope_parameters", None) or {}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in KINDS
        and not windowed
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROTATIONS
        and rope.get("partial_rotary_factor", 1.0) in (1.0, None)
        and getattr(config, "pretraining_tp", 1) == 1
    )


def plain_decoder(module: Any, dtype: torch.dtype) -> LeanDecoder:
    """The decoder in `dtype`, of a module in that type."""
    return _decoder(module, dtype, PlainLinear, PlainLinear)


def int8_decoder(module: Any) -> LeanDecoder:
    """The decoder in LLM.int8 with single precision around it.

    The product with the vocabulary is int8 as well. There outliers count: without them apart the
    perplexity of SmolLM2-135M rises by another per cent.
    """
    return _decoder(module, torch.float32, Int8Linear, Int8Linear)


def _decoder(module: Any, dtype: torch.dtype, linear: MakeLinear, head: MakeLinear) -> LeanDecoder:
    config, model = module.config, module.model
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim, dim**-0.5)
    rotation = model.rotary_emb
    return LeanDecoder(
        embedding=model.embed_tokens.weight.detach(),
        layers=tuple(_layer(layer, heads, dtype, linear) for layer in model.layers),
        norm=_norm(model.norm, dtype),
        head=head(module.lm_head.weight.detach(), _detached(module.lm_head.bias)),
        heads=heads,
        turns=Turns(rotation.inv_freq, float(rotation.attention_scaling)),
        dtype=dtype,
    )


def _layer(layer: Any, heads: Heads, dtype: torch.dtype, linear: MakeLinear) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm, dtype),
        qkv=_fused(linear, [attention.q_proj, attention.k_proj, attention.v_proj], heads.dim, turning=2),
        head_norm=_head_norm(attention, heads),
        output=linear(attention.o_proj.weight.detach(), _detached(attention.o_proj.bias)),
        mlp_norm=_norm(layer.post_attention_layernorm, dtype),
        gate_up=_fused(linear, [mlp.gate_proj, mlp.up_proj], heads.dim, turning=0),
        down=linear(mlp.down_proj.weight.detach(), _detached(mlp.down_proj.bias)),
    )


def _fused(linear: MakeLinear, parts: list[Any], dim: int, *, turning: int) -> Linear:
    """One layer of several; the outputs of the first `turning` are paired within each head."""
    weights = [_paired(part.weight.detach(), dim, at < turning) for at, part in enumerate(parts)]
    biases = [
        _paired(part.bias.detach(), dim, at < turning)
        for at, part in enumerate(parts)
        if part.bias is not None
    ]
    return linear(torch.cat(weights), torch.cat(biases) if biases else None)


def _paired(tensor: torch.Tensor, dim: int, turning: bool) -> torch.Tensor:  # noqa: FBT001 - a plain fact
    """The library turns place `i` of a head with place `i + dim / 2`; here the two stand side by side."""
    if not turning:
        return tensor
    halves = tensor.reshape(-1, 2, dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return Norm(norm.weight.detach().to(dtype), float(norm.variance_epsilon))


def _head_norm(attention: Any, heads: Heads) -> Norm | None:
    if not hasattr(attention, "q_norm"):
        return None
    query, key = (
        _paired(norm.weight.detach().float(), heads.dim, turning=True)
        for norm in (attention.q_norm, attention.k_norm)
    )
    weight = torch.cat((query.expand(heads.queries, -1), key.expand(heads.shared, -1)))
    return Norm(weight, float(attention.q_norm.variance_epsilon))


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
