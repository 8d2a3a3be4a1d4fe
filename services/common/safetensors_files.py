"""Weight files. Owns: what must hold of configuration and headers before a weight is read. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from services.common.artifacts import CONFIG_BYTES_MAX, REFUSED_SUFFIXES
from services.common.errors import ArtifactInvalid

# The format's own bound on a header.
HEADER_BYTES_MAX = 100_000_000

_ELEMENT_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

# Dots and slashes name modules and paths; a model type is a plain word.
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns `config.json` as it stands.

    Raises:
        ArtifactInvalid: It is missing, too large, no JSON object, or names code to import.
    """
    path = directory / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise ArtifactInvalid("config.json: too large.")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid("config.json: missing, or not readable as JSON.") from None
    if not isinstance(config, dict):
        raise ArtifactInvalid("config.json: not an object.")
    if "auto_map" in config:
        raise ArtifactInvalid("config.json: `auto_map` names code to import; that is never run.")
    if _MODEL_TYPE.fullmatch(str(config.get("model_type", ""))) is None:
        raise ArtifactInvalid("config.json: `model_type` is missing or not a plain name.")
    return config


def check_files(directory: Path, names: Sequence[str]) -> None:
    """Checks the kinds of a revision's files and the header of every weight file.

    Raises:
        ArtifactInvalid: A file could run code, or a header lies.
    """
    for name in names:
        if name.lower().endswith(REFUSED_SUFFIXES):
            raise ArtifactInvalid(f"{name}: files of this kind can run code and are never loaded.")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise ArtifactInvalid("The revision has no safetensors file.")
    for name in weights:
        check_header(directory / name)


def check_header(path: Path) -> None:
    """Checks that the header of a weight file is well-formed and accounts for every byte.

    Raises:
        ArtifactInvalid: It does not.
    """
    try:
        text = read_header(path)
        header = json.loads(text)
        data_bytes = path.stat().st_size - 8 - len(text)
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid(f"{path.name}: the header is not readable.") from None
    if not isinstance(header, dict):
        raise ArtifactInvalid(f"{path.name}: the header is no object.")
    header.pop("__metadata__", None)
    _check_tensors(path.name, header, data_bytes)


def read_header(path: Path) -> bytes:
    """The header of a weight file as it stands.

    Raises:
        ArtifactInvalid: It is too long.
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_BYTES_MAX:
            raise ArtifactInvalid(f"{path.name}: the header is too long.")
        return stream.read(length)


def _check_tensors(name: str, header: dict[str, Any], data_bytes: int) -> None:
    """Every tensor fills its place exactly, and together they fill the file without gap or overlap."""
    places: list[tuple[int, int]] = []
    for tensor, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            elements = math.prod(_naturals(entry["shape"]))
            size_bytes = elements * _ELEMENT_BYTES[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise ArtifactInvalid(f"{name}: the entry of {tensor[:100]!a} is malformed.") from None
        if end - begin != size_bytes:
            raise ArtifactInvalid(f"{name}: {tensor[:100]!a} has another size than its shape says.")
        places.append((begin, end))
    position = 0
    for begin, end in sorted(places):
        if begin != position:
            raise ArtifactInvalid(f"{name}: the tensors overlap or leave gaps.")
        position = end
    if position != data_bytes:
        raise ArtifactInvalid(f"{name}: the file is longer or shorter than its header says.")


def _naturals(shape: Iterable[Any]) -> list[int]:
    sizes = list(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError
    return sizes
