"""Files of revisions as they are sent: whoever leaves while a slow disk reads holds nobody up."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path, PosixPath
from typing import Any

import pytest

from services.controller.adapters.local_revisions import read_file

# As long as the disk takes where nobody hurries it: the loop does so at once, if it is free.
DISK_S = 2.0


class SlowFile(io.RawIOBase):
    """A file whose disk answers when it may.

    Attributes:
        begun: Set once somebody reads.
        may_end: Lets the reading end.
        hurried: Whether it was let in time.
        closed_by: The thread that closed the file.
    """

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.hurried = False
        self.closed_by: threading.Thread | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """To wherever."""
        del whence
        return offset

    def readinto(self, buffer: Any) -> int:
        """The end, when it may."""
        del buffer
        self.begun.set()
        self.hurried = self.may_end.wait(DISK_S)
        return 0

    def close(self) -> None:
        """Remembers by whom."""
        if not self.closed:
            self.closed_by = threading.current_thread()
        super().close()


class SlowPath(PosixPath):
    """Where a slow file is."""

    file: SlowFile

    def open(self, *_: Any, **__: Any) -> Any:
        """It, buffered as any other."""
        return io.BufferedReader(self.file)


@pytest.fixture
def path() -> SlowPath:
    """The path of a slow file."""
    made = SlowPath("model.safetensors")
    made.file = SlowFile()
    return made


async def read(path: Path) -> None:
    """A download."""
    async for _ in read_file(path, 1 << 20, 0):
        pass


async def test_a_download_that_is_cut_leaves_the_loop_free(path: SlowPath) -> None:
    """It ends when the disk has answered, and waits for that where nobody else waits with it."""
    reading = asyncio.create_task(read(path))
    await asyncio.to_thread(path.file.begun.wait)
    reading.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not path.file.closed
    path.file.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert path.file.hurried
    # Closing may take long as well: the last one frees what was deleted meanwhile.
    assert path.file.closed
    assert path.file.closed_by not in {None, threading.main_thread()}
