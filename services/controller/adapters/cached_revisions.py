"""Revisions whose files may be elsewhere. Owns: that a file is read from a directory, or fetched first.

Must not know who asks for the files, or why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from services.common.errors import ArtifactInvalid, InternalError
from services.common.threads import in_thread
from services.controller.adapters.blob_cache import BlobCache
from services.controller.adapters.disk_told import disk_told
from services.controller.adapters.local_revisions import asked_file, read_file
from services.controller.core.catalog import Catalog, ModelFile, Revision

# Whoever downloads gives a controller up that sends nothing for a minute; a fetch may take longer.
SIGN_OF_LIFE_S = 10.0


class CachedRevisionFiles:
    """`RevisionFiles` over directories of this machine, and a cache for what they lack.

    Args:
        catalog: The registered revisions.
        cache: Brings contents from their home.
        fetched: Is told of each revision of which a content was fetched.
    """

    def __init__(
        self, catalog: Catalog, cache: BlobCache, fetched: Callable[[Revision], Awaitable[None]]
    ) -> None:
        self._catalog = catalog
        self._cache = cache
        self._tell_fetched = fetched

    async def read(self, model: str, revision: str, path: str, offset: int) -> AsyncIterator[bytes]:
        """See `RevisionFiles.read`. While a file is fetched nothing of it is yielded but empty pieces."""
        found, file = asked_file(self._catalog, model, revision, path, offset)
        source: Path | None = await in_thread(_here, found, file)
        if source is None and file.sha256 in self._cache.offered:
            fetching = asyncio.ensure_future(self._fetched(found, file))
            try:
                while not (await asyncio.wait({fetching}, timeout=SIGN_OF_LIFE_S))[0]:
                    yield b""
                source = fetching.result()
            finally:
                fetching.cancel()
        async for data in read_file(source or Path(found.local_path) / path, file.size_bytes, offset):
            yield data

    async def _fetched(self, revision: Revision, file: ModelFile) -> Path:
        try:
            with disk_told():
                path = await self._cache.fetch(file.sha256, file.size_bytes)
        except ArtifactInvalid as error:
            raise ArtifactInvalid(f"{file.path}: {error.message}") from None
        except OSError as error:
            raise InternalError(f"{file.path}: the controller cannot keep it.") from error
        await self._tell_fetched(revision)
        return path


def _here(revision: Revision, file: ModelFile) -> Path | None:
    """Where a file is in its revision's directory; None: not there, or not all of it."""
    path = Path(revision.local_path) / file.path
    try:
        return path if path.is_file() and path.stat().st_size == file.size_bytes else None
    except OSError:
        return None
