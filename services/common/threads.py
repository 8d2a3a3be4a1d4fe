"""Work in threads. Owns: that nobody goes on beside a thread whose caller was cancelled, and who gives way.

A thread cannot be stopped. Who is cancelled while one writes a file must not release the file's lock, close
it or remove it before the thread has ended. Only what touches nothing of ours may be left behind: a call to
somebody else, who may never answer (`MayHang`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# A tenth of a core beside a thread of ordinary priority that never rests; all of it where there is none.
NICENESS = 10


class Halted(Exception):
    """Work ends in the middle: whoever wanted it was cancelled."""


def give_way() -> None:
    """This thread, and what it begins, comes after others that want the same cores, for good."""
    # Linux counts threads where others count processes, and refuse.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def let_helpers_give_way() -> None:
    """No thread of this process but the main one interrupts another thread, of whichever process, any more.

    gRPC's own threads wake a dozen times a request, for a few microseconds each. Where every core is busy,
    each time somebody is stopped for them: mostly the event loop that they work for. As `SCHED_BATCH` they
    have the same share of the processor and wait for their turn. Call it once they exist; threads that they
    begin later are like them. Where the system has no such thing, nothing changes.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in (int(task.name) for task in Path("/proc/self/task").iterdir()):
        if thread != os.getpid():
            # One that has just ended, or a sandbox without the call.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in a thread; a cancellation is obeyed when it has returned, and its result is lost."""
    context = contextvars.copy_context()
    call = functools.partial(context.run, function, *args, **kwargs)
    return await to_its_end(asyncio.get_running_loop().run_in_executor(None, call))


def begin_in_thread(work: Callable[[], T], on_end: Callable[[], None]) -> Awaitable[T]:
    """Begins `work` in a thread; whoever awaits what is returned hears of a cancellation at once.

    Args:
        work: What is called there; it must touch nothing that its caller changes later.
        on_end: Is called on the loop when the thread is done with it, whether or not anybody still waits.
    """

    def ended(begun: asyncio.Future[T]) -> None:
        if not begun.cancelled():
            # Looked at, so that nobody is told of an error that was never fetched.
            begun.exception()
        on_end()

    context = contextvars.copy_context()
    try:
        begun = asyncio.get_running_loop().run_in_executor(None, context.run, work)
    except BaseException:
        on_end()
        raise
    begun.add_done_callback(ended)
    return asyncio.shield(begun)


async def in_haltable_thread(work: Callable[[Callable[[int], None]], T], name: str) -> T:
    """Calls `work` in a thread of its own, which gives way; a cancellation ends it at its next piece.

    It is obeyed when the thread has ended: who must not wait for a disk that hangs bounds the wait. The
    end of the process does not wait for the thread, as it would for those of asyncio's pool.

    Args:
        work: What is called there. It tells of each piece what it has read of it, in bytes, by what it is
            given: that raises `Halted` when nobody waits any more.
        name: The thread's name.
    """
    halt = threading.Event()

    def on_read(_more_bytes: int) -> None:
        if halt.is_set():
            raise Halted

    def body() -> T:
        give_way()
        return work(on_read)

    return await to_its_end(begin_in_daemon(body, name), halt.set)


async def to_its_end(work: Awaitable[T], on_cancel: Callable[[], object] = lambda: None) -> T:
    """Waits for `work` to its end, however often the caller is cancelled meanwhile; obeys only then.

    Args:
        work: What is waited for.
        on_cancel: Is called at each cancellation, so that the end may come sooner.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
            on_cancel()
    if cancelled:
        if not task.cancelled():
            # Looked at, so that nobody is told of an error that was never fetched.
            task.exception()
        raise asyncio.CancelledError
    return task.result()


def begin_in_daemon(
    work: Callable[[], T], name: str, on_end: Callable[[], None] = lambda: None
) -> asyncio.Future[T]:
    """Begins `work` in a thread of its own, which ends with the process if it has not before.

    Args:
        work: What is called there.
        name: The thread's name.
        on_end: Is called on the loop when the thread is done, whether or not anybody still waits.

    Returns:
        What `work` returns or raises; who cancels it leaves the thread behind.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(found: T | None, error: BaseException | None) -> None:
        on_end()
        if outcome.done():
            return
        if error is None:
            outcome.set_result(found)  # type: ignore[arg-type] # without an error it is what `work` returned
        else:
            outcome.set_exception(error)

    def body() -> None:
        found: T | None = None
        failure: BaseException | None = None
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is awaited
            failure = error
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=body, name=name, daemon=True).start()
    return outcome


class MayHang:
    """Calls that may never return, each in a thread that is left behind when it takes too long.

    A thread that is left behind keeps its place until it ends, so that there are never more than so many, and
    does not keep the process from ending. What is called must touch nothing that its caller changes later.

    Args:
        at_once: Most calls at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def call(self, timeout_s: float, function: Callable[[], T]) -> T:
        """What `function` returns or raises.

        Raises:
            TimeoutError: It took longer, the wait for a place included; it may still have its effect.
        """
        async with asyncio.timeout(timeout_s):
            await self._places.acquire()
            return await begin_in_daemon(function, "may-hang", self._places.release)
