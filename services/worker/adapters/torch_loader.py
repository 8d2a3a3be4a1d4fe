"""The loader. Owns: how a directory becomes a runner, and which models are refused.

Any decoder of transformers is welcome whose layers have full or sliding attention. Whether it really can
be served over slots is tried, not believed: after loading, the same tokens pass the model with and
without the slot cache, and the logits must agree.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from services.common.errors import ArtifactInvalid, InterlockError
from services.worker.adapters import lean_weights
from services.worker.adapters.lean_decoder import LeanDecoder
from services.worker.adapters.lean_runner import LeanRunner
from services.worker.adapters.safetensors_files import check_files, read_config
from services.worker.adapters.torch_probe import probe
from services.worker.adapters.torch_runner import FULL, SLIDING, DecoderModel, TorchRunner
from services.worker.core.kv_budget import BUCKET_TOKENS
from services.worker.core.revision import ComputeDtype, ModelFacts, Quantization, RevisionSpec

# The paper's outlier threshold (Dettmers et al., 2022).
INT8_THRESHOLD = 6.0

# A model with neither limit would be a mistake; 4,096 positions are then a careful guess.
CONTEXT_TOKENS_DEFAULT = 4_096


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """What one machine gives to its models.

    Attributes:
        device: Where they compute.
        threads: CPU threads of a forward pass.
        slots: Sequences at once: no more KV cache than they can fill is used.
        kv_bytes: Tells the budget of the KV cache at the moment of loading, in bytes.
        lean: Whether the lean forward runs what it can; without it, everything runs as modules.
    """

    device: torch.device
    threads: int
    slots: int
    kv_bytes: Callable[[], int]
    lean: bool = True


class TorchLoader:
    """Loads revisions with torch and transformers."""

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings
        # The library talks to terminals; a service logs what matters itself.
        library_logs: Any = transformers.utils.logging
        library_logs.set_verbosity(logging.CRITICAL)
        library_logs.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

    def verify(self, directory: Path, spec: RevisionSpec) -> None:
        """See `RevisionLoader.verify`."""
        kind = str(read_config(directory)["model_type"])
        check_files(directory, spec)
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ArtifactInvalid(f"Models of type {kind} are not decoders that can be served.")
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception:  # noqa: BLE001 - whatever a foreign configuration does to the library
            raise ArtifactInvalid("config.json: the library cannot read it.") from None
        _attention(config)
        _check_forward(config)

    def load(self, directory: Path, spec: RevisionSpec) -> TorchRunner:
        """See `RevisionLoader.load`."""
        try:
            return self._load(directory, spec)
        except (InterlockError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # The library's message may hold a path; its class is what the cause chain is for.
            raise ArtifactInvalid(
                f"The weights do not make the model that config.json describes ({error.__class__.__name__})."
            ) from error

    def _load(self, directory: Path, spec: RevisionSpec) -> TorchRunner:
        settings = self._settings
        torch.set_num_threads(settings.threads)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        way = _way(spec, config, settings)
        module = _read(directory, config, way, settings.device)
        attention, window = _attention(config)
        layers = int(text.num_hidden_layers)
        model = DecoderModel(module, layers, attention, window, settings.device, way.dtype, settings.threads)
        runner = LeanRunner(model, way.decoder(module)) if way.lean else TorchRunner(model)
        exact = way.dtype is torch.float32 and way.quantization is Quantization.NONE
        kind = str(config.model_type)
        probe(model, runner, vocabulary=int(text.vocab_size), kind=kind, exact=exact)
        runner.settle(self._facts(spec, text, module, runner))
        return runner

    def _facts(self, spec: RevisionSpec, text: Any, module: Any, runner: TorchRunner) -> ModelFacts:
        positions = int(getattr(text, "max_position_embeddings", 0) or CONTEXT_TOKENS_DEFAULT)
        context = min(spec.context_tokens or positions, positions)
        per_slot = -(-context // BUCKET_TOKENS) * BUCKET_TOKENS
        affordable = self._settings.kv_bytes() // runner.kv_bytes_per_token
        area = min(affordable, self._settings.slots * per_slot)
        area -= area % BUCKET_TOKENS
        return ModelFacts(
            vocabulary=int(text.vocab_size),
            context_tokens=context,
            end_ids=_end_ids(module),
            kv_tokens=area,
            weights_bytes=runner.weights_bytes,
        )


def resolve_quantization(spec: RevisionSpec, config: Any, settings: TorchSettings) -> Quantization:
    """What `auto` means: int8 where the integer product serves the model, else none.

    On CPU LLM.int8 over the integer product is faster than bfloat16 at every batch, half its size, costs
    little quality and makes answers independent of their neighbours. Elsewhere plain weights are faster.
    """
    if spec.quantization is not Quantization.AUTO:
        return spec.quantization
    lean = settings.lean and settings.device.type == "cpu" and lean_weights.serves(config)
    return Quantization.INT8 if lean else Quantization.NONE


def compute_dtype(spec: RevisionSpec, device: torch.device) -> torch.dtype:
    """The format of activations: as asked, or what was measured to be fastest.

    On CPU int8 always computes in fp32: the integer product has single precision around it, and with
    bfloat16 input bitsandbytes casts at every call and is several times slower. Four-bit weights and plain
    ones use bfloat16 where the processor multiplies it.
    """
    if device.type == "cpu" and spec.quantization is Quantization.INT8:
        return torch.float32
    if spec.compute_dtype is not ComputeDtype.AUTO:
        return torch.float32 if spec.compute_dtype is ComputeDtype.FP32 else torch.bfloat16
    if device.type == "cuda" or spec.quantization in {Quantization.NF4, Quantization.FP4}:
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


@dataclass(frozen=True, slots=True)
class _Way:
    """How a revision is held and computed.

    Attributes:
        quantization: Never `auto`.
        dtype: Of activations.
        lean: Whether the lean forward runs it.
    """

    quantization: Quantization
    dtype: torch.dtype
    lean: bool

    @property
    def module_quantization(self) -> Quantization:
        """Of the module: what the lean forward quantizes itself is read plain."""
        return Quantization.NONE if self.lean else self.quantization

    @property
    def module_dtype(self) -> torch.dtype | str:
        """Of the module: weights that become integers are read as they are stored."""
        return "auto" if self.lean and self.quantization is Quantization.INT8 else self.dtype

    def decoder(self, module: Any) -> LeanDecoder:
        """The lean decoder of a module."""
        if self.quantization is Quantization.INT8:
            return lean_weights.int8_decoder(module)
        return lean_weights.plain_decoder(module, self.dtype)


def _way(spec: RevisionSpec, config: Any, settings: TorchSettings) -> _Way:
    quantization = resolve_quantization(spec, config, settings)
    # The integer product is the processor's; four-bit weights are the library's everywhere.
    able = {Quantization.NONE, Quantization.INT8} if settings.device.type == "cpu" else {Quantization.NONE}
    lean = settings.lean and quantization in able and lean_weights.serves(config)
    return _Way(quantization, compute_dtype(replace(spec, quantization=quantization), settings.device), lean)


def _read(directory: Path, config: Any, way: _Way, device: torch.device) -> Any:
    """The module with its weights; every one of them comes from the files."""
    # Soft-capped attention scores exist in the plain implementation alone.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    factory: Any = AutoModelForCausalLM
    module, report = factory.from_pretrained(
        directory,
        dtype=way.module_dtype,
        quantization_config=_quantization_config(way.module_quantization, way.dtype),
        device_map={"": str(device)},
        attn_implementation="eager" if capped else "sdpa",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ArtifactInvalid("The weight files lack tensors of the model, or give them another shape.")
    return module.eval()


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    make: Any = BitsAndBytesConfig
    if quantization is Quantization.NONE:
        return None
    if quantization is Quantization.INT8:
        return make(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _attention(config: Any) -> tuple[frozenset[str], int]:
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


def _check_forward(config: Any) -> None:
    """Refuses a model that takes neither positions nor a cache: rows of several lengths need both."""
    decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    accepted = inspect.signature(decoder.forward).parameters
    wanted = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
    if any(name not in accepted for name in wanted):
        raise ArtifactInvalid(f"Models of type {config.model_type} cannot decode several lengths at once.")


def _end_ids(module: Any) -> frozenset[int]:
    """What ends an answer: the tokens that the generation settings name, and the model's own."""
    named = (module.generation_config.eos_token_id, module.config.get_text_config().eos_token_id)
    found: set[int] = set()
    for entry in named:
        found.update(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return frozenset(found)
