"""Uploads. Owns: how a manifest and its bytes become a registered revision, and how one is forgotten.

Bytes are kept by their digest, each content once. A revision's directory holds links to them. What a revision
needs and another one has already is not sent again.

    blobs/                       the contents
    revisions/MODEL/REVISION/    the files by name, and manifest.json

Where revisions have their home at a URL, what is here is a copy of it (see `revisions_at_url`).

Each time of leading has an object of its own over the same directory, and an earlier one may go on for a
while: in a process that stood still and has not noticed, or in a thread. It spoils nothing. What it writes is
its own file, which the next one takes over only when it is closed (see `blobs`). A revision's name is given
and taken away only right after the lease was renewed, and a client is told of it after it was renewed once
more: whoever leads later has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from services.common import logs
from services.common.clock import Clock
from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    InternalError,
    NotLeader,
    QuotaExceeded,
    RevisionInUse,
    StoreUnavailable,
    UploadConflict,
)
from services.common.threads import in_thread, to_its_end
from services.controller.adapters.artifact_home import ArtifactHome
from services.controller.adapters.blob_cache import BlobCache
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.blobs import PROMISE_KEPT_S, Blobs
from services.controller.adapters.cached_revisions import CachedRevisionFiles
from services.controller.adapters.contents import Contents
from services.controller.adapters.disk_told import disk_told
from services.controller.adapters.local_revisions import LocalRevisionFiles
from services.controller.adapters.manifest_checks import check_manifest
from services.controller.adapters.revision_directories import RevisionDirectories
from services.controller.adapters.revision_records import encode
from services.controller.adapters.revisions_at_url import RevisionsAtUrl
from services.controller.adapters.tokenizer_process import try_tokenizer
from services.controller.adapters.while_leading import StillLeading, WhileLeading, nobody_else_leads
from services.controller.core.catalog import Catalog, Manifest, ModelFile, Revision
from services.controller.core.ports import RevisionFiles

# For whom contents are kept while they are taken in; one upload is under way at a time.
_UNDER_WAY = "an upload"


class Uploads:
    """Takes revisions in, under a directory of this machine.

    Args:
        catalog: The registered revisions; what was taken in before joins it with `load`.
        directory: Where blobs and revisions are kept; made when missing.
        clock: The time.
        bytes_max: Most bytes of all blobs. Copies are not counted that revisions have of them where the file
            system has no hard links: then a revision takes its size once more.
        still_leading: Asks whether we lead, before anything that other controllers read is changed.
        read_tokenizer: Reads the tokenizer of a directory; raises ArtifactInvalid where nobody could.
        home: Where revisions are kept; None: in the directory alone.

    Attributes:
        files: The content of the registered revisions.
    """

    def __init__(
        self,
        catalog: Catalog,
        directory: Path,
        clock: Clock,
        *,
        bytes_max: int,
        still_leading: StillLeading = nobody_else_leads,
        read_tokenizer: Callable[[Path], Awaitable[None]] = try_tokenizer,
        home: ArtifactHome | None = None,
    ) -> None:
        self._catalog = catalog
        self._blobs = Blobs(directory / "blobs", clock, bytes_max=bytes_max)
        self._directories = RevisionDirectories(
            directory / "revisions", clock, home=home.identity if home else ""
        )
        self._clock = clock
        self._bytes_max = bytes_max
        self._leading = WhileLeading(still_leading)
        cache = BlobCache(home, self._blobs, self._named, self._leading.run) if home else None
        self._contents = Contents(self._blobs, clock, cache)
        self._at_url = (
            RevisionsAtUrl(home, cache, self._blobs, self._directories, self._leading, catalog, clock)
            if home and cache
            else None
        )
        self.files: RevisionFiles = (
            CachedRevisionFiles(catalog, cache, self._at_url.complete)
            if cache and self._at_url
            else LocalRevisionFiles(catalog)
        )
        self._following: asyncio.Task[None] | None = None
        self._read_tokenizer = read_tokenizer
        # One upload at a time.
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Registers what was taken in before; what is damaged is named in the log and passed over."""
        found = await in_thread(self._directories.read_all)
        if self._at_url is not None:
            found = await self._at_url.load(found)
        for revision in found:
            self._restore(revision)
        await in_thread(self._blobs.collect, self._named())
        if self._at_url is not None:
            following = self._leading.run(self._at_url.follow(self._restore))
            self._following = asyncio.create_task(_until_over(following), name="uploads.following")

    def close(self) -> None:
        """Ends the upload under way with NotLeader, and refuses what comes: another controller may lead."""
        self._leading.close()

    async def plan(self, manifest: Manifest) -> tuple[tuple[str, int], ...]:
        """The blobs that are missing, with the byte from which on each is; the others stay for some minutes.

        Raises:
            ArtifactInvalid, ArgumentInvalid, ModelUnknown, QuotaExceeded, RevisionInUse: It cannot be taken.
            NotLeader: Another controller leads.
            StoreUnavailable: The revisions' home has not answered yet.
        """
        self._check_ready()
        checked = self._check(manifest)
        if self._known(checked) is not None:
            return ()
        sizes = _sizes(checked)
        self._blobs.promise(_plan_of(checked), sizes, PROMISE_KEPT_S)
        with disk_told():
            # An upload under way may write to them, and settles what it needs by itself.
            missing = await self._contents.missing(
                sizes, self._revisions(), may_settle=lambda: not self._lock.locked()
            )
        return tuple(missing.items())

    async def receive(self, manifest: Manifest, chunks: AsyncIterator[Chunk]) -> Revision:
        """Takes in the missing bytes and registers the revision; what was whole stays after a failure.

        Once every byte is here the revision is registered, also where the client has gone away meanwhile.

        Raises:
            ArtifactInvalid: Bytes or headers are not what the manifest says, or a file could run code.
            UploadConflict: Another upload is under way.
            ClientStalled: Nothing came for too long, or too little.
            QuotaExceeded: There is no room for it, or the disk is full.
            ArgumentInvalid, ModelUnknown, RevisionInUse: It cannot be taken.
            NotLeader: Another controller leads, or does by now; what came is kept for it.
            StoreUnavailable: Nobody can say who leads, or the revisions' home does not answer.
        """
        self._check_ready()
        checked = self._check(manifest)
        if (known := self._known(checked)) is not None:
            return known
        if self._lock.locked():
            raise UploadConflict("Another upload is under way; try again when it has ended.")
        async with self._lock:
            return await self._leading.run(self._take_in(checked, chunks))

    async def _take_in(self, manifest: Manifest, chunks: AsyncIterator[Chunk]) -> Revision:
        self._blobs.promise(_UNDER_WAY, _sizes(manifest), math.inf)
        try:
            with disk_told():
                await self._leading.confirm()
                await self._fill(manifest, chunks)
                return await to_its_end(self._register(manifest))
        except (OSError, ArtifactInvalid):
            # What the next leader did to our files is no fault of theirs, nor of the client's.
            await self._leading.confirm()
            raise
        finally:
            # What was promised to whoever planned it holds: after a failure they come again.
            self._blobs.release(_UNDER_WAY)

    async def delete(
        self, model: str, name: str, *, check_unused: Callable[[str, str], None] | None = None
    ) -> None:
        """Forgets a revision, and the blobs that no other one names; can be called again where it failed.

        Args:
            model: The model.
            name: The revision.
            check_unused: Raises for a revision that somebody uses; called in the very turn in which it goes.

        Raises:
            ModelUnknown, RevisionUnknown: There is no such revision.
            RevisionInUse: It was not uploaded: the mesh was started with it.
            InternalError: Its directory cannot be removed; it stays registered.
            NotLeader: Another controller leads.
            StoreUnavailable: Nobody can say who leads, or the revisions' home does not answer.
        """
        self._check_ready()
        self._deletable(model, name)
        await self._leading.confirm()
        # Others had their turn meanwhile: a rollout may have begun with it, or somebody else deleted it.
        deleted = self._deletable(model, name)
        if check_unused is not None:
            check_unused(model, name)
        if self._at_url is not None:
            await to_its_end(self._leading.run(self._remove_at_url(deleted, self._at_url)))
        self._bury(deleted)
        if self._at_url is None:
            self._catalog.forget(model, name)
        digests = _sizes(deleted.manifest).keys() - self._named()
        await in_thread(self._free, digests)
        logs.get_logger().info("revision.deleted", model=model, revision=name)
        if self._at_url is not None:
            # What stays for want of the store goes with the next sweep.
            with contextlib.suppress(StoreUnavailable, NotLeader):
                await self._at_url.free(digests)

    async def _remove_at_url(self, revision: Revision, at_url: RevisionsAtUrl) -> None:
        """Nobody can begin to use it while its home is asked; where that fails it is there as before."""
        manifest = revision.manifest
        place = self._catalog.forget(manifest.model, manifest.revision)
        try:
            await at_url.remove(revision)
        except BaseException:
            if not self._catalog.knows(manifest.model, manifest.revision):
                self._catalog.put_back(revision, place)
            raise

    def _bury(self, revision: Revision) -> None:
        """Takes its name from a directory in this very turn: no rollout begins with what is half gone."""
        model, name = revision.manifest.model, revision.manifest.revision
        try:
            self._directories.bury(revision)
        except FileNotFoundError:
            if self._at_url is None:
                logs.get_logger().warning("revision.gone", model=model, revision=name)
        except OSError as error:
            logs.get_logger().error("revision.undeleted", model=model, revision=name, exc_info=error)
            if self._at_url is None:
                raise InternalError(
                    "The revision cannot be deleted now, and stays; delete it again."
                ) from None

    def _check_ready(self) -> None:
        self._leading.check()
        if self._at_url is not None:
            self._at_url.check()

    def _deletable(self, model: str, name: str) -> Revision:
        found = self._catalog.revision(model, name)
        same = [one for one in self._revisions() if one.local_path == found.local_path]
        if not self._directories.holds(found) or len(same) > 1:
            raise RevisionInUse("The mesh was started with this revision; it cannot be deleted.")
        return found

    def _free(self, digests: Iterable[str]) -> None:
        """Gives the room of what was deleted back. Blocks."""
        self._directories.clear()
        self._blobs.drop(digests)

    def _restore(self, revision: Revision) -> None:
        """Registers what was taken in before, where nothing else has its name."""
        manifest, log = revision.manifest, logs.get_logger()
        if manifest.model not in self._catalog.models():
            # It is kept: the model may be served again.
            log.warning("revision.of_no_model", model=manifest.model)
            return
        for known in self._catalog.revisions(manifest.model):
            if known.manifest.revision == manifest.revision:
                if known.manifest != manifest:
                    log.error("revision.name_taken", model=manifest.model, revision=manifest.revision)
                # The mesh was started with this one, and its directory is read.
                return
        self._catalog.register(revision)

    async def _fill(self, manifest: Manifest, chunks: AsyncIterator[Chunk]) -> None:
        """Sees that every content of a manifest is a whole blob."""
        await in_thread(self._directories.clear)
        await self._contents.fill(_sizes(manifest), self._revisions(), self._named(), chunks)

    async def _register(self, manifest: Manifest) -> Revision:
        composed = await in_thread(self._directories.compose, manifest, self._blob_of)
        revision = composed.revision
        try:
            await self._read_tokenizer(composed.directory)
            if self._at_url is not None:
                revision = await self._at_url.take_in(composed, self._blob_of)
            else:
                await self._leading.confirm()
                await in_thread(self._directories.place, composed)
        except BaseException:
            await in_thread(self._directories.discard, composed)
            raise
        await self._leading.confirm()
        self._catalog.register(revision)
        self._blobs.release(_plan_of(manifest))
        logs.get_logger().info(
            "revision.uploaded",
            model=manifest.model,
            revision=manifest.revision,
            files=len(manifest.files),
        )
        return revision

    def _blob_of(self, file: ModelFile) -> Path:
        blob = self._blobs.whole(file.sha256, file.size_bytes)
        if blob is None:
            raise ArtifactInvalid(f"{file.path}: its content is gone; plan the upload again.")
        return blob

    def _check(self, manifest: Manifest) -> Manifest:
        """The manifest with what we know better than its sender."""
        if manifest.model not in self._catalog.models():
            served = ", ".join(self._catalog.models())
            raise ArgumentInvalid(f"manifest.model: this controller leads {served}.")
        checked = check_manifest(manifest)
        total = sum(file.size_bytes for file in checked.files)
        if total > self._bytes_max:
            raise QuotaExceeded(f"The revision has {total} bytes; the controller keeps {self._bytes_max}.")
        encode(checked, self._clock.now())
        return checked

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

    def _revisions(self) -> tuple[Revision, ...]:
        return tuple(one for model in self._catalog.models() for one in self._catalog.revisions(model))

    def _named(self) -> set[str]:
        """The digests of everything that a registered revision has."""
        return {file.sha256 for revision in self._revisions() for file in revision.manifest.files}


def _sizes(manifest: Manifest) -> dict[str, int]:
    """The contents of a manifest, each once; the check has seen that none has two sizes."""
    return {file.sha256: file.size_bytes for file in manifest.files}


def _plan_of(manifest: Manifest) -> str:
    """For whom a plan's promise is: whoever uploads this content under this name."""
    return f"{manifest.revision} {manifest.named().revision}"


async def _until_over(work: Awaitable[None]) -> None:
    """Waits for work that ends with the lead; a defect in it is told, and takes nothing else with it."""
    try:
        await work
    except NotLeader:
        return
    except Exception as error:  # noqa: BLE001 - nobody else awaits it
        logs.get_logger().error("artifacts.unfollowed", exc_info=error)
