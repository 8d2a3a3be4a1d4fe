"""A fetch that is cancelled: what its threads do then. They end before it does."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from pathlib import Path

import pytest

from services.common.partial_file import PartialFile
from tests.unit.common.test_artifacts import FakeSource, fetched, write


async def test_a_fetch_that_is_cancelled_leaves_no_thread_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends when the write has ended, so that the next one finds a file that nobody else writes to."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    append = PartialFile.append

    def slow(file: PartialFile, chunk: bytes) -> int:
        begun.set()
        may_end.wait()
        size = append(file, chunk)
        ended.set()
        return size

    monkeypatch.setattr(PartialFile, "append", slow)
    fetching = asyncio.create_task(fetched(FakeSource(), tmp_path))
    await asyncio.to_thread(begun.wait)
    fetching.cancel()
    await asyncio.sleep(0)
    assert not fetching.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert ended.is_set()


class Gated(io.FileIO):
    """A file whose first piece is read when a test lets it; it counts the pieces."""

    begun, may_go_on, pieces = threading.Event(), threading.Event(), 0

    def read(self, size: int | None = -1) -> bytes:
        """One piece, of a hundred bytes at most."""
        assert size
        Gated.begun.set()
        Gated.may_go_on.wait(10)
        Gated.pieces += 1
        return super().read(100)


@pytest.mark.parametrize("what", ["a local file", "a part"])
async def test_a_fetch_that_is_cancelled_ends_what_it_reads_for_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """At its next piece, so that nothing is read on beside the next fetch, nor holds up the process's end."""
    local = write(tmp_path / "local") if what == "a local file" else tmp_path
    (tmp_path / ".config.json.partial").write_bytes(b"{}")
    Gated.begun, Gated.may_go_on, Gated.pieces = threading.Event(), threading.Event(), 0
    monkeypatch.setattr(Path, "open", lambda path, _mode: Gated(path))
    monkeypatch.setattr(os, "fdopen", lambda descriptor, _mode: Gated(descriptor, "r+b"))
    fetching = asyncio.create_task(fetched(FakeSource(), tmp_path, local_path=str(local)))
    assert await asyncio.to_thread(Gated.begun.wait, 10)
    fetching.cancel()
    await asyncio.sleep(0)
    is_done = fetching.done()
    Gated.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert not is_done
    assert Gated.pieces == 1
