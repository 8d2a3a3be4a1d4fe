"""Memory that is short has one name, whoever says so; and weights are told before they are read."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_memory import shortage_named
from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec
from tests.fakes import tiny_models


def test_a_real_allocation_that_fails_is_a_shortage() -> None:
    """The allocator on CPU raises a plain RuntimeError, which a defect does too."""
    with pytest.raises(MemoryError), shortage_named():
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), shortage_named():
        torch.empty(2).view(3)


def test_what_libraries_wrap_is_a_shortage_too() -> None:
    """A device's error, the system's, and one that somebody raised another one from."""
    for cause in (torch.OutOfMemoryError("no"), OSError(errno.ENOMEM, "no"), MemoryError()):
        with pytest.raises(MemoryError), shortage_named():
            raise ValueError("Loading failed.") from cause
    with pytest.raises(ValueError, match="failed"), shortage_named():
        raise ValueError("Loading failed.") from OSError(errno.EIO, "no")


def test_a_load_without_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the weights' fault."""
    tiny_models.save("llama", tmp_path)
    loader = TorchLoader(TorchSettings(torch.device("cpu"), threads=1, slots=2, kv_bytes=lambda: 1 << 20))

    def short(*_: object, **__: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    monkeypatch.setattr("services.worker.adapters.module_weights.read", short)
    with pytest.raises(MemoryError):
        loader.load(tmp_path, RevisionSpec("m", "r"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_weights_take_no_less_than_was_told(tmp_path: Path, kind: str, quantization: Quantization) -> None:
    """What would be refused by its headers would not have fit."""
    tiny_models.save(kind, tmp_path)
    files = tuple(RevisionFile(path.name, path.stat().st_size, "0" * 64) for path in tmp_path.iterdir())
    spec = RevisionSpec("m", "r", files, quantization, ComputeDtype.FP32)
    loader = TorchLoader(TorchSettings(torch.device("cpu"), threads=1, slots=2, kv_bytes=lambda: 1 << 20))
    least_bytes = loader.weights_bytes_least(tmp_path, spec)
    measured_bytes = loader.load(tmp_path, spec).facts.weights_bytes
    # What is measured leaves norms out.
    assert 0 < least_bytes <= 1.01 * measured_bytes
    if quantization is Quantization.NONE:
        assert least_bytes > 0.9 * measured_bytes


@pytest.mark.parametrize(("quantization", "share"), [(Quantization.NONE, 1), (Quantization.NF4, 2)])
def test_weights_that_came_quantized_take_what_they_take(
    tmp_path: Path, quantization: Quantization, share: int
) -> None:
    """A byte of a file is a byte of memory, or less; it is not widened to the model's numbers."""
    tiny_models.save("llama", tmp_path)
    bytes_each, path = 4_096, tmp_path / "model.safetensors"
    save_file({"packed": torch.zeros(bytes_each, dtype=torch.uint8)}, path)
    spec = RevisionSpec(
        "m", "r", (RevisionFile(path.name, path.stat().st_size, "0" * 64),), quantization, ComputeDtype.FP32
    )
    loader = TorchLoader(TorchSettings(torch.device("cpu"), threads=1, slots=2, kv_bytes=lambda: 1 << 20))
    assert loader.weights_bytes_least(tmp_path, spec) == bytes_each // share
