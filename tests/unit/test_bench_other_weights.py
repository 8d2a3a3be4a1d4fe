"""A model of other weights: what changes, by how much, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.other_weights import perturb


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of several types, and a configuration."""
    directory = tmp_path / "model"
    directory.mkdir()
    numbers = torch.linspace(-2, 2, 400).reshape(20, 20)
    first = {"a": numbers, "b": numbers.to(torch.bfloat16), "positions": torch.arange(9)}
    save_file(first, directory / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"c": numbers.to(torch.float16)}, directory / "model-2.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def test_each_weight_changes_by_a_little(model: Path, tmp_path: Path) -> None:
    """Names, shapes, types and all other files are those of the model that it was made of."""
    other = tmp_path / "other"
    perturb(model, other, noise=0.01)
    assert {path.name for path in other.iterdir()} == {path.name for path in model.iterdir()}
    assert (other / "config.json").read_text() == "{}"
    with safe_open(other / "model-1.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name in ("model-1.safetensors", "model-2.safetensors"):
        before, after = load_file(model / name), load_file(other / name)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape)
            if not tensor.is_floating_point():
                assert torch.equal(after[key], tensor)
                continue
            change = (after[key].float() / tensor.float() - 1).abs()
            assert (change > 0).float().mean() > 0.5
            assert change.max() < 0.06


def test_equal_seeds_make_equal_weights(model: Path, tmp_path: Path) -> None:
    """So that a second push is the same revision; another seed makes another one."""
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        perturb(model, tmp_path / name, seed=seed)
    one, same, other = (
        (tmp_path / name / "model-2.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    """Nothing is made of it."""
    with pytest.raises(FileNotFoundError, match="safetensors"):
        perturb(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()
