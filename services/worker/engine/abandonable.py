"""Blocking work that may be abandoned. Owns: threads that hold up neither a process's end nor its steps."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from services.common.threads import begin_in_daemon

T = TypeVar("T")

# A tenth of a core beside a thread of ordinary priority that never rests; all of it where there is none.
NICENESS = 10


async def in_thread(work: Callable[[], T], name: str) -> T:
    """Runs blocking work in a thread of its own, which ends with the process if it has not before.

    The pool that asyncio keeps is waited for at the end of the process, however long its work takes. The
    thread, and what a library starts for it, gives way to others that want the same cores: running streams
    come before a model that is being prepared.
    """

    def body() -> T:
        # Linux counts threads where others count processes, and refuse.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        return work()

    return await begin_in_daemon(body, name)
