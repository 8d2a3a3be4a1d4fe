"""What a child says. Owns: the pipe between a process and its log file.

The pipe is not asyncio's own, whose `wait()` lasts until every holder of it is gone: a process that ended
shall count as ended though one that it started still holds its output.
"""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Self

from services.local.log_file import LogFile

_CHUNK_BYTES = 65_536


class OutputPipe:
    """A pipe whose other end a child writes to; used as a context, inside a running event loop.

    Args:
        log: Where everything goes.
    """

    def __init__(self, log: LogFile) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes what is left without waiting for more."""
        self._drain()
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)

    def handed_over(self) -> None:
        """Closes our copy of the child's end, once the child has its own."""
        os.close(self.write_fd)

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self._read_fd, _CHUNK_BYTES)
            except BlockingIOError:
                return
            if not data:
                # Its end; a reader that stays would be called again and again.
                self._loop.remove_reader(self._read_fd)
                return
            self._log.write(data)
