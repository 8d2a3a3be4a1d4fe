"""Weights of the lean forward. Owns: which models it serves, and the layout of their tensors.

A loaded module becomes a stream of named tensors, fused and quantized layer by layer; the same tensors,
mapped from a file or fresh from the stream, become a decoder without another copy.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from services.worker.adapters import vector_code
from services.worker.adapters.fused_decoder import FusedDecoder, FusedLayer, Int8Weight, quantized
from services.worker.adapters.lean_decoder import Heads, Layer, LeanDecoder, Turns
from services.worker.adapters.lean_linear import Linear, Norm
from services.worker.adapters.packed_product import INPUTS_MAX, WORD, packed

# What the decoder was written for, and is tested with. Others run as the library's modules.
KINDS = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Rotations whose frequencies do not depend on the length of the sequence.
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})

Named = Iterator[tuple[str, torch.Tensor]]
"""Tensors with their names, each made when it is asked for."""

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many; what it raises ends the work."""


def serves(config: Any) -> bool:
    """Whether the lean forward computes what a configuration describes."""
    rope = getattr(config, "rope_parameters", None) or {}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in KINDS
        # Weights that come quantized are numbers of another kind.
        and getattr(config, "quantization_config", None) is None
        and not windowed
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROTATIONS
        and rope.get("partial_rotary_factor", 1.0) in (1.0, None)
        and getattr(config, "pretraining_tp", 1) == 1
    )


def fuses(config: Any) -> bool:
    """Whether the fused forward computes it in LLM.int8, on this processor: rows must be whole words."""
    if not vector_code.able() or not serves(config):
        return False
    heads = heads_of(config)
    inputs = (config.hidden_size, config.intermediate_size, heads.queries * heads.dim)
    return not any(count % WORD or count > INPUTS_MAX for count in inputs)


def tensors_of(module: Any, dtype: torch.dtype, progress: Progress, *, int8: bool) -> Named:
    """The tensors of a decoder in their final layout, of a loaded module.

    Args:
        module: The module; for plain weights in `dtype`.
        dtype: Of activations.
        progress: Is told the bytes of the module that are done.
        int8: LLM.int8, with single precision around it. The product with the vocabulary is int8 as well.
            There outliers count: without them apart the perplexity of SmolLM2-135M rises by another per cent.
    """
    model, config = module.model, module.config
    linear = _int8 if int8 else _plain
    total = sum(parameter.nbytes for parameter in module.parameters())
    done = 0
    for number, layer in enumerate(model.layers):
        progress(done, total)
        if number + 1 < len(model.layers):
            _read_ahead(model.layers[number + 1])
        for name, tensor in _layer_tensors(layer, heads_of(config), dtype, linear):
            yield f"layers.{number}.{name}", tensor
        done += sum(parameter.nbytes for parameter in layer.parameters())
    yield "norm", model.norm.weight.detach().to(dtype)
    embedding, head = model.embed_tokens.weight.detach(), module.lm_head
    yield "embedding", embedding
    # A head that is the embedding is one tensor, unless integers make another of it.
    if int8 or head.weight.data_ptr() != embedding.data_ptr():
        yield from linear("head", head.weight.detach(), _detached(head.bias))
    yield "turns.frequencies", model.rotary_emb.inv_freq.float()
    yield "turns.scaling", torch.tensor(float(model.rotary_emb.attention_scaling), dtype=torch.float64)
    progress(total, total)


def decoder(tensors: Mapping[str, torch.Tensor], config: Any, dtype: torch.dtype) -> LeanDecoder:
    """The decoder over plain tensors that `tensors_of` has made; they are used as they are.

    Args:
        tensors: By name.
        config: The model's configuration.
        dtype: Of activations.
    """
    eps, embedding = float(config.rms_norm_eps), tensors["embedding"]
    return LeanDecoder(
        embedding=embedding,
        layers=tuple(_layer(tensors, f"layers.{number}.", eps) for number in range(config.num_hidden_layers)),
        norm=Norm(tensors["norm"], eps),
        head=_linear(tensors, "head") if "head.weight" in tensors else Linear(embedding, None),
        heads=heads_of(config),
        turns=_turns(tensors),
        dtype=dtype,
    )


