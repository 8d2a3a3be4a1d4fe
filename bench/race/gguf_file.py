"""A GGUF file of the same weights. Owns: writing a model of the Llama family in llama.cpp's Q8_0.

Matrices are quantized by the `gguf` package, as llama.cpp's own tool does it; norms stay fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# File types and token types of the format.
_MOSTLY_Q8_0 = 7
_NORMAL, _CONTROL = 1, 3

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class NotConvertible(Exception):
    """The model is not one that this module can write; the message says why."""


def write_q8_0(directory: Path, file: Path) -> None:
    """Writes the model in `directory` (Hugging Face format) to `file`.

    Raises:
        NotConvertible: It is not a plain Llama, or its tokenizer is not byte-level BPE.
    """
    import gguf  # noqa: PLC0415 - only this peer needs it

    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise NotConvertible(
            f"Models of type {config['model_type']} are not written as GGUF; give one with --gguf."
        )
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, config)
    _add_tokenizer(writer, directory, config)
    _add_tensors(writer, directory, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise NotConvertible("Scaled rotary positions are not written as GGUF; give a file with --gguf.")
    writer.add_name("bench")
    writer.add_file_type(_MOSTLY_Q8_0)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))


def _add_tokenizer(writer: Any, directory: Path, config: dict[str, Any]) -> None:
    """The vocabulary; prompts come as token ids, so how text would be split before it does not matter."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise NotConvertible(f"Tokenizers of type {model['type']} are not written as GGUF.")
    tokens = {number: token for token, number in model["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens |= special
    ids = range(config["vocab_size"])
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens.get(number, f"<unused{number}>") for number in ids])
    writer.add_token_types([_CONTROL if number in special else _NORMAL for number in ids])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _add_tensors(writer: Any, directory: Path, config: dict[str, Any]) -> None:
    import safetensors  # noqa: PLC0415 - as above

    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.get("tie_word_embeddings"):
        names["lm_head.weight"] = "output.weight"
    for layer in range(config["num_hidden_layers"]):
        for theirs, written in _LAYER_TENSORS.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{written}.weight"
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads", heads["attn_q"])
    found: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as weights:
            for name in sorted(names.keys() & set(weights.keys())):
                kind = names[name].removesuffix(".weight").rpartition(".")[2]
                values = weights.get_tensor(name).float().numpy()
                _add_tensor(writer, names[name], _interleaved(values, heads.get(kind, 0)))
                found.add(name)
    if missing := names.keys() - found:
        raise NotConvertible(f"The weight files lack {min(missing)}.")


def _add_tensor(writer: Any, name: str, values: Any) -> None:
    import gguf  # noqa: PLC0415 - as above

    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _interleaved(values: Any, heads: int) -> Any:
    """Rows of queries and keys in llama.cpp's order: it rotates neighbours, transformers rotates halves."""
    if not heads:
        return values
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
