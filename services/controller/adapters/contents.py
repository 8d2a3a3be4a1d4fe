"""The contents of a manifest. Owns: which are here, which are copied, fetched or sent, and their room.

Must not know: revisions' names, or directories of what was uploaded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.clock import Clock
from services.common.threads import in_thread
from services.controller.adapters.blob_cache import BlobCache
from services.controller.adapters.blob_intake import Chunk, paced, take
from services.controller.adapters.blobs import Blobs
from services.controller.adapters.local_contents import LocalContents
from services.controller.core.catalog import Revision


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a revision lacks: where to send each blob from on, which files of ours to copy, which to fetch."""

    offsets: Mapping[str, int]
    copies: Mapping[str, Path]
    fetches: Collection[str]


class Contents:
    """Sees that contents are whole blobs.

    Args:
        blobs: Where they go.
        clock: The time.
        cache: Brings contents of revisions that are at home elsewhere; None: there are none.
    """

    def __init__(self, blobs: Blobs, clock: Clock, cache: BlobCache | None = None) -> None:
        self._blobs = blobs
        self._cache = cache
        self._local = LocalContents(blobs)
        self._clock = clock
        # Nobody looks at contents on their way while another one settles them.
        self._settling = asyncio.Lock()

    async def missing(
        self, sizes: Mapping[str, int], revisions: Collection[Revision], *, may_settle: Callable[[], bool]
    ) -> Mapping[str, int]:
        """Those of `sizes` that must be sent, with the byte from which on.

        Args:
            sizes: The contents.
            revisions: Whose files are ours already.
            may_settle: Whether those that came whole get their names; not while an upload may write to them.
        """
        async with self._settling:
            if may_settle():
                await in_thread(self._blobs.settle, self._unwritten(sizes))
            return (await in_thread(self._needs, sizes, revisions)).offsets

    async def fill(
        self,
        sizes: Mapping[str, int],
        revisions: Collection[Revision],
        named: Collection[str],
        chunks: AsyncIterator[Chunk],
    ) -> None:
        """Makes every content of `sizes` a whole blob, of our own files and of what comes.

        Args:
            sizes: The contents.
            revisions: Whose files are ours already.
            named: The digests that are never removed to make room.
            chunks: What the client sends.

        Raises:
            ArtifactInvalid, ArgumentInvalid, ClientStalled, QuotaExceeded, UploadConflict: See `take`,
                `paced` and `Blobs.make_room`.
            StoreUnavailable: What is at home elsewhere cannot be fetched.
        """
        async with self._settling:
            needs = await in_thread(self._prepare, sizes, revisions, named)
        for sha256, path in needs.copies.items():
            await self._local.copy(sha256, sizes[sha256], path)
        for sha256 in needs.fetches:
            assert self._cache is not None
            await self._cache.fetch(sha256, sizes[sha256])
        async with contextlib.aclosing(paced(chunks, self._clock)) as coming:
            await take(self._blobs, {one: sizes[one] for one in needs.offsets}, coming)

    def _prepare(
        self, sizes: Mapping[str, int], revisions: Collection[Revision], named: Collection[str]
    ) -> _Needs:
        """Makes room: first of what others left and never came back for. Blocks."""
        self._blobs.collect(named)
        self._blobs.settle(self._unwritten(sizes))
        needs = self._needs(sizes, revisions)
        wanted = {one: sizes[one] for one in (*needs.offsets, *needs.copies, *needs.fetches)}
        self._blobs.make_room(wanted, named, elsewhere=self._elsewhere(revisions))
        return needs

    def _needs(self, sizes: Mapping[str, int], revisions: Collection[Revision]) -> _Needs:
        missing = self._blobs.missing(sizes)
        copies = self._local.find(revisions, {one: sizes[one] for one in missing})
        fetches = {one for one in missing if one not in copies and self._offers(one)}
        offsets = {one: at for one, at in missing.items() if one not in copies and one not in fetches}
        return _Needs(offsets, copies, fetches)

    def _offers(self, sha256: str) -> bool:
        return self._cache is not None and self._cache.offers(sha256)

    def _unwritten(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Those that no fetch writes to."""
        cache = self._cache
        return {one: size for one, size in sizes.items() if cache is None or not cache.is_fetching(one)}

    def _elsewhere(self, revisions: Collection[Revision]) -> dict[str, int]:
        """What can be fetched, and has its room here whether it was or not."""
        files = (file for revision in revisions for file in revision.manifest.files)
        return {file.sha256: file.size_bytes for file in files if self._offers(file.sha256)}
