"""Uploads. Owns: how a manifest and its bytes become a registered revision, and how one is forgotten.

Bytes are kept by their digest, each content once. A revision's directory holds links to them, and appears
under its name only when every file is whole and every header was read: whoever sees it can load it. What a
revision needs and another one has already is not sent again.

    blobs/                       the contents
    revisions/MODEL/REVISION/    the files by name, and manifest.json
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.common import artifacts, logs, safetensors_files
from services.common.clock import Clock
from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    InternalError,
    QuotaExceeded,
    RevisionInUse,
    UploadConflict,
)
from services.common.hf_tokenizer import HfTokenizer
from services.common.partial_file import directory_descriptor
from services.controller.adapters.blobs import Blobs, Chunk
from services.controller.core.catalog import Catalog, Manifest, ModelFile, Revision

_MANIFEST = "manifest.json"

# The contract's form. A revision's name becomes a directory's: one that begins with a dot would be another's
# parent, or one of those that are on their way.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RECORD = TypeAdapter(Revision)


class Uploads:
    """Takes revisions in, under a directory of this machine.

    Args:
        catalog: The registered revisions; what was taken in before joins it with `load`.
        directory: Where blobs and revisions are kept; made when missing.
        clock: The time.
        bytes_max: Most bytes of all blobs.
    """

    def __init__(self, catalog: Catalog, directory: Path, clock: Clock, *, bytes_max: int) -> None:
        self._catalog = catalog
        self._blobs = Blobs(directory / "blobs", clock, bytes_max=bytes_max)
        self._revisions = directory / "revisions"
        self._clock = clock
        self._bytes_max = bytes_max
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Registers what was taken in before; what is damaged is named in the log and passed over."""
        for revision in await asyncio.to_thread(lambda: list(self._read_all())):
            if revision.manifest.model in self._catalog.models():
                self._catalog.register(revision)
            else:
                # It is kept: the model may be served again.
                logs.get_logger().warning("revision.of_no_model", model=revision.manifest.model)
        await asyncio.to_thread(self._blobs.collect, self._named())

    async def plan(self, manifest: Manifest) -> tuple[tuple[str, int], ...]:
        """The blobs that are missing, with the byte from which on each is.

        Raises:
            ArtifactInvalid, ArgumentInvalid, ModelUnknown, QuotaExceeded, RevisionInUse: It cannot be taken.
        """
        checked = self._check(manifest)
        if self._known(checked) is not None:
            return ()
        return await asyncio.to_thread(lambda: tuple(self._missing(checked)))

    async def receive(self, manifest: Manifest, chunks: AsyncIterator[Chunk]) -> Revision:
        """Takes in the missing bytes and registers the revision; what was whole stays after a failure.

        Raises:
            ArtifactInvalid: Bytes or headers are not what the manifest says, or a file could run code.
            UploadConflict: Another upload is under way.
            ClientStalled: Nothing came for too long.
            ArgumentInvalid, ModelUnknown, QuotaExceeded, RevisionInUse: It cannot be taken.
        """
        checked = self._check(manifest)
        if (known := self._known(checked)) is not None:
            return known
        if self._lock.locked():
            raise UploadConflict("Another upload is under way; try again when it has ended.")
        async with self._lock:
            try:
                # What others left and never came back for makes room first.
                await asyncio.to_thread(self._blobs.collect, self._named())
                missing = dict(await asyncio.to_thread(lambda: list(self._missing(checked))))
                sizes = {file.sha256: file.size_bytes for file in checked.files if file.sha256 in missing}
                await self._blobs.take(sizes, chunks)
                # The lock is held to the end of it, also where the client goes away meanwhile.
                revision = await _undisturbed(asyncio.to_thread(self._compose, checked))
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                    raise InternalError("The controller's disk is full; what came so far is kept.") from None
                raise
            self._catalog.register(revision)
        logs.get_logger().info(
            "revision.uploaded", model=checked.model, revision=checked.revision, files=len(checked.files)
        )
        return revision

    async def delete(self, model: str, name: str) -> None:
        """Forgets a revision, and the blobs that no other one names.

        Raises:
            ModelUnknown, RevisionUnknown: There is no such revision.
            RevisionInUse: It was not uploaded: the mesh was started with it.
        """
        deleted = self._catalog.revision(model, name)
        directory = self._revisions / model / name
        if not directory.is_dir():
            raise RevisionInUse("The mesh was started with this revision; it cannot be deleted.")
        self._catalog.forget(model, name)
        # At once under a name that means nothing: one that is half removed would be a damaged one.
        gone = directory.with_name(f".{name}.gone")
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)
        await asyncio.to_thread(directory.replace, gone)
        await asyncio.to_thread(shutil.rmtree, gone)
        named = self._named()
        await asyncio.to_thread(
            self._blobs.drop, {file.sha256 for file in deleted.manifest.files if file.sha256 not in named}
        )
        logs.get_logger().info("revision.deleted", model=model, revision=name)

    def _check(self, manifest: Manifest) -> Manifest:
        """The manifest with what we know better than its sender."""
        if manifest.model not in self._catalog.models():
            served = ", ".join(self._catalog.models())
            raise ArgumentInvalid(f"manifest.model: this controller leads {served}.")
        if manifest.revision and _NAME.fullmatch(manifest.revision) is None:
            raise ArgumentInvalid(
                "manifest.revision: 1 to 63 of the characters a-z 0-9 . _ - are allowed, the first no sign."
            )
        files = [artifacts.FileDigest(one.path, one.size_bytes, one.sha256) for one in manifest.files]
        artifacts.check_files(files)
        names = {file.path for file in files}
        for needed in ("config.json", "tokenizer.json"):
            if needed not in names:
                raise ArtifactInvalid(f"{needed}: is not among the files.")
        if not any(name.endswith(".safetensors") for name in names):
            raise ArtifactInvalid("There are no weights in safetensors format among the files.")
        if _MANIFEST in names:
            raise ArtifactInvalid(f"{_MANIFEST}: this name is kept for the manifest itself.")
        lowered = {name.lower() for name in names}
        if len(lowered) != len(names):
            raise ArtifactInvalid("Two files have names that differ in case alone.")
        total = sum(file.size_bytes for file in files)
        if total > self._bytes_max:
            raise QuotaExceeded(f"The revision has {total} bytes; the controller keeps {self._bytes_max}.")
        digest = artifacts.tokenizer_digest(files)
        if manifest.tokenizer_sha256 not in {"", digest}:
            raise ArgumentInvalid("manifest.tokenizer_sha256: is not the digest of these files.")
        ordered = tuple(sorted(manifest.files, key=lambda file: file.path))
        checked = replace(manifest, files=ordered, tokenizer_sha256=digest)
        return checked if checked.revision else checked.named()

    def _known(self, manifest: Manifest) -> Revision | None:
        """The same revision, where it is registered already.

        Raises:
            RevisionInUse: Another one bears its name.
        """
        for known in self._catalog.revisions(manifest.model):
            if known.manifest.revision == manifest.revision:
                if known.manifest == manifest:
                    return known
                raise RevisionInUse(
                    f"The revision {manifest.revision} exists with other content; choose another name."
                )
        return None

    def _missing(self, manifest: Manifest) -> Iterable[tuple[str, int]]:
        seen: set[str] = set()
        for file in manifest.files:
            if file.sha256 in seen or self._source(file) is not None:
                continue
            seen.add(file.sha256)
            yield file.sha256, self._blobs.received_bytes(file.sha256, file.size_bytes)

    def _source(self, file: ModelFile) -> Path | None:
        """A file that has this content already: a blob, or one of a registered revision."""
        if (blob := self._blobs.whole(file.sha256, file.size_bytes)) is not None:
            return blob
        for model in self._catalog.models():
            for revision in self._catalog.revisions(model):
                for known in revision.manifest.files:
                    path = Path(revision.local_path) / known.path
                    same = known.sha256 == file.sha256 and known.size_bytes == file.size_bytes
                    if same and path.is_file() and path.stat().st_size == file.size_bytes:
                        return path
        return None

    def _present(self, file: ModelFile) -> Path:
        source = self._source(file)
        if source is None:
            raise ArtifactInvalid(f"{file.path}: its content is gone; plan the upload again.")
        return source

    def _compose(self, manifest: Manifest) -> Revision:
        """Makes the revision's directory, and gives it its name when everything in it was read."""
        final = self._revisions / manifest.model / manifest.revision
        fresh = final.with_name(f".{manifest.revision}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            for file in manifest.files:
                _link(self._present(file), fresh / file.path)
            names = [file.path for file in manifest.files]
            safetensors_files.read_config(fresh)
            safetensors_files.check_files(fresh, names)
            for name in names:
                if name.endswith("config.json"):
                    artifacts.refuse_code(fresh / name)
            revision = Revision(manifest, str(final.resolve()), self._clock.now())
            with (fresh / _MANIFEST).open("w", encoding="utf-8") as stream:
                json.dump(asdict(revision), stream)
                stream.flush()
                os.fsync(stream.fileno())
            HfTokenizer.load(fresh)
            shutil.rmtree(final, ignore_errors=True)
            fresh.replace(final)
            # What was answered for is there after the power fails.
            with directory_descriptor(final.parent) as descriptor:
                os.fsync(descriptor)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return revision

    def _read_all(self) -> Iterable[Revision]:
        for left in self._revisions.glob("*/.*"):
            # A crash left it on its way in or out.
            shutil.rmtree(left, ignore_errors=True)
        for record in sorted(self._revisions.glob("*/*/manifest.json")):
            revision = _read(record)
            if revision is None:
                logs.get_logger().error("revision.unreadable", revision=record.parent.name)
            else:
                yield replace(revision, local_path=str(record.parent.resolve()))

    def _named(self) -> set[str]:
        """The digests of everything that a registered revision has."""
        return {
            file.sha256
            for model in self._catalog.models()
            for revision in self._catalog.revisions(model)
            for file in revision.manifest.files
        }


async def _undisturbed(work: Coroutine[Any, Any, Revision]) -> Revision:
    """Waits for `work` to its end, and is cancelled only then: a thread cannot be stopped."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _read(record: Path) -> Revision | None:
    """A revision that was taken in before; None where it is damaged."""
    try:
        revision = _RECORD.validate_json(record.read_bytes())
        files = revision.manifest.files
        whole = all((record.parent / file.path).stat().st_size == file.size_bytes for file in files)
    except (OSError, ValidationError):
        return None
    return revision if whole else None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system; the copy's digest is checked by whoever loads it.
        shutil.copyfile(source, target)
        with target.open("rb") as copy:
            os.fsync(copy.fileno())
