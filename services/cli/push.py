"""`interlock models push`, `rm`, `revisions`. Owns: how a directory gets into the mesh, and out of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict, ParseError
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, explained, find_door, rows_of
from services.cli.door import Metadata
from services.cli.failure import CommandFailed
from services.common import artifacts
from services.common.errors import ArtifactInvalid

# The contract's bound of a chunk is four times this; less at a time keeps other calls of the channel quick.
CHUNK_BYTES = 256 << 10

# What was cut after its last byte is digested for the plan: seconds at most, or longer for many gigabytes.
PLAN_TIMEOUT_S = 3_600.0
# For so long nothing may go. A mesh that digests and copies many gigabytes takes nothing meanwhile; a line
# that is dead is noticed long before, and a slow client is told by the mesh.
SILENCE_MAX_S = 3_600.0

# How an upload ends that was refused by nobody: the line or the controller is gone, or it took too long.
_CUT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
}
_GOES_ON = "What came is kept: push again, and it goes on there."

_COLUMNS = {
    "revision": "REVISION",
    "quantization": "QUANTIZATION",
    "context_tokens": "CONTEXT",
    "weight": "SHARE",
    "ready_workers": "READY WORKERS",
    "create_time": "SINCE",
}

_QUANTIZATIONS = {
    "auto": model_pb2.QUANTIZATION_UNSPECIFIED,
    "none": model_pb2.QUANTIZATION_NONE,
    "int8": model_pb2.QUANTIZATION_INT8,
    "nf4": model_pb2.QUANTIZATION_NF4,
    "fp4": model_pb2.QUANTIZATION_FP4,
}
_DTYPES = {
    "auto": model_pb2.COMPUTE_DTYPE_UNSPECIFIED,
    "fp32": model_pb2.COMPUTE_DTYPE_FP32,
    "bf16": model_pb2.COMPUTE_DTYPE_BF16,
}
# Sixteen prompts of the longest kind; what is longer is cut, and so no JSON.
GOLDEN_BYTES_MAX = 1 << 20
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def push(arguments: argparse.Namespace) -> int:
    """Uploads a directory as a revision and prints it."""
    directory = Path(arguments.path)
    golden = [] if arguments.golden is None else _golden(Path(arguments.golden))
    try:
        with _spinning(f"Reading {directory.name}"):
            files = artifacts.describe(directory)
    except ArtifactInvalid as error:
        raise CommandFailed(error.message) from None
    manifest = model_pb2.Manifest(
        model=arguments.name or "",
        revision=arguments.revision,
        files=[
            model_pb2.ArtifactFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in files
        ],
        quantization=_QUANTIZATIONS[arguments.quantization],
        compute_dtype=_DTYPES[arguments.dtype],
        context_tokens=arguments.context_tokens or _context_tokens(directory),
        golden_prompts=golden,
        fallback_model=arguments.fallback_model,
    )
    revision = asyncio.run(_push(directory, manifest))
    _show([revision], as_json=arguments.json)
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Deletes a revision."""
    model, _, revision = arguments.revision.rpartition("@")
    if not model:
        raise CommandFailed("name the revision as MODEL@REVISION; `interlock models revisions` shows them.")
    asyncio.run(_remove(model, revision))
    return 0


def list_revisions(arguments: argparse.Namespace) -> int:
    """Prints the revisions of a model."""
    _show(asyncio.run(_revisions(arguments.name)), as_json=arguments.json)
    return 0


async def _push(directory: Path, manifest: model_pb2.Manifest) -> model_pb2.Revision:
    door = find_door()
    async with entrance(door) as (channel, metadata):
        stub = ControllerServiceStub(channel)
        manifest.model = manifest.model or await _default_model(stub, metadata)
        plan = await stub.PlanUpload(
            pb.PlanUploadRequest(manifest=manifest), metadata=metadata, timeout=PLAN_TIMEOUT_S
        )
        try:
            with _bar(manifest, plan.missing) as advance:
                return await _upload(stub, metadata, directory, manifest, plan.missing, advance)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _CUT:
                raise
            failure = explained(error, door)
            raise CommandFailed(f"{failure} {_GOES_ON}", reason=failure.reason) from None


async def _upload(
    stub: ControllerServiceStub,
    metadata: Metadata,
    directory: Path,
    manifest: model_pb2.Manifest,
    missing: Sequence[pb.MissingBlob],
    advance: Callable[[int], None],
) -> model_pb2.Revision:
    """Sends what is missing, for as long as it takes: only silence has a bound."""
    clock, task = asyncio.get_running_loop(), asyncio.current_task()
    failures: list[Exception] = []

    async def kept(parts: AsyncIterator[pb.UploadRevisionRequest]) -> AsyncIterator[pb.UploadRevisionRequest]:
        try:
            async for part in parts:
                yield part
        except Exception as error:
            failures.append(error)
            raise

    try:
        async with asyncio.timeout(SILENCE_MAX_S) as silence:

            def went(count: int) -> None:
                if not silence.expired():
                    silence.reschedule(clock.time() + SILENCE_MAX_S)
                advance(count)

            parts = kept(_parts(directory, manifest, missing, went))
            reply = await stub.UploadRevision(parts, metadata=metadata)
    except asyncio.CancelledError:
        # gRPC cancels a call whose parts cannot be made, and keeps the reason to itself.
        if not failures or (task is not None and task.cancelling()):
            raise
        raise failures[0] from None
    except TimeoutError:
        raise CommandFailed(f"the mesh took nothing for {SILENCE_MAX_S:.0f} s. {_GOES_ON}") from None
    return reply.revision


