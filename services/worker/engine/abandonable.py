"""Blocking work that may be abandoned. Owns: threads that hold up neither a process's end nor its steps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# A tenth of a core beside a thread of ordinary priority that never rests; all of it where there is none.
NICENESS = 10


async def in_thread(work: Callable[[], T], name: str) -> T:
    """Runs blocking work in a thread of its own, which ends with the process if it has not before.

    The pool that asyncio keeps is waited for at the end of the process, however long its work takes. The
    thread, and what a library starts for it, gives way to others that want the same cores: running streams
    come before a model that is being prepared.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(found: T | None, error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is None:
            outcome.set_result(found)  # type: ignore[arg-type] # without an error it is what `work` returned
        else:
            outcome.set_exception(error)

    def body() -> None:
        found: T | None = None
        failure: BaseException | None = None
        # Linux counts threads where others count processes, and refuse.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is awaited
            failure = error
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=body, name=name, daemon=True).start()
    return await outcome
