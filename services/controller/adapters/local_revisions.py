"""Revisions in directories of this machine. Owns: how a model's directory becomes a revision and is read.

Must not know who asks for the files, or why.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import IO

from services.common.artifacts import Progress, describe, tokenizer_digest
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.common.threads import in_thread
from services.controller.core.catalog import Catalog, Manifest, ModelFile, Revision

# The contract's bound of a chunk.
CHUNK_BYTES_MAX = 1 << 20

# How the families of models name the longest sequence that they were trained for.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def read_revision(
    directory: Path,
    *,
    model: str,
    quantization: str,
    compute_dtype: str,
    context_tokens: int,
    now_s: float,
    on_progress: Progress = lambda _done, _total: None,
) -> Revision:
    """Describes the model in `directory`; reads every byte of it, so call it in a thread.

    Args:
        directory: A model in Hugging Face format.
        model: The name that requests give.
        quantization: How the weights are held; `auto`: the worker's device decides.
        compute_dtype: The format of activations; `auto`: the worker's device decides.
        context_tokens: Most tokens of prompt and output; 0: as many as the model was made for.
        now_s: Seconds since the epoch; a file from the future is as old as this.
        on_progress: See `describe`.

    Raises:
        ArtifactInvalid: The directory is no model, or a file of it breaks a rule.
    """
    files = describe(directory, on_progress)
    names = {file.path for file in files}
    if "config.json" not in names:
        raise ArtifactInvalid("The model's directory has no config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        raise ArtifactInvalid("The model's directory has no weights in safetensors format.")
    manifest = Manifest(
        model=model,
        revision="",
        files=tuple(ModelFile(file.path, file.size_bytes, file.sha256) for file in files),
        quantization=quantization,
        compute_dtype=compute_dtype,
        context_tokens=context_tokens_of(
            json.loads((directory / "config.json").read_bytes()), context_tokens
        ),
        tokenizer_sha256=tokenizer_digest(files),
    )
    return Revision(manifest.named(), str(directory.resolve()), _written_s(directory, manifest.files, now_s))


def _written_s(directory: Path, files: Iterable[ModelFile], now_s: float) -> float:
    """When the newest of the files was written."""
    newest_s = max((directory / file.path).stat().st_mtime for file in files)
    return min(max(newest_s, 0.0), now_s)


def context_tokens_of(config: object, asked: int) -> int:
    """The context of a model with this `config.json`; `asked` 0: as long as it was made for.

    Raises:
        ArtifactInvalid: More is asked for, or nothing and the configuration says nothing either.
    """
    found = [config.get(key) for key in _CONTEXT_KEYS] if isinstance(config, dict) else []
    lengths = [
        value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0
    ]
    if not lengths:
        if asked == 0:
            raise ArtifactInvalid("config.json does not say how long a context may be; set context_tokens.")
        return asked
    if asked > lengths[0]:
        raise ArtifactInvalid(f"context_tokens is {asked}; the model was made for at most {lengths[0]}.")
    return asked or lengths[0]


class LocalRevisionFiles:
    """`RevisionFiles` over the directories that the catalog names."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def read(self, model: str, revision: str, path: str, offset: int) -> AsyncIterator[bytes]:
        """See `RevisionFiles.read`. Only names of the manifest are opened, so no path can lead elsewhere."""
        found, file = asked_file(self._catalog, model, revision, path, offset)
        async for data in read_file(Path(found.local_path) / path, file.size_bytes, offset):
            yield data


def asked_file(
    catalog: Catalog, model: str, revision: str, path: str, offset: int
) -> tuple[Revision, ModelFile]:
    """What a download asks for.

    Raises:
        ModelUnknown, RevisionUnknown, ArgumentInvalid: See `RevisionFiles.read`.
    """
    found = catalog.revision(model, revision)
    file = next((file for file in found.manifest.files if file.path == path), None)
    if file is None:
        raise ArgumentInvalid(f"The revision has no file {path[:255]!a}.")
    if offset > file.size_bytes:
        raise ArgumentInvalid(f"The file has {file.size_bytes} bytes; the offset {offset} is behind them.")
    return found, file


async def read_file(path: Path, size_bytes: int, offset: int) -> AsyncIterator[bytes]:
    """Yields a file from `offset` on, in pieces of at most 1 MiB, and no more than `size_bytes` of it.

    Raises:
        ArtifactInvalid: It is gone.
    """
    left = size_bytes - offset
    stream = await in_thread(_open_at, path, offset)
    try:
        # Whoever is cancelled waits here for the thread: closing waits for it as well, and whoever calls it.
        while left and (chunk := await in_thread(stream.read, min(left, CHUNK_BYTES_MAX))):
            left -= len(chunk)
            yield chunk
    finally:
        # Of a file that was deleted meanwhile this frees the room, which a slow disk takes its time for.
        await in_thread(stream.close)


def _open_at(path: Path, offset: int) -> IO[bytes]:
    try:
        stream = path.open("rb")
    except OSError:
        raise ArtifactInvalid(f"{path.name}: the file is gone from the controller's directory.") from None
    stream.seek(offset)
    return stream
