"""Contents of the artifacts' home that are needed here. Owns: that each is fetched once, checked, and whole.

Whoever needs a content that is being fetched waits for the same fetch. What was cut off goes on where it
ended. Must not know: revisions, or who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from services.common import logs
from services.common.errors import ArtifactInvalid
from services.common.threads import in_thread
from services.controller.adapters.artifact_home import ArtifactHome
from services.controller.adapters.blobs import Blobs

# Each has some ranges in memory; more at once fill the same line.
FETCHES_AT_ONCE_MAX = 2

Run = Callable[[Coroutine[Any, Any, Path]], Coroutine[Any, Any, Path]]
"""Awaits work that ends with the lead."""


class BlobCache:
    """Brings contents from their home.

    Args:
        home: Where they are.
        blobs: Where they go.
        named: The digests that are never removed to make room.
        run: Runs a fetch, and ends it when its time is over.
    """

    def __init__(
        self, home: ArtifactHome, blobs: Blobs, named: Callable[[], Collection[str]], run: Run
    ) -> None:
        self._home = home
        self._blobs = blobs
        self._named = named
        self._run = run
        self._places = asyncio.Semaphore(FETCHES_AT_ONCE_MAX)
        # One for each content that is on its way; whoever waits for it leaves without ending it.
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        # The contents of revisions that exist, by digest: what may be fetched at all.
        self.offered: Collection[str] = ()

    def offers(self, sha256: str) -> bool:
        """Whether a content can be had, as far as is known."""
        return sha256 in self.offered and not self._home.is_damaged(sha256)

    def is_fetching(self, sha256: str) -> bool:
        """Whether a content is on its way: nobody else may write to it."""
        return sha256 in self._fetching

    async def fetch(self, sha256: str, size_bytes: int) -> Path:
        """Where a content is, whole and checked, once it is here.

        Raises:
            ArtifactInvalid: At its home it is gone, or damaged.
            QuotaExceeded: There is no room for it.
            StoreUnavailable: Its home cannot be reached.
            NotLeader: Another controller leads.
            OSError: It cannot be written.
        """
        whole = await in_thread(self._blobs.whole, sha256, size_bytes)
        if whole is not None:
            return whole
        task = self._fetching.get(sha256)
        if task is None:
            task = asyncio.create_task(self._run(self._fetch(sha256, size_bytes)), name="blob.fetch")
            self._fetching[sha256] = task
            task.add_done_callback(lambda done: self._ended(sha256, done))
        await asyncio.wait({task})
        return task.result()

    def _ended(self, sha256: str, task: asyncio.Task[Path]) -> None:
        del self._fetching[sha256]
        if not task.cancelled():
            # Looked at, where everybody who waited has left.
            task.exception()

    async def _fetch(self, sha256: str, size_bytes: int) -> Path:
        async with self._places:
            await self._check(sha256, size_bytes)
            await in_thread(self._blobs.make_room, {sha256: size_bytes}, self._named())
            # What an earlier attempt left may be wrong where its home is right; a second one has none of it.
            with contextlib.suppress(ArtifactInvalid):
                return await self._write(sha256, size_bytes)
            try:
                return await self._write(sha256, size_bytes)
            except ArtifactInvalid:
                self._home.tell_damaged(sha256)
                raise _damaged(sha256) from None

    async def _check(self, sha256: str, size_bytes: int) -> None:
        if self._home.is_damaged(sha256):
            raise _damaged(sha256)
        found = await self._home.size(sha256)
        if found is None:
            logs.get_logger().error("artifacts.missing", sha256=sha256)
        if found != size_bytes:
            self._home.tell_damaged(sha256)
            raise _damaged(sha256)

    async def _write(self, sha256: str, size_bytes: int) -> Path:
        """Raises ArtifactInvalid, and leaves nothing, where what came is not what the digest says."""
        file = self._blobs.part(sha256, size_bytes)
        try:
            at = await in_thread(file.open)
            async with contextlib.aclosing(self._home.read(sha256, at, size_bytes)) as coming:
                async for data in coming:
                    await in_thread(file.append, data)
            await in_thread(file.finish)
        except ArtifactInvalid:
            await in_thread(file.discard)
            raise
        finally:
            file.close()
        logs.get_logger().info("artifacts.fetched", sha256=sha256, size_bytes=size_bytes)
        return self._blobs.path(sha256)


def _damaged(sha256: str) -> ArtifactInvalid:
    return ArtifactInvalid(
        f"The content {sha256[:12]}... is damaged or gone at the artifacts' URL. Push again, and it is sent"
        " there once more; to mend a revision that exists, push its files under another name."
    )
