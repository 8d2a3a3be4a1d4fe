"""A model with slightly other weights. Owns: how one is made of another, so that a rollout has where to lead.

The same architecture and tokenizer, and every weight its own: nothing that a mesh keeps of the first model,
by digest, serves the second.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Of a weight's own size: bfloat16 keeps it, and answers stay sentences.
NOISE = 0.01
SEED = 7


def perturb(source: Path, target: Path, *, noise: float = NOISE, seed: int = SEED) -> None:
    """Makes a model directory whose weights are those of another one, each changed by a little.

    Args:
        source: A directory in Hugging Face format, with safetensors.
        target: The new directory; it must not exist.
        noise: The standard deviation of the change, as a part of each weight.
        seed: Equal seeds make equal weights.

    Raises:
        FileNotFoundError: The source has no safetensors.
        FileExistsError: The target exists.
    """
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{source.name} has no *.safetensors; convert the model first.")
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(source.iterdir()):
        if path in weights:
            _perturb_file(path, target / path.name, noise, generator)
        elif path.is_file():
            shutil.copy(path, target / path.name)


def _perturb_file(source: Path, target: Path, noise: float, generator: torch.Generator) -> None:
    with safe_open(source, framework="pt") as file:
        tensors = dict(_perturbed(file, noise, generator))
        save_file(tensors, target, metadata=file.metadata())


def _perturbed(file: Any, noise: float, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(file.keys()):
        tensor = file.get_tensor(name)
        # What is no number of the model's, as a position, stays.
        if tensor.is_floating_point():
            factor = 1 + noise * torch.randn(tensor.shape, generator=generator)
            tensor = (tensor.float() * factor).to(tensor.dtype)
        yield name, tensor
