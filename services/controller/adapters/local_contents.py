"""Contents that registered revisions have. Owns: that they are copied and checked, and need not be sent.

The directory that the mesh was started with is the operator's, who may write into it at any time. What an
upload takes from there is therefore a copy with the right digest, never a link. Must not know: manifests
that are on their way.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path

from services.common.errors import ArtifactInvalid
from services.common.threads import in_thread
from services.controller.adapters.blob_intake import CHUNK_BYTES_MAX, Chunk, take
from services.controller.adapters.blobs import Blobs
from services.controller.core.catalog import Revision


class LocalContents:
    """The files of revisions' directories, by digest.

    Args:
        blobs: Where copies go.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        # At most one entry for each file of a registered revision: what is here is not looked at again.
        self._changed: set[tuple[Path, str]] = set()

    def find(self, revisions: Iterable[Revision], sizes: Mapping[str, int]) -> dict[str, Path]:
        """Which of the contents of `sizes` these revisions have, and where; blocks a little."""
        found: dict[str, Path] = {}
        for revision in revisions:
            for file in revision.manifest.files:
                if self._blobs.was_damaged(file.sha256):
                    continue
                if sizes.get(file.sha256) == file.size_bytes and file.sha256 not in found:
                    path = Path(revision.local_path) / file.path
                    if (path, file.sha256) not in self._changed and _has_size(path, file.size_bytes):
                        found[file.sha256] = path
        return found

    async def copy(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Makes a blob of a file.

        Raises:
            ArtifactInvalid: It has changed since it was registered; from now on it counts as missing.
            OSError: The copy cannot be written.
        """
        # What a client has sent of it is right or wrong; a whole copy is right.
        await in_thread(self._blobs.discard, sha256)
        try:
            async with contextlib.aclosing(_read(sha256, path, size_bytes)) as chunks:
                await take(self._blobs, {sha256: size_bytes}, chunks)
        except BaseException as error:
            # A part of what changed is wrong, and one of what did not is quickly copied once more.
            await in_thread(self._blobs.discard, sha256)
            if not isinstance(error, ArtifactInvalid | _Unreadable):
                raise
            self._changed.add((path, sha256))
            raise ArtifactInvalid(
                f"{path.name}: the controller's own file is not what it was when the mesh started;"
                " plan the upload again, and send it."
            ) from None


class _Unreadable(Exception):
    """The file cannot be read any more."""


async def _read(sha256: str, path: Path, size_bytes: int) -> AsyncGenerator[Chunk, None]:
    try:
        stream = await in_thread(path.open, "rb")
    except OSError:
        raise _Unreadable from None
    offset = 0
    with stream:
        while offset < size_bytes:
            try:
                data = await in_thread(stream.read, min(CHUNK_BYTES_MAX, size_bytes - offset))
            except OSError:
                raise _Unreadable from None
            if not data:
                return
            yield Chunk(sha256, offset, data)
            offset += len(data)


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size_bytes
    except OSError:
        return False
