"""Weight files. Owns: what must hold of configuration and headers before a weight is read. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from services.common.artifacts import CONFIG_BYTES_MAX, REFUSED_SUFFIXES
from services.common.errors import ArtifactInvalid

# A header is parsed in one go, which takes ten times its length in memory. An entry has about 120 bytes, so
# that this is room for 130,000 tensors in one file; the largest public shards have a few thousand. The
# format's own bound is 100 MB.
HEADER_BYTES_MAX = 16 << 20
# An index names the file of each tensor in some 90 bytes, and is parsed whole like a header.
INDEX_BYTES_MAX = 16 << 20
INDEX_SUFFIX = ".safetensors.index.json"
# Before the header stands its length.
LENGTH_BYTES = 8
# Weights have at most five; no library of tensors needs more to read one.
DIMENSIONS_MAX = 8
# The format counts in 64 bits.
_NATURAL_MAX = (1 << 64) - 1

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

# The largest public decoders have some 130 layers. The library makes objects for as many as a configuration
# says, before it looks at any weight.
LAYERS_MAX = 1_024
_LAYER_KEYS = frozenset(
    {
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth"),
        *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
        *("decoder_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers"),
    }
)
# Labels belong to classifiers; decoders carry those of the library's examples, a thousand at most.
LABELS_MAX = 4_096
_LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id"})

# Dots and slashes name modules and paths; a model type is a plain word.
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns `config.json` as it stands.

    Raises:
        ArtifactInvalid: It is missing, too large, no JSON object, or names code or another file to read.
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
    if "configuration_files" in config:
        raise ArtifactInvalid(
            "config.json: `configuration_files` names another file to read instead; leave it out."
        )
    if _MODEL_TYPE.fullmatch(str(config.get("model_type", ""))) is None:
        raise ArtifactInvalid("config.json: `model_type` is missing or not a plain name.")
    return config


def check_counts(config: dict[str, Any], tensors: int) -> None:
    """Checks how many layers and labels a configuration and those nested in it ask for.

    Args:
        config: What `read_config` returned.
        tensors: How many the weight files have: each layer has one at least.

    Raises:
        ArtifactInvalid: There are too many; the message names the field.
    """
    layers_max = min(tensors, LAYERS_MAX)
    for key, value in _fields(config):
        count = len(value) if isinstance(value, dict) else value
        if not isinstance(count, int | float):
            continue
        if key in _LAYER_KEYS and count > layers_max:
            raise ArtifactInvalid(
                f"config.json: `{key}` asks for too many layers: the weight files have {tensors} tensors; "
                f"at most {layers_max}."
            )
        if key in _LABEL_KEYS and count > LABELS_MAX:
            raise ArtifactInvalid(f"config.json: `{key}` asks for too many labels; at most {LABELS_MAX}.")


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All fields, also of what is nested. Not by recursion: a file may nest as deep as its reader goes."""
    pending: list[Any] = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield from part.items()
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)


def check_files(directory: Path, names: Sequence[str]) -> int:
    """Checks the kinds of a revision's files, the header of every weight file, and what an index names.

    Returns:
        How many tensors the weight files have.

    Raises:
        ArtifactInvalid: A file could run code, a header lies, or an index leads out of the revision.
    """
    for name in names:
        if name.lower().endswith(REFUSED_SUFFIXES):
            raise ArtifactInvalid(f"{name}: files of this kind can run code and are never loaded.")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise ArtifactInvalid("The revision has no safetensors file.")
    for name in names:
        if name.endswith(INDEX_SUFFIX):
            _check_index(directory / name, frozenset(weights))
    return sum(check_header(directory / name) for name in weights)


def _check_index(path: Path, weights: frozenset[str]) -> None:
    """The library opens whatever an index names, wherever it lies, and unpickles what is not safetensors."""
    try:
        if path.stat().st_size > INDEX_BYTES_MAX:
            raise ArtifactInvalid(f"{path.name}: too large; at most {INDEX_BYTES_MAX} bytes.")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid(f"{path.name}: missing, or not readable as JSON.") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise ArtifactInvalid(f"{path.name}: no object whose `weight_map` names the file of each tensor.")
    for file in found.values():
        if not isinstance(file, str) or file not in weights:
            raise ArtifactInvalid(
                f"{path.name}: `weight_map` names {str(file)[:100]!a}, which is no weight file of the "
                "revision. Push that file too, or leave the index out."
            )


