"""The contents of a manifest. Owns: which are here, which are copied, which are sent, and room for them.

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
from services.controller.adapters.blob_intake import Chunk, paced, take
from services.controller.adapters.blobs import Blobs
from services.controller.adapters.local_contents import LocalContents
from services.controller.core.catalog import Revision


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a revision lacks: where to send each blob from on, and which files of ours to copy."""

    offsets: Mapping[str, int]
    copies: Mapping[str, Path]


class Contents:
    """Sees that contents are whole blobs.

    Args:
        blobs: Where they go.
        clock: The time.
    """

    def __init__(self, blobs: Blobs, clock: Clock) -> None:
        self._blobs = blobs
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
                await in_thread(self._blobs.settle, sizes)
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
        """
        async with self._settling:
            needs = await in_thread(self._prepare, sizes, revisions, named)
        for sha256, path in needs.copies.items():
            await self._local.copy(sha256, sizes[sha256], path)
        async with contextlib.aclosing(paced(chunks, self._clock)) as coming:
            await take(self._blobs, {one: sizes[one] for one in needs.offsets}, coming)

    def _prepare(
        self, sizes: Mapping[str, int], revisions: Collection[Revision], named: Collection[str]
    ) -> _Needs:
        """Makes room: first of what others left and never came back for. Blocks."""
        self._blobs.collect(named)
        self._blobs.settle(sizes)
        needs = self._needs(sizes, revisions)
        wanted = {one: sizes[one] for one in (*needs.offsets, *needs.copies)}
        self._blobs.make_room(wanted, named)
        return needs

    def _needs(self, sizes: Mapping[str, int], revisions: Collection[Revision]) -> _Needs:
        missing = self._blobs.missing(sizes)
        copies = self._local.find(revisions, {one: sizes[one] for one in missing})
        return _Needs({one: at for one, at in missing.items() if one not in copies}, copies)
