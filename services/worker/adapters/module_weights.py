"""Weights of modules. Owns: how the library's modules are read, quantized, stored and read again.

The library maps files whose tensors it takes as they are. So a quantized module is stored as bitsandbytes
serializes it and read from there, and its weights are pages that all workers share.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from services.common.errors import ArtifactInvalid
from services.worker.adapters import packed_weights
from services.worker.adapters.mapped_tensors import Progress
from services.worker.core.revision import Quantization

# The paper's outlier threshold (Dettmers et al., 2022).
INT8_THRESHOLD = 6.0


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """How a module is held.

    Attributes:
        quantization: Of its linear layers; never `auto`.
        dtype: Of the rest; `auto`: as the files have it.
        device: Where it computes.
    """

    quantization: Quantization
    dtype: torch.dtype | str
    device: torch.device


def read(directory: Path, config: Any, kind: ModuleKind, progress: Progress) -> Any:
    """The module with its weights, quantized on the way; every one of them comes from the files.

    Raises:
        ArtifactInvalid: The files lack tensors.
    """
    settings = {"quantization_config": _quantization_config(kind)}
    return _from_pretrained(directory, config, kind, progress, settings)


def store(module: Any, directory: Path) -> None:
    """Writes a module as `read_stored` wants it. The module is used up.

    Raises:
        OSError: It cannot be written.
    """
    try:
        module.save_pretrained(directory)
    except SafetensorError as error:
        # Its message is all that it says of a full disk.
        raise OSError(errno.EIO, str(error)) from error
    packed_weights.store(module, directory)


def read_stored(directory: Path, config: Any, kind: ModuleKind, progress: Progress) -> Any:
    """The module that `store` has written, its weights mapped."""
    module = _from_pretrained(directory, config, kind, progress, {})
    packed_weights.restore(module, directory, progress)
    return module


def is_mapped_as_it_is(config: Any, kind: ModuleKind) -> bool:
    """Whether the library takes a revision's own files without a copy, so that nothing need be stored."""
    return kind.quantization is Quantization.NONE and kind.dtype in {"auto", getattr(config, "dtype", None)}


def _from_pretrained(
    directory: Path, config: Any, kind: ModuleKind, progress: Progress, settings: dict[str, Any]
) -> Any:
    # Soft-capped attention scores exist in the plain implementation alone.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    factory: Any = AutoModelForCausalLM
    with _told(progress, sum(path.stat().st_size for path in directory.glob("*.safetensors"))):
        module, report = factory.from_pretrained(
            directory,
            dtype=kind.dtype,
            device_map={"": str(kind.device)},
            attn_implementation="eager" if capped else "sdpa",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **settings,
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ArtifactInvalid("The weight files lack tensors of the model, or give them another shape.")
    return module.eval()


def _quantization_config(kind: ModuleKind) -> Any:
    make: Any = BitsAndBytesConfig
    if kind.quantization is Quantization.NONE:
        return None
    if kind.quantization is Quantization.INT8:
        return make(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.quantization.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind.dtype,
    )


@contextlib.contextmanager
def _told(progress: Progress, total_bytes: int) -> Iterator[None]:
    """Tells how far the library is with its tensors: they come about as fast as their share of the bytes.

    What `progress` raises ends the loading. The hook is the library's and there is one of it, as there is
    one preparation at a time.
    """
    library: Any = transformers.utils.logging

    def hook(make: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        bar = make(*arguments, **settings)
        if settings.get("desc") != "Loading weights":
            return bar
        items = list(arguments[0])
        return _counted(items, progress, total_bytes)

    before = library.set_tqdm_hook(hook)
    try:
        yield
    finally:
        library.set_tqdm_hook(before)


def _counted(items: list[Any], progress: Progress, total_bytes: int) -> Iterator[Any]:
    for number, item in enumerate(items):
        progress(total_bytes * number // len(items), total_bytes)
        yield item
    progress(total_bytes, total_bytes)