def check_header(path: Path) -> int:
    """Checks that the header of a weight file is well-formed and accounts for every byte.

    Returns:
        How many tensors the file has.

    Raises:
        ArtifactInvalid: It does not; the message names the file and what is wrong.
    """
    try:
        text = read_header(path)
        data_bytes = path.stat().st_size - LENGTH_BYTES - len(text)
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _EntryBad as error:
        raise ArtifactInvalid(f"{path.name}: the header {error}.") from None
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid(f"{path.name}: the header is not readable as JSON.") from None
    if not isinstance(header, dict):
        raise ArtifactInvalid(f"{path.name}: the header is no object.")
    _check_metadata(path.name, header.pop("__metadata__", {}))
    _check_tensors(path.name, header, data_bytes)
    return len(header)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a weight file.

    Attributes:
        elements: How many it has.
        is_byte: Whether one is a byte: a number that was quantized, or several.
    """

    elements: int
    is_byte: bool


def stored_tensors(directory: Path, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Each tensor by name, of files whose headers were checked."""
    found: dict[str, StoredTensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            header = json.loads(read_header(directory / name))
            header.pop("__metadata__", None)
            for tensor, entry in header.items():
                found[tensor] = StoredTensor(math.prod(entry["shape"]), _ELEMENT_BYTES[entry["dtype"]] == 1)
    return found


def read_header(path: Path) -> bytes:
    """The header of a weight file as it stands.

    Raises:
        ArtifactInvalid: There is none, it is too long, or longer than the file.
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        prefix = stream.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise ArtifactInvalid(f"{path.name}: the file is too short to have a header.")
        length = int.from_bytes(prefix, "little")
        if length > HEADER_BYTES_MAX:
            raise ArtifactInvalid(
                f"{path.name}: the header is too long: {length} bytes; at most {HEADER_BYTES_MAX}."
            )
        header = stream.read(length)
    if len(header) < length:
        raise ArtifactInvalid(f"{path.name}: the header is longer than the file.")
    return header


class _EntryBad(Exception):
    """What is wrong with a part of a header; says it in words that follow the part's name."""


def _check_metadata(name: str, metadata: Any) -> None:
    """The format knows text by text and nothing else."""
    if not isinstance(metadata, dict):
        raise ArtifactInvalid(f"{name}: `__metadata__` is no object.")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ArtifactInvalid(f"{name}: {key[:100]!a} in `__metadata__` is no text.")


def _check_tensors(name: str, header: dict[str, Any], data_bytes: int) -> None:
    """Every tensor fills its place exactly, and together they fill the file without gap or overlap."""
    places: list[tuple[int, int]] = []
    for tensor, entry in header.items():
        try:
            places.append(_place(entry))
        except _EntryBad as error:
            raise ArtifactInvalid(f"{name}: the entry of {tensor[:100]!a} {error}.") from None
    position = 0
    for begin, end in sorted(places):
        if begin != position:
            raise ArtifactInvalid(f"{name}: the tensors overlap or leave gaps.")
        position = end
    if position != data_bytes:
        raise ArtifactInvalid(f"{name}: the file is longer or shorter than its header says.")


def _place(entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, counted from the end of the header."""
    if not isinstance(entry, dict):
        raise _EntryBad("is no object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise _EntryBad("has a dtype that is not known")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_naturals(shape):
        raise _EntryBad("has a shape that is no list of whole numbers")
    if len(shape) > DIMENSIONS_MAX:
        raise _EntryBad(f"has {len(shape)} dimensions; at most {DIMENSIONS_MAX}")
    if not _are_naturals(offsets) or len(offsets) != 2:
        raise _EntryBad("has data_offsets that are not two whole numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ELEMENT_BYTES[dtype]:
        raise _EntryBad("has another size than its shape says")
    return begin, end


def _are_naturals(values: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers; `true` is none, although Python counts it as one."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _NATURAL_MAX
        for value in values
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is given twice, two readers could believe different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _EntryBad("gives a key twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _EntryBad(f"has {name}, which is not a JSON value")
