"""Sources of weights. Owns: whether a revision's are made now or were stored before, and its form's name.

A form depends on the revision's files, on how they are held, and on libraries and processors where these
have a say in the layout.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from services.common import logs
from services.common.safetensors_files import INDEX_SUFFIX
from services.worker.adapters import lean_weights, mapped_tensors, module_weights, packed_weights
from services.worker.adapters.module_weights import ModuleKind
from services.worker.adapters.stored_forms import StoredForms, key_of
from services.worker.core.ports import LoadWatch
from services.worker.core.revision import LoadStage, Quantization, RevisionSpec

_LEAN_FILE = "lean.safetensors"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Way:
    """How a revision is held and computed.

    Attributes:
        quantization: Never `auto`.
        dtype: Of activations.
        device: Where it computes.
        lean: Whether the lean forward runs it.
    """

    quantization: Quantization
    dtype: torch.dtype
    device: torch.device
    lean: bool

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding in single precision separates it from the plain model."""
        return self.dtype is torch.float32 and self.quantization is Quantization.NONE

    @property
    def module(self) -> ModuleKind:
        """Of the module: what the lean forward quantizes itself is read plain, as it is stored."""
        if not self.lean:
            return ModuleKind(self.quantization, self.dtype, self.device)
        integers = self.quantization is Quantization.INT8
        return ModuleKind(Quantization.NONE, "auto" if integers else self.dtype, self.device)


class WeightSource:
    """The weights of one revision while it is loaded.

    Args:
        directory: The revision's files.
        spec: What it is.
        config: Its configuration.
        way: How it is held.
        forms: Where final layouts are stored; None: nowhere.
        watch: Is told what happens, and may end it.
    """

    def __init__(
        self,
        directory: Path,
        spec: RevisionSpec,
        config: Any,
        way: Way,
        forms: StoredForms | None,
        watch: LoadWatch,
    ) -> None:
        self._directory = directory
        self._config = config
        # What has no digest has no name under which it could be found again.
        known = all(_SHA256.fullmatch(file.sha256) and file.sha256.strip("0") for file in spec.files)
        self._forms = forms if known else None
        self._key = _key(spec, way)
        self._found = False
        self.way = way
        self.watch = watch

    def module(self) -> Any:
        """The module, made of the revision's own files."""
        progress = partial(self.watch, LoadStage.QUANTIZE)
        return module_weights.read(self._directory, self._config, self.way.module, progress)

    def stored_module(self) -> Any:
        """The module, from its stored form where it has one."""
        if self._forms is None or module_weights.is_mapped_as_it_is(self._config, self.way.module):
            return self.module()
        progress = partial(self.watch, LoadStage.MAP)
        for _ in range(2):
            path = self._obtain(lambda directory: module_weights.store(self.module(), directory))
            if path is None:
                break
            try:
                return module_weights.read_stored(path, self._config, self.way.module, progress)
            except OSError:
                # Removed by another worker, as tensors may be, or unreadable where no header tells.
                self.discard()
        return self.module()

    def tensors(self, make: Callable[[], lean_weights.Named]) -> dict[str, torch.Tensor]:
        """The tensors of the lean forward by name: mapped, or as they are made where nothing is stored."""
        for _ in range(2):
            path = self._obtain(lambda directory: mapped_tensors.write(directory / _LEAN_FILE, make()))
            if path is None:
                break
            # Another worker that needs the room may have removed it since.
            with contextlib.suppress(FileNotFoundError):
                return mapped_tensors.read(path / _LEAN_FILE, partial(self.watch, LoadStage.MAP))
        return dict(make())

    def discard(self) -> bool:
        """Gives up a form that was there before; returns whether there was one."""
        if self._forms is None or not self._found:
            return False
        logs.get_logger().warning("form.discarded", form=self._key)
        self._forms.discard(self._key)
        return True

    def _obtain(self, make: Callable[[Path], None]) -> Path | None:
        """Where the form lies; None where nothing can be stored."""
        if self._forms is None:
            return None
        self._found = True

        def made(directory: Path) -> None:
            self._found = False
            make(directory)

        try:
            return self._forms.obtain(self._key, made, lambda: self.watch(LoadStage.QUANTIZE, 0, 0))
        except OSError as error:
            # A full disk costs memory and time, and serves all the same.
            logs.get_logger().warning("form.not_stored", form=self._key, reason=str(error.strerror))
            return None


def _key(spec: RevisionSpec, way: Way) -> str:
    files = sorted((file.path, file.sha256) for file in spec.files if _shapes_weights(file.path))
    held = (way.quantization.value, way.dtype, way.device.type)
    if way.lean:
        return key_of("lean", files, *held)
    versions = (version("bitsandbytes"), transformers.__version__)
    packed = way.quantization in {Quantization.NF4, Quantization.FP4} and packed_weights.packs()
    return key_of("module", files, *held, *versions, packed)


def _shapes_weights(path: str) -> bool:
    # The index says which of the files are read, and for which tensors.
    return path.endswith((".safetensors", INDEX_SUFFIX)) or path == "config.json"
