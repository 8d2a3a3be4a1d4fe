"""Blocking work in a thread of its own: what it gives way to, and that its end is told."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from services.common.threads import NICENESS
from services.worker.engine.abandonable import in_thread


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities belong to processes")
async def test_it_gives_way_to_steps() -> None:
    """The thread and those that it starts are of low priority; the caller and its next threads are not."""

    def both() -> tuple[int, int]:
        found: list[int] = []
        library = threading.Thread(target=lambda: found.append(_niceness()))
        library.start()
        library.join()
        return _niceness(), found[0]

    before = _niceness()
    assert await in_thread(both, "test") == (NICENESS, NICENESS)
    assert _niceness() == before


async def test_its_error_is_raised_where_it_is_awaited() -> None:
    """Also one that is no Exception."""

    def broken() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await in_thread(broken, "test")
