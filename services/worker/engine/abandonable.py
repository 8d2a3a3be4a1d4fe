"""Blocking work that may be abandoned. Owns: threads that hold up neither a process's end nor its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from services.common.threads import begin_in_daemon, give_way

T = TypeVar("T")


async def in_thread(work: Callable[[], T], name: str) -> T:
    """Runs blocking work in a thread of its own, which ends with the process if it has not before.

    The pool that asyncio keeps is waited for at the end of the process, however long its work takes. The
    thread, and what a library starts for it, gives way to others that want the same cores: running streams
    come before a model that is being prepared.
    """

    def body() -> T:
        give_way()
        return work()

    return await begin_in_daemon(body, name)
