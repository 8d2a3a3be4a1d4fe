"""A model's directory. Owns: which files it must hold before a mesh is started with it."""

from __future__ import annotations

from pathlib import Path

from services.local.model_store import ModelUnavailable

_NEEDED = ("config.json", "tokenizer.json", "*.safetensors")


def check(directory: Path) -> None:
    """Raises ModelUnavailable where the directory is not there, or names every file that it lacks."""
    if not directory.exists():
        raise ModelUnavailable(f"{directory} does not exist.")
    missing = [name for name in _NEEDED if not any(path.is_file() for path in directory.glob(name))]
    if missing:
        raise ModelUnavailable(
            f"{directory} holds no {', no '.join(missing)}; a model is a directory in Hugging Face format."
        )
