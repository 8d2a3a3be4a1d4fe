"""Contents by their digest. Owns: each content once, whole or on its way, and how much of them there is.

    SHA256              a whole content; revisions' directories hold links to it
    .SHA256.partial     one on its way, which the next attempt goes on with

Must not know: what contents belong together. Everything but `take` blocks; callers use a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.clock import Clock
from services.common.errors import ArgumentInvalid, ArtifactInvalid, ClientStalled, QuotaExceeded
from services.common.partial_file import PartialFile

# The contract's bound of a chunk.
CHUNK_BYTES_MAX = 1 << 20
# A client that sends nothing for so long is gone; what came is kept, and others get their turn.
CHUNK_WAIT_S = 30.0
# A content that nothing names may belong to an upload that goes on tomorrow; after a day it does not.
ORPHAN_KEPT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of a blob: its digest, where they begin, and what they are."""

    sha256: str
    offset: int
    data: bytes


class Blobs:
    """The contents in one directory.

    Args:
        directory: Where they are; made when the first one comes.
        clock: The time.
        bytes_max: Most bytes of all of them.
    """

    def __init__(self, directory: Path, clock: Clock, *, bytes_max: int) -> None:
        self._directory = directory
        self._clock = clock
        self._bytes_max = bytes_max

    def whole(self, sha256: str, size_bytes: int) -> Path | None:
        """Where a content is; None where it is not, or not all of it."""
        path = self._directory / sha256
        with contextlib.suppress(OSError):
            if path.stat().st_size == size_bytes:
                return path
        return None

    def received_bytes(self, sha256: str, size_bytes: int) -> int:
        """How much of a content is here that is still on its way; more than there can be counts as none."""
        size = _size_of(self._partial(sha256))
        return size if size <= size_bytes else 0

    async def take(self, sizes: Mapping[str, int], chunks: AsyncIterator[Chunk]) -> None:
        """Writes the contents of `sizes`, one after the other, in the order in which they come.

        Raises:
            ArtifactInvalid: Bytes are not what their digest says, or some are missing.
            ArgumentInvalid: A chunk is too long, or not one that is missed.
            QuotaExceeded: There is no room for them.
            ClientStalled: Nothing came for too long.
        """
        await asyncio.to_thread(self._make_room, sizes)
        waiting = set(sizes)
        for sha256 in [sha256 for sha256, size in sizes.items() if not size]:
            # Nothing is sent of a file that is empty.
            await _finish(await asyncio.to_thread(_Writer, self._directory / sha256, 0), waiting)
        writer: _Writer | None = None
        try:
            while (chunk := await _next(chunks)) is not None:
                if len(chunk.data) > CHUNK_BYTES_MAX:
                    raise ArgumentInvalid(f"chunk.data: at most {CHUNK_BYTES_MAX} bytes.")
                if writer is None or writer.sha256 != chunk.sha256:
                    await _finish(writer, waiting)
                    if chunk.sha256 not in waiting:
                        raise ArgumentInvalid("chunk.sha256: no file of the manifest misses these bytes.")
                    path = self._directory / chunk.sha256
                    writer = await asyncio.to_thread(_Writer, path, sizes[chunk.sha256])
                await asyncio.to_thread(writer.append, chunk)
            await _finish(writer, waiting)
        finally:
            if writer is not None:
                writer.close()
        if waiting:
            raise ArtifactInvalid(f"{len(waiting)} files are not whole yet; plan the upload again and go on.")

    def collect(self, named: Iterable[str]) -> None:
        """Removes what is neither named nor linked from anywhere, once it is old; whole or on its way."""
        kept = set(named)
        for blob in self._all():
            with contextlib.suppress(OSError):
                known = blob.stat()
                old = known.st_mtime + ORPHAN_KEPT_S <= self._clock.now()
                if old and blob.name not in kept and known.st_nlink == 1:
                    blob.unlink()

    def drop(self, digests: Iterable[str]) -> None:
        """Removes whole contents, however young; what is linked from anywhere stays."""
        for sha256 in digests:
            with contextlib.suppress(OSError):
                if (self._directory / sha256).stat().st_nlink == 1:
                    (self._directory / sha256).unlink()

    def _make_room(self, sizes: Mapping[str, int]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        held = sum(map(_size_of, self._all()))
        # What is on its way is among them, and will be what `sizes` says.
        held -= sum(_size_of(self._partial(sha256)) for sha256 in sizes)
        if held + sum(sizes.values()) > self._bytes_max:
            raise QuotaExceeded("The controller keeps as many bytes as it may; delete a revision first.")

    def _all(self) -> list[Path]:
        return list(self._directory.iterdir()) if self._directory.is_dir() else []

    def _partial(self, sha256: str) -> Path:
        return self._directory / f".{sha256}.partial"


class _Writer:
    """One blob on its way."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.sha256 = path.name
        self._size_bytes = size_bytes
        self._file = PartialFile(path, size_bytes, path.name)
        self._at = self._file.open()

    def append(self, chunk: Chunk) -> None:
        if chunk.offset != self._at:
            raise ArgumentInvalid(f"chunk.offset: {chunk.offset}; the controller has {self._at} bytes of it.")
        try:
            self._at = self._file.append(chunk.data)
        except ArtifactInvalid:
            self._file.discard()
            raise

    @property
    def is_whole(self) -> bool:
        return self._at == self._size_bytes

    def finish(self) -> None:
        try:
            self._file.finish()
        except ArtifactInvalid:
            self._file.discard()
            raise
        finally:
            self._file.close()

    def close(self) -> None:
        self._file.close()


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    """The next chunk; None at the end."""
    try:
        async with asyncio.timeout(CHUNK_WAIT_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise ClientStalled(
            f"Nothing came for {CHUNK_WAIT_S:.0f} s; what came before is kept: plan again and go on."
        ) from None


async def _finish(writer: _Writer | None, waiting: set[str]) -> None:
    """Gives a blob its name, where all of it has come; else what came is kept for the next attempt."""
    if writer is None:
        return
    if not writer.is_whole:
        writer.close()
        return
    await asyncio.to_thread(writer.finish)
    waiting.discard(writer.sha256)


def _size_of(path: Path) -> int:
    """0 for what is not there, or not any more."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
