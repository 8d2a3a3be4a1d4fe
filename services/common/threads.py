"""Work in threads. Owns: that nobody goes on beside a thread whose caller was cancelled.

A thread cannot be stopped. Who is cancelled while one writes a file must not release the file's lock, close
it or remove it before the thread has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in a thread; a cancellation is obeyed when it has returned, and its result is lost."""
    context = contextvars.copy_context()
    call = functools.partial(context.run, function, *args, **kwargs)
    return await to_its_end(asyncio.get_running_loop().run_in_executor(None, call))


async def to_its_end(work: Awaitable[T]) -> T:
    """Waits for `work` to its end, however often the caller is cancelled meanwhile; obeys only then."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not task.cancelled():
            # Looked at, so that nobody is told of an error that was never fetched.
            task.exception()
        raise asyncio.CancelledError
    return task.result()
