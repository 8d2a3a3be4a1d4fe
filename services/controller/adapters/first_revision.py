"""The revision that a mesh is started with. Owns: that its files are read aside, and how far that is told.

A model of any size may lie on a disk of any speed. Who waits for it is told; who gives up leaves a thread
behind that writes nothing and ends with the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools

from services.common import logs
from services.common.clock import Clock
from services.common.threads import begin_in_daemon
from services.controller.adapters.local_revisions import read_revision
from services.controller.config import ControllerConfig
from services.controller.core.catalog import Revision

# Often enough for who waits, seldom enough for a log.
TELL_S = 10.0


class FirstRevision:
    """The model's directory as a revision, once it is read.

    Args:
        settings: Where the model lies, and how it is served.
        clock: The time.
    """

    def __init__(self, settings: ControllerConfig, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._revision: Revision | None = None
        # The thread writes, and the loop reads.
        self._read_bytes = self._size_bytes = 0

    @property
    def revision(self) -> Revision:
        """What was read; ask for it after `read`."""
        assert self._revision is not None
        return self._revision

    async def read(self) -> None:
        """Reads every byte of the model's files. A cancellation is obeyed at once.

        Raises:
            ArtifactInvalid: The directory cannot be served.
        """
        began_s = self._clock.monotonic()
        # In a copy of our context: what the thread logs bears the process's name, too.
        work = functools.partial(contextvars.copy_context().run, self._read_revision)
        reading = begin_in_daemon(work, "first-revision")
        try:
            while not (await asyncio.wait({reading}, timeout=TELL_S))[0]:
                logs.get_logger().info(
                    "hashing.advanced",
                    read_bytes=self._read_bytes,
                    size_bytes=self._size_bytes,
                    took_s=round(self._clock.monotonic() - began_s, 1),
                )
            self._revision = reading.result()
        finally:
            # Nobody hears any more what becomes of it.
            reading.cancel()
        manifest = self._revision.manifest
        logs.get_logger().info(
            "revision.registered",
            model=manifest.model,
            revision=manifest.revision,
            files=len(manifest.files),
            size_bytes=self._size_bytes,
            took_s=round(self._clock.monotonic() - began_s, 1),
        )

    def _read_revision(self) -> Revision:
        settings = self._settings
        return read_revision(
            settings.model_path,
            model=settings.model_name,
            quantization=settings.quantization,
            compute_dtype=settings.compute_dtype,
            context_tokens=settings.context_tokens,
            now_s=self._clock.now(),
            on_progress=self._on_progress,
        )

    def _on_progress(self, read_bytes: int, size_bytes: int) -> None:
        if read_bytes == 0:
            logs.get_logger().info("hashing.started", size_bytes=size_bytes)
        self._read_bytes, self._size_bytes = read_bytes, size_bytes