def fused(tensors: Mapping[str, torch.Tensor], config: Any) -> FusedDecoder:
    """The decoder over int8 tensors that `tensors_of` has made; they are used as they are.

    Args:
        tensors: By name.
        config: The model's configuration.
    """
    weight = partial(_int8_weight, tensors)
    return FusedDecoder(
        embedding=tensors["embedding"],
        layers=tuple(
            FusedLayer(
                attention_norm=tensors[f"{prefix}attention_norm"],
                qkv=weight(f"{prefix}qkv"),
                head_norm=tensors.get(f"{prefix}head_norm"),
                output=weight(f"{prefix}output"),
                mlp_norm=tensors[f"{prefix}mlp_norm"],
                gate_up=weight(f"{prefix}gate_up"),
                down=weight(f"{prefix}down"),
            )
            for prefix in (f"layers.{number}." for number in range(config.num_hidden_layers))
        ),
        norm=tensors["norm"],
        head=weight("head"),
        heads=heads_of(config),
        turns=_turns(tensors),
        eps=float(config.rms_norm_eps),
    )


def heads_of(config: Any) -> Heads:
    """How a model's attention is cut."""
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim, dim**-0.5)


def _plain(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Named:
    yield f"{name}.weight", weight
    if bias is not None:
        yield f"{name}.bias", bias


def _int8(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Named:
    integers, scales = quantized(weight)
    # Stored as the processor wants it, so that no worker makes a copy.
    yield f"{name}.weight", packed(integers)
    yield f"{name}.scales", scales
    if bias is not None:
        yield f"{name}.bias", bias.float()


def _linear(tensors: Mapping[str, torch.Tensor], name: str) -> Linear:
    return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _int8_weight(tensors: Mapping[str, torch.Tensor], name: str) -> Int8Weight:
    weight, scales = tensors[f"{name}.weight"], tensors[f"{name}.scales"]
    return Int8Weight(weight, scales, tensors.get(f"{name}.bias"))


def _turns(tensors: Mapping[str, torch.Tensor]) -> Turns:
    return Turns(tensors["turns.frequencies"], float(tensors["turns.scaling"]))


def _layer_tensors(
    layer: Any, heads: Heads, dtype: torch.dtype, linear: Callable[[str, torch.Tensor, Any], Named]
) -> Named:
    attention, mlp = layer.self_attn, layer.mlp
    turning = [attention.q_proj, attention.k_proj]
    yield "attention_norm", layer.input_layernorm.weight.detach().to(dtype)
    yield from linear("qkv", *_joined([*turning, attention.v_proj], heads.dim, turning=2))
    if hasattr(attention, "q_norm"):
        yield "head_norm", _head_norm(attention, heads)
    yield from linear("output", *_joined([attention.o_proj], heads.dim, turning=0))
    yield "mlp_norm", layer.post_attention_layernorm.weight.detach().to(dtype)
    yield from linear("gate_up", *_joined([mlp.gate_proj, mlp.up_proj], heads.dim, turning=0))
    yield from linear("down", *_joined([mlp.down_proj], heads.dim, turning=0))


def _layer(tensors: Mapping[str, torch.Tensor], prefix: str, eps: float) -> Layer:
    head_norm, linear = tensors.get(f"{prefix}head_norm"), partial(_linear, tensors)
    return Layer(
        attention_norm=Norm(tensors[f"{prefix}attention_norm"], eps),
        qkv=linear(f"{prefix}qkv"),
        head_norm=None if head_norm is None else Norm(head_norm, eps),
        output=linear(f"{prefix}output"),
        mlp_norm=Norm(tensors[f"{prefix}mlp_norm"], eps),
        gate_up=linear(f"{prefix}gate_up"),
        down=linear(f"{prefix}down"),
    )


def _joined(parts: list[Any], dim: int, *, turning: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias of several; the outputs of the first `turning` are paired within each head."""
    weights = [_paired(part.weight.detach(), dim, at < turning) for at, part in enumerate(parts)]
    biases = [
        _paired(part.bias.detach(), dim, at < turning)
        for at, part in enumerate(parts)
        if part.bias is not None
    ]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _paired(tensor: torch.Tensor, dim: int, turning: bool) -> torch.Tensor:  # noqa: FBT001 - a plain fact
    """The library turns place `i` of a head with place `i + dim / 2`; here the two stand side by side."""
    if not turning:
        return tensor
    halves = tensor.reshape(-1, 2, dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _head_norm(attention: Any, heads: Heads) -> torch.Tensor:
    query, key = (
        _paired(norm.weight.detach().float(), heads.dim, turning=True)
        for norm in (attention.q_norm, attention.k_norm)
    )
    return torch.cat((query.expand(heads.queries, -1), key.expand(heads.shared, -1)))


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _read_ahead(layer: Any) -> None:
    """Lets the disk read a layer while the one before it is worked on; the weights may be mapped files."""
    advise = ctypes.CDLL(None).madvise
    for parameter in layer.parameters():
        if parameter.device.type == "cpu":
            begin = parameter.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            length = parameter.data_ptr() + parameter.nbytes - begin
            # A kernel that cannot do it says so, and loses nothing.
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_WILLNEED)
