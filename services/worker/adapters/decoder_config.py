"""What a configuration says of a decoder. Owns: its attention and context, how to call it, what ends it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from services.common.errors import ArtifactInvalid
from services.worker.adapters.torch_runner import FULL, SLIDING

# A model with neither limit would be a mistake; 4,096 positions are then a careful guess.
CONTEXT_TOKENS_DEFAULT = 4_096


def attention_of(config: Any) -> tuple[frozenset[str], int]:
    """The kinds of attention in a model and its window.

    Raises:
        ArtifactInvalid: There are layers of another kind, or another half beside the decoder.
    """
    text = config.get_text_config()
    if config.is_encoder_decoder or not getattr(text, "is_decoder", True):
        raise ArtifactInvalid(f"Models of type {config.model_type} have an encoder; decoders are served.")
    if not getattr(text, "num_attention_heads", 0):
        raise ArtifactInvalid(f"Models of type {config.model_type} have no attention; it is needed.")
    window = int(getattr(text, "sliding_window", None) or 0)
    kinds = frozenset(getattr(text, "layer_types", None) or ())
    if not kinds:
        slides = window > 0 and getattr(text, "use_sliding_window", True)
        kinds = frozenset({SLIDING if slides else FULL})
    if not kinds <= {FULL, SLIDING}:
        other = ", ".join(sorted(kinds - {FULL, SLIDING}))
        raise ArtifactInvalid(
            f"Models of type {config.model_type} have layers that cannot be served: {other}."
        )
    return kinds, window


def context_of(config: Any, asked: int) -> int:
    """Most tokens of prompt and output: as asked, within the model's positions; `asked` 0: all of them."""
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or CONTEXT_TOKENS_DEFAULT)
    return min(asked or positions, positions)


def check_rotation(config: Any, asked: int) -> None:
    """Refuses a context in which a sequence's rotation would depend on its length.

    The library turns all rows of a pass by the long factors as soon as one of them is longer than the model
    was first trained for: keys that are cached were turned by others, and neighbours would change an answer.
    `dynamic` does so beyond `max_position_embeddings` alone, where no context goes.

    Args:
        config: The configuration.
        asked: The revision's context in tokens; 0: as long as the model allows.

    Raises:
        ArtifactInvalid: It is one; the message says how long the context may be.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    context = context_of(config, asked)
    # One rotation, or one for each kind of layer.
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") != "longrope":
            continue
        original = one.get("original_max_position_embeddings")
        if not isinstance(original, int) or original < 1:
            raise ArtifactInvalid(
                "config.json: `longrope` without a usable original_max_position_embeddings."
            )
        if context > original:
            raise ArtifactInvalid(
                f"Models of type {config.model_type} with longrope are served with up to {original} tokens "
                f"of context, and this revision has {context}: set context_tokens to at most {original}."
            )


def check_forward(config: Any) -> None:
    """Refuses a model that takes neither positions nor a cache: rows of several lengths need both.

    Raises:
        ArtifactInvalid: It is one.
    """
    decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    accepted = inspect.signature(decoder.forward).parameters
    wanted = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
    if any(name not in accepted for name in wanted):
        raise ArtifactInvalid(f"Models of type {config.model_type} cannot decode several lengths at once.")


def end_ids(directory: Path, config: Any) -> frozenset[int]:
    """What ends an answer: the tokens that the generation settings name, and the model's own."""
    settings: Any = GenerationConfig
    if (directory / "generation_config.json").is_file():
        generation = settings.from_pretrained(directory, local_files_only=True)
    else:
        generation = settings.from_model_config(config)
    found: set[int] = set()
    for entry in (generation.eos_token_id, config.get_text_config().eos_token_id):
        found.update(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return frozenset(found)
