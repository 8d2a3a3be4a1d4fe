"""How contents come in. Owns: the order of chunks, how slowly they may come, and what a cut leaves behind.

What came before a cut stays, and the next attempt goes on with it; what is wrong is thrown away. Must not
know: what contents are for, or how long they are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass

from services.common.clock import Clock
from services.common.errors import ArgumentInvalid, ArtifactInvalid, ClientStalled
from services.common.threads import in_thread
from services.controller.adapters.blobs import Blobs

# The contract's bound of a chunk.
CHUNK_BYTES_MAX = 1 << 20
# A client that sends nothing for so long is gone; what came is kept, and others get their turn.
CHUNK_WAIT_S = 30.0
# One that sends a byte now and then is no better. No line that a model can be sent over is so slow, and what
# TCP needs to recover from a loss is little beside a minute.
PACE_WINDOW_S = 60.0
PACE_BYTES_PER_S = 16 << 10


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of a blob: its digest, where they begin, and what they are."""

    sha256: str
    offset: int
    data: bytes


async def paced(chunks: AsyncIterator[Chunk], clock: Clock) -> AsyncGenerator[Chunk, None]:
    """The same chunks, as long as they come fast enough; only the time that we wait for them counts.

    Raises:
        ClientStalled: Nothing came for too long, or too little.
    """
    waited_s, came_bytes = 0.0, 0
    while True:
        begun_s = clock.monotonic()
        chunk = await _next(chunks)
        if chunk is None:
            return
        waited_s += clock.monotonic() - begun_s
        came_bytes += len(chunk.data)
        if waited_s >= PACE_WINDOW_S:
            if came_bytes < PACE_BYTES_PER_S * waited_s:
                raise ClientStalled(
                    f"{came_bytes} bytes came in {waited_s:.0f} s; at least {PACE_BYTES_PER_S} a second must."
                    " What came before is kept: plan again and go on over a faster connection."
                )
            waited_s, came_bytes = 0.0, 0
        yield chunk


async def take(blobs: Blobs, sizes: Mapping[str, int], chunks: AsyncIterator[Chunk]) -> None:
    """Writes the contents of `sizes`, one after the other, in the order in which they come.

    Raises:
        ArtifactInvalid: Bytes are not what their digest says, or some are missing.
        ArgumentInvalid: A chunk is empty or too long, or not one that is missed.
        UploadConflict: Another controller takes what came over at this moment.
        OSError: They cannot be written.
    """
    waiting = set(sizes)
    writer: _Writer | None = None
    try:
        for sha256 in [sha256 for sha256, size_bytes in sizes.items() if not size_bytes]:
            # Nothing is sent of a file that is empty.
            writer = _Writer(blobs, sha256, 0)
            await in_thread(writer.open)
            await _finish(writer, waiting)
        async for chunk in chunks:
            if not 1 <= len(chunk.data) <= CHUNK_BYTES_MAX:
                raise ArgumentInvalid(f"chunk.data: must have 1 to {CHUNK_BYTES_MAX} bytes.")
            if chunk.sha256 not in waiting:
                raise ArgumentInvalid("chunk.sha256: no file of the manifest misses these bytes.")
            if writer is None or writer.sha256 != chunk.sha256:
                if writer is not None:
                    writer.close()
                writer = _Writer(blobs, chunk.sha256, sizes[chunk.sha256])
                await in_thread(writer.open)
            await in_thread(writer.append, chunk)
            if writer.is_whole:
                await _finish(writer, waiting)
    finally:
        if writer is not None:
            writer.close()
    if waiting:
        raise ArtifactInvalid(f"{len(waiting)} files are not whole yet; plan the upload again and go on.")


class _Writer:
    """One blob on its way. Everything but its making and closing blocks."""

    def __init__(self, blobs: Blobs, sha256: str, size_bytes: int) -> None:
        self.sha256 = sha256
        self._size_bytes = size_bytes
        self._file = blobs.part(sha256, size_bytes)
        self._at = 0

    def open(self) -> None:
        """Finds what an earlier attempt has left."""
        self._at = self._file.open()

    def append(self, chunk: Chunk) -> None:
        """Writes the next bytes."""
        if chunk.offset != self._at:
            raise ArgumentInvalid(
                f"chunk.offset: {chunk.offset}; the controller has {self._at} bytes of it: plan again, go on."
            )
        try:
            self._at = self._file.append(chunk.data)
        except ArtifactInvalid:
            self._file.discard()
            raise

    @property
    def is_whole(self) -> bool:
        """Whether every byte has come."""
        return self._at == self._size_bytes

    def finish(self) -> None:
        """Gives it its name, where it is what its digest says."""
        try:
            self._file.finish()
        except ArtifactInvalid:
            self._file.discard()
            raise

    def close(self) -> None:
        """Leaves what came to the next attempt."""
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


async def _finish(writer: _Writer, waiting: set[str]) -> None:
    try:
        await in_thread(writer.finish)
    finally:
        writer.close()
    waiting.discard(writer.sha256)