async def _parts(
    directory: Path,
    manifest: model_pb2.Manifest,
    missing: Sequence[pb.MissingBlob],
    advance: Callable[[int], None],
) -> AsyncIterator[pb.UploadRevisionRequest]:
    yield pb.UploadRevisionRequest(manifest=manifest)
    paths = {file.sha256: directory / file.path for file in manifest.files}
    for blob in missing:
        offset = blob.offset
        async for data in _pieces(paths[blob.sha256], offset):
            yield pb.UploadRevisionRequest(chunk=pb.BlobChunk(sha256=blob.sha256, offset=offset, data=data))
            offset += len(data)
            advance(len(data))


async def _pieces(file: Path, offset: int) -> AsyncIterator[bytes]:
    """What a file holds from a byte on."""
    try:
        with await asyncio.to_thread(file.open, "rb") as stream:
            stream.seek(offset)
            while data := await asyncio.to_thread(stream.read, CHUNK_BYTES):
                yield data
    except OSError as error:
        raise CommandFailed(
            f"{file} cannot be read any more: {error.strerror or error}. See to that first. {_GOES_ON}"
        ) from None


async def _remove(model: str, revision: str) -> None:
    async with entrance(find_door()) as (channel, metadata):
        await ControllerServiceStub(channel).DeleteRevision(
            pb.DeleteRevisionRequest(model=model, revision=revision),
            metadata=metadata,
            timeout=ANSWER_TIMEOUT_S,
        )


async def _revisions(model: str | None) -> list[model_pb2.Revision]:
    async with entrance(find_door()) as (channel, metadata):
        stub = ControllerServiceStub(channel)
        name = model or await _default_model(stub, metadata)
        reply = await stub.ListRevisions(
            pb.ListRevisionsRequest(model=name), metadata=metadata, timeout=ANSWER_TIMEOUT_S
        )
    return list(reply.revisions)


async def _default_model(stub: Any, metadata: Any) -> str:
    reply = await stub.ListModels(
        pb.ControllerServiceListModelsRequest(), metadata=metadata, timeout=ANSWER_TIMEOUT_S
    )
    return next((model.name for model in reply.models if model.is_default), "")


def _context_tokens(directory: Path) -> int:
    """The longest context that the model was made for, by its configuration."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        raise CommandFailed(f"{directory}: there is no config.json that can be read.") from None
    lengths = [config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)]
    if not lengths:
        raise CommandFailed("config.json does not say how long a context may be; set --context-tokens.")
    return int(lengths[0])


def _golden(file: Path) -> list[model_pb2.GoldenPrompt]:
    """Golden prompts from a JSON list of objects with the contract's fields."""
    with file.open("rb") as stream:
        text = stream.read(GOLDEN_BYTES_MAX)
    try:
        entries = json.loads(text)
        return [ParseDict(entry, model_pb2.GoldenPrompt()) for entry in entries]
    except (ValueError, TypeError, AttributeError, ParseError):
        raise CommandFailed(
            f'{file}: must be a JSON list such as [{{"text": "2 + 2 =", "expected": "4", "max_tokens": 8}}].'
        ) from None


@contextlib.contextmanager
def _bar(manifest: model_pb2.Manifest, missing: Sequence[pb.MissingBlob]) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error over the bytes that are sent; a line where none is."""
    if not missing:
        Console(stderr=True).print("Every file is there already; only the manifest is sent.")
        yield lambda _: None
        return
    sizes = {file.sha256: file.size_bytes for file in manifest.files}
    total, done = sum(sizes.values()), sum(sizes.values())
    done -= sum(sizes[blob.sha256] - blob.offset for blob in missing)
    columns = (TextColumn("Uploading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=total, completed=done)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def _spinning(words: str) -> Iterator[None]:
    with Console(stderr=True).status(words):
        yield


def _show(found: list[model_pb2.Revision], *, as_json: bool) -> None:
    rows = rows_of(found)
    table.show(rows if as_json else [_for_people(row) for row in rows], _COLUMNS, as_json=as_json)


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    manifest = row["manifest"]
    name = str(manifest["quantization"]).removeprefix("QUANTIZATION_").lower()
    return {**row, **manifest, "quantization": name.replace("unspecified", "auto")}
