"""Revisions that are at home at a URL. Owns: in which order they get there and go, and who says what exists.

The URL says it; a directory of this machine is a copy, and what is a copy says so (`mark_copy`). Contents
come first, then the record, so that no record names what is not there; what a crash leaves between the two
nobody names, and it goes after a day. Contents that are gone again may have been removed by somebody whose
lease had run out: so they are looked at once more after the record is written.

Of what only this machine has, from the time before there was a URL, copies are made there. Must not know: how
bytes arrive, or who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from services.common import logs
from services.common.clock import Clock
from services.common.errors import ArtifactInvalid, RevisionInUse, StoreUnavailable
from services.common.known_digests import KnownDigests
from services.common.threads import in_thread
from services.controller.adapters.artifact_home import ArtifactHome, digests_of
from services.controller.adapters.blob_cache import BlobCache
from services.controller.adapters.blobs import ORPHAN_KEPT_S, Blobs
from services.controller.adapters.revision_directories import Composed, RevisionDirectories
from services.controller.adapters.while_leading import WhileLeading
from services.controller.core.catalog import Catalog, ModelFile, Revision

# While the store is away; each look takes several seconds by itself.
LOOK_AGAIN_S = 5.0
# What nobody names goes after a day, and may stay for another one.
SWEEP_S = ORPHAN_KEPT_S
# Members wait while a leader begins; what is cached is enough to lead them, and the rest can come later.
LOAD_PATIENCE_S = 30.0


class RevisionsAtUrl:
    """The home of one model's revisions, as one time of leading sees it.

    Args:
        home: The home.
        cache: Is told what may be fetched.
        blobs: The contents that are here, and who counts on them.
        directories: The copies.
        leading: Asks whether we lead, before anything that others read is changed.
        catalog: The registered revisions.
        clock: The time.
    """

    def __init__(
        self,
        home: ArtifactHome,
        cache: BlobCache,
        blobs: Blobs,
        directories: RevisionDirectories,
        leading: WhileLeading,
        catalog: Catalog,
        clock: Clock,
    ) -> None:
        self._home = home
        self._model = home.model
        self._cache = cache
        self._blobs = blobs
        self._directories = directories
        self._leading = leading
        self._catalog = catalog
        self._clock = clock
        self._known = KnownDigests()
        # Nothing is removed between the look whether a content is there and the record that names it.
        self._lock = asyncio.Lock()
        self._is_joined = False
        self._there: dict[str, Revision] = {}
        self._local: dict[str, Revision] = {}
        # What only this machine has.
        self._unhoused: dict[str, Revision] = {}

    def check(self) -> None:
        """Looks without asking anybody.

        Raises:
            StoreUnavailable: Nobody knows yet what exists.
        """
        if not self._is_joined:
            raise StoreUnavailable(
                "The store at the artifacts' URL has not answered since this controller began to lead. What"
                " is cached is served, and nothing can be changed: see `artifacts.failed` in the controller's"
                " log, and try again.",
                retry_after_s=LOOK_AGAIN_S,
            )

    async def load(self, local: Iterable[Revision]) -> list[Revision]:
        """What exists, oldest first; where the store does not answer: `local`, what this machine has."""
        everything = list(local)
        self._local = {one.manifest.revision: one for one in everything if one.manifest.model == self._model}
        others = [one for one in everything if one.manifest.model != self._model]
        try:
            async with asyncio.timeout(LOAD_PATIENCE_S):
                return others + await self._join(is_late=False)
        except (StoreUnavailable, TimeoutError) as error:
            self._catalog.is_partial = True
            logs.get_logger().error("artifacts.away", reason=str(error), cached=len(self._local))
            return everything

    async def follow(self, restore: Callable[[Revision], None]) -> None:
        """Goes on asking where the store was away, and then keeps it in order; until it is cancelled.

        Args:
            restore: Registers a revision, where nothing else has its name.
        """
        while not self._is_joined:
            await asyncio.sleep(LOOK_AGAIN_S)
            with contextlib.suppress(StoreUnavailable, OSError):
                for revision in await self._join(is_late=True):
                    restore(revision)
                self._catalog.is_partial = False
                logs.get_logger().info("artifacts.back", revisions=len(self._there))
        await self._adopt_all()
        while True:
            with contextlib.suppress(StoreUnavailable):
                await self.sweep()
            await asyncio.sleep(SWEEP_S)

    async def take_in(self, composed: Composed, blob_of: Callable[[ModelFile], Path]) -> Revision:
        """Has a revision exist; its directory here gets its name too.

        Raises:
            RevisionInUse: Another one bears its name at the URL.
            NotLeader: Another controller leads.
            StoreUnavailable: The store does not answer; the revision may exist nevertheless.
            OSError: A content is gone, or the directory cannot get its name.
        """
        revision = composed.revision
        contents = {file.sha256: blob_of(file) for file in revision.manifest.files}
        async with self._lock:
            await self._home.keep(contents)
            await self._leading.confirm()
            await in_thread(self._directories.place, composed)
            try:
                return await self._name(revision, contents)
            except BaseException:
                with contextlib.suppress(OSError):
                    await in_thread(self._directories.bury, revision)
                await in_thread(self._directories.clear)
                raise

    async def complete(self, revision: Revision) -> None:
        """Makes the copy of a revision that exists, once each of its contents was fetched; else does nothing.

        A leader that begins while the store is away knows it by that, and a worker on this machine reads it.
        """
        name = revision.manifest.revision
        async with self._lock:
            there = self._there.get(name)
            if there is None or not self._catalog.knows(self._model, name):
                return
            try:
                await in_thread(self._copy, there)
            except (OSError, ArtifactInvalid) as error:
                # It is served from the cache as it is.
                logs.get_logger().warning("revision.uncopied", revision=name, reason=str(error))

    async def remove(self, revision: Revision) -> None:
        """Has a revision exist no more; without effect where it does not. Its contents stay.

        Raises:
            StoreUnavailable: The store does not answer; it may exist no more nevertheless.
        """
        async with self._lock:
            if not await self._home.take_name(revision.manifest):
                logs.get_logger().warning(
                    "revision.gone", model=self._model, revision=revision.manifest.revision
                )
            self._there.pop(revision.manifest.revision, None)
            self._offer()

    async def free(self, digests: Iterable[str], named: Collection[str] = ()) -> None:
        """Removes contents that no revision has and nobody counts on.

        Args:
            digests: Which.
            named: What stays as well.

        Raises:
            NotLeader: Another controller leads.
            StoreUnavailable: The store does not answer, or nobody can say who leads; the rest stays.
        """
        for sha256 in digests:
            async with self._lock:
                await self._leading.confirm()
                wanted = sha256 in named or sha256 in digests_of(self._there.values())
                if not wanted and not self._blobs.is_promised(sha256):
                    await self._home.drop(sha256)

    async def sweep(self) -> None:
        """Removes what no record has named for a day: a crash left it, or an upload that never went on.

        Raises:
            NotLeader, StoreUnavailable: See `free`.
        """
        async with self._lock:
            contents, records = await self._home.contents(), await self._home.records()
        if records.unreadable:
            # One of them may name any of the contents.
            logs.get_logger().warning("artifacts.unswept", unreadable=len(records.unreadable))
            return
        named, old_s = digests_of(records.revisions), self._clock.now() - ORPHAN_KEPT_S
        orphans = [
            sha256
            for sha256, facts in contents.items()
            if sha256 not in named and facts.modified_s is not None and facts.modified_s <= old_s
        ]
        await self.free(orphans, named)
        logs.get_logger().info("artifacts.swept", contents=len(contents), orphans=len(orphans))

    async def _join(self, *, is_late: bool) -> list[Revision]:
        """Reads what exists, and brings the copies in line with it.

        Args:
            is_late: Whether the copies are registered already, and may be in use: then none is touched.
        """
        copies = await in_thread(self._copies)
        await self._home.enter(is_known=bool(copies))
        records = await self._home.records()
        found = [await in_thread(self._placed, one, is_late) for one in records.revisions]
        self._there = {one.manifest.revision: one for one in found}
        for name, revision in self._local.items():
            if name in self._there:
                continue
            if name not in copies or name in records.unreadable:
                self._unhoused[name] = revision
            elif not is_late:
                logs.get_logger().info("revision.deleted_elsewhere", model=self._model, revision=name)
                await in_thread(self._directories.bury, revision)
                continue
            found.append(revision)
        await in_thread(self._directories.clear)
        self._offer()
        self._is_joined = True
        return sorted(found, key=lambda one: (one.create_time_s, one.manifest.revision))

    def _copy(self, revision: Revision) -> None:
        """Blocks."""
        manifest = revision.manifest
        found = {file.path: self._blobs.whole(file.sha256, file.size_bytes) for file in manifest.files}
        blobs = {path: blob for path, blob in found.items() if blob is not None}
        if len(blobs) < len(found) or self._directories.has(manifest):
            return
        composed = self._directories.compose(
            manifest, lambda file: blobs[file.path], create_time_s=revision.create_time_s
        )
        try:
            self._directories.place(composed)
        except BaseException:
            self._directories.discard(composed)
            raise

    def _copies(self) -> set[str]:
        return {name for name, one in self._local.items() if self._directories.is_copy(one)}

    def _placed(self, revision: Revision, is_late: bool) -> Revision:  # noqa: FBT001 - for a thread
        """A revision that exists, with the directory that its copy is in, or would be. Blocks."""
        manifest = revision.manifest
        local = self._local.get(manifest.revision)
        if local is not None and local.manifest == manifest:
            if not self._directories.is_copy(local):
                self._directories.mark_copy(local)
        elif not is_late:
            self._directories.make_way(manifest)
        return replace(revision, local_path=self._directories.path_of(manifest))

    async def _adopt_all(self) -> None:
        """Gives a home to what only this machine has."""
        for name, revision in self._unhoused.items():
            while self._catalog.knows(self._model, name):
                try:
                    await self._adopt(revision)
                except (StoreUnavailable, OSError) as error:
                    logs.get_logger().warning("revision.unadopted", revision=name, reason=str(error))
                    await asyncio.sleep(LOOK_AGAIN_S)
                    continue
                except RevisionInUse as error:
                    logs.get_logger().error("revision.name_taken", revision=name, reason=error.message)
                break

    async def _adopt(self, revision: Revision) -> None:
        manifest = revision.manifest
        async with self._lock:
            contents = {file.sha256: Path(revision.local_path) / file.path for file in manifest.files}
            for file in manifest.files:
                path = contents[file.sha256]
                if not await in_thread(self._known.matches, path, file.size_bytes, file.sha256):
                    logs.get_logger().error("revision.damaged", revision=manifest.revision, path=file.path)
                    return
            await self._home.keep(contents)
            await self._leading.confirm()
            if self._catalog.knows(self._model, manifest.revision):
                await self._name(revision, contents)
                await in_thread(self._directories.mark_copy, revision)
                logs.get_logger().info("revision.adopted", model=self._model, revision=manifest.revision)

    async def _name(self, revision: Revision, contents: Mapping[str, Path]) -> Revision:
        named = await self._home.give_name(revision)
        await self._home.keep(contents)
        self._there[named.manifest.revision] = named
        self._offer()
        return named

    def _offer(self) -> None:
        self._cache.offered = digests_of(self._there.values())
