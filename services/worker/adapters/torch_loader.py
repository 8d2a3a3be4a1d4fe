"""The loader. Owns: how a directory becomes a runner, and which models are refused.

Any decoder of transformers is welcome whose layers have full or sliding attention. Whether it really can
be served over slots is tried, not believed: the same tokens pass the model with and without the slot cache,
and the logits must agree.

What takes long is done once on a host: the weights in their final layout are stored, and every later start
maps them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from services.common.errors import ArtifactInvalid, InterlockError
from services.common.safetensors_files import check_counts, check_files, read_config, stored_tensors
from services.worker.adapters import decoder_config, lean_weights
from services.worker.adapters.fused_runner import FusedRunner
from services.worker.adapters.lean_runner import LeanRunner
from services.worker.adapters.stored_forms import StoredForms
from services.worker.adapters.torch_memory import shortage_named
from services.worker.adapters.torch_probe import bare_logits, probe
from services.worker.adapters.torch_runner import DecoderModel, TorchRunner
from services.worker.adapters.weight_source import Way, WeightSource
from services.worker.core.kv_budget import BUCKET_TOKENS
from services.worker.core.ports import LoadWatch, unwatched
from services.worker.core.revision import (
    ComputeDtype,
    LoadHalted,
    LoadStage,
    ModelFacts,
    Quantization,
    RevisionSpec,
)

# An element of quantized weights; what is not quantized takes more.
_BITS = {Quantization.INT8: 8, Quantization.NF4: 4, Quantization.FP4: 4}


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """What one machine gives to its models.

    Attributes:
        device: Where they compute.
        threads: CPU threads of a forward pass.
        slots: Sequences at once: no more KV cache than they can fill is used.
        kv_bytes: Tells the budget of each revision's KV cache in bytes, after its load.
        lean: Whether the lean forward runs what it can; without it, everything runs as modules.
        forms: Where weights are stored in their final layout; None: each load makes its own.
    """

    device: torch.device
    threads: int
    slots: int
    kv_bytes: Callable[[], int]
    lean: bool = True
    forms: StoredForms | None = None


class TorchLoader:
    """Loads revisions with torch and transformers."""

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings
        # The library talks to terminals; a service logs what matters itself.
        library_logs: Any = transformers.utils.logging
        library_logs.set_verbosity(logging.CRITICAL)
        library_logs.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
        # What all decoders of the library share takes a second to import: better now than at the first model.
        importlib.import_module("transformers.models.llama.modeling_llama")

    def verify(self, directory: Path, spec: RevisionSpec) -> None:
        """See `RevisionLoader.verify`."""
        described = read_config(directory)
        kind = str(described["model_type"])
        # The library makes lists and layers of whatever length it reads.
        check_counts(described, check_files(directory, [file.path for file in spec.files]))
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ArtifactInvalid(f"Models of type {kind} are not decoders that can be served.")
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception:  # noqa: BLE001 - whatever a foreign configuration does to the library
            raise ArtifactInvalid("config.json: the library cannot read it.") from None
        decoder_config.attention_of(config)
        decoder_config.check_rotation(config, spec.context_tokens)
        decoder_config.check_forward(config)

    def weights_bytes_least(self, directory: Path, spec: RevisionSpec) -> int:
        """See `RevisionLoader.weights_bytes_least`."""
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        tensors = stored_tensors(directory, [file.path for file in spec.files])
        if getattr(config.get_text_config(), "tie_word_embeddings", False):
            # Some files have the head once more, which is then the embedding.
            tensors.pop("lm_head.weight", None)
        way = _way(spec, config, self._settings)
        bits = _BITS.get(way.quantization, 8 * way.dtype.itemsize)
        # A byte may be a weight that was quantized before it came here, and stays what it is.
        return sum(one.elements * min(bits, 8 if one.is_byte else bits) for one in tensors.values()) // 8

    def load(self, directory: Path, spec: RevisionSpec, watch: LoadWatch = unwatched) -> TorchRunner:
        """See `RevisionLoader.load`."""
        try:
            with shortage_named():
                return self._load(directory, spec, watch)
        except (InterlockError, LoadHalted, MemoryError):
            raise
        except Exception as error:
            # The library's message may hold a path; its class is what the cause chain is for.
            raise ArtifactInvalid(
                f"The weights do not make the model that config.json describes ({error.__class__.__name__})."
            ) from error

    def _load(self, directory: Path, spec: RevisionSpec, watch: LoadWatch) -> TorchRunner:
        settings = self._settings
        torch.set_num_threads(settings.threads)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        source = WeightSource(directory, spec, config, _way(spec, config, settings), settings.forms, watch)
        make = self._lean if source.way.lean else self._modules
        try:
            runner = make(source, config)
        except ArtifactInvalid:
            # A stored form may have been damaged where no header tells; what was just made has not.
            if not source.discard():
                raise
            runner = make(source, config)
        runner.settle(self._facts(directory, spec, config, runner))
        return runner

    def _lean(self, source: WeightSource, config: Any) -> TorchRunner:
        """A runner of the lean forward, over tensors that were a module once."""
        model = self._model(None, source.way, config)

        def tensors() -> lean_weights.Named:
            module = source.module()
            yield "bare", bare_logits(replace(model, module=module), vocabulary=_vocabulary(config))
            progress = partial(source.watch, LoadStage.QUANTIZE)
            int8 = source.way.quantization is Quantization.INT8
            yield from lean_weights.tensors_of(module, source.way.dtype, progress, int8=int8)

        found = {name: one.to(self._settings.device) for name, one in source.tensors(tensors).items()}
        runner = self._lean_runner(source.way, model, found, config)
        probe(runner, found["bare"], kind=str(config.model_type), exact=source.way.exact)
        return runner

    def _lean_runner(
        self, way: Way, model: DecoderModel, tensors: dict[str, torch.Tensor], config: Any
    ) -> TorchRunner:
        if way.quantization is not Quantization.INT8:
            return LeanRunner(model, lean_weights.decoder(tensors, config, way.dtype))
        return FusedRunner(model, lean_weights.fused(tensors, config))

    def _modules(self, source: WeightSource, config: Any) -> TorchRunner:
        """A runner of the library's modules."""
        model = self._model(source.stored_module(), source.way, config)
        runner = TorchRunner(model)
        bare = bare_logits(model, vocabulary=_vocabulary(config))
        probe(runner, bare, kind=str(config.model_type), exact=source.way.exact)
        return runner

    def _model(self, module: Any, way: Way, config: Any) -> DecoderModel:
        attention, window = decoder_config.attention_of(config)
        layers = int(config.get_text_config().num_hidden_layers)
        device, threads = self._settings.device, self._settings.threads
        return DecoderModel(module, layers, attention, window, device, way.dtype, threads)

    def _facts(self, directory: Path, spec: RevisionSpec, config: Any, runner: TorchRunner) -> ModelFacts:
        context = decoder_config.context_of(config, spec.context_tokens)
        per_slot = -(-context // BUCKET_TOKENS) * BUCKET_TOKENS
        affordable = self._settings.kv_bytes() // runner.kv_bytes_per_token
        area = min(affordable, self._settings.slots * per_slot)
        area -= area % BUCKET_TOKENS
        if not area:
            least_kb = -(-BUCKET_TOKENS * runner.kv_bytes_per_token // 1_000)
            raise ArtifactInvalid(
                f"The memory that is left for its KV cache holds not even {BUCKET_TOKENS} tokens"
                f" ({least_kb} kB). Give the worker more memory, or set kv_cache_bytes."
            )
        return ModelFacts(
            vocabulary=_vocabulary(config),
            context_tokens=context,
            end_ids=decoder_config.end_ids(directory, config),
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
    fused = settings.lean and settings.device.type == "cpu" and lean_weights.fuses(config)
    return Quantization.INT8 if fused else Quantization.NONE


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


def _way(spec: RevisionSpec, config: Any, settings: TorchSettings) -> Way:
    quantization = resolve_quantization(spec, config, settings)
    # Integer products are the processor's; four-bit weights are the library's everywhere.
    match quantization:
        case Quantization.NONE:
            able = lean_weights.serves(config)
        case Quantization.INT8:
            able = settings.device.type == "cpu" and lean_weights.fuses(config)
        case _:
            able = False
    lean = settings.lean and able
    dtype = compute_dtype(replace(spec, quantization=quantization), settings.device)
    return Way(quantization, dtype, settings.device, lean)


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)
