"""Work in threads: whoever is cancelled goes on only when the thread has ended."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import pytest

from services.common.threads import (
    NICENESS,
    MayHang,
    begin_in_thread,
    in_haltable_thread,
    in_thread,
    to_its_end,
)


async def test_a_result_and_an_error_come_back() -> None:
    """As if there were no thread."""
    assert await in_thread(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelling_waits_for_the_thread(fails: bool) -> None:  # noqa: FBT001
    """However often it is done, and whether the thread fails or not."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait()
        ended.set()
        if fails:
            raise ValueError

    waiting = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


async def test_whoever_is_cancelled_halts_a_thread_at_its_next_piece() -> None:
    """It ends with the thread, which is none of the pool that a process waits for at its end."""
    begun, may_go_on, pieces = threading.Event(), threading.Event(), list[int]()

    def work(on_read: Callable[[int], None]) -> None:
        assert threading.current_thread().daemon
        begun.set()
        may_go_on.wait()
        for piece in range(10):
            pieces.append(piece)
            on_read(1)

    waiting = asyncio.create_task(in_haltable_thread(work, "test"))
    await asyncio.to_thread(begun.wait)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert pieces == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities belong to processes")
async def test_a_thread_that_can_be_halted_gives_way() -> None:
    """And says what it found."""

    def niceness(on_read: Callable[[int], None]) -> int:
        on_read(1)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await in_haltable_thread(niceness, "test") == NICENESS


async def test_a_thread_that_cannot_begin_has_ended() -> None:
    """Whoever counts threads is told of each once."""
    ended: list[str] = []
    assert await begin_in_thread(lambda: 1, lambda: ended.append("first")) == 1
    await asyncio.get_running_loop().shutdown_default_executor()
    with pytest.raises(RuntimeError):
        await begin_in_thread(lambda: 1, lambda: ended.append("second"))
    assert ended == ["first", "second"]


async def test_a_timeout_is_told_as_one() -> None:
    """It cancels, and comes when the work has ended."""
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await to_its_end(work())
    assert done.is_set()


async def test_a_call_that_may_hang_answers_or_is_left() -> None:
    """Its result, its exception, or the end of patience; one that is left keeps its place until it ends."""
    calls, go_on = MayHang(1), threading.Event()

    def fails() -> None:
        raise KeyError("why")

    assert await calls.call(5, lambda: 7) == 7
    with pytest.raises(KeyError, match="why"):
        await calls.call(5, fails)
    with pytest.raises(TimeoutError):
        await calls.call(0.01, lambda: go_on.wait(10))
    with pytest.raises(TimeoutError):
        await calls.call(0.01, lambda: 7)
    go_on.set()
    assert await calls.call(5, lambda: 8) == 8


HELPERS = """
import asyncio, os, threading, time
import grpc
from services.common.threads import let_helpers_give_way

async def main():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    let_helpers_give_way()
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        channel.get_state(try_to_connect=True)
        await asyncio.sleep(0.1)
    policies = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        policies.setdefault(thread == os.getpid(), set()).add(os.sched_getscheduler(thread))
    print(policies == {True: {os.SCHED_OTHER}, False: {os.SCHED_BATCH}})
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system knows no SCHED_BATCH")
async def test_grpc_and_what_it_begins_later_give_way_to_the_loop() -> None:
    """In a process of its own, for threads keep what they were told."""
    command = (sys.executable, "-c", HELPERS)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    assert told == b"True\n"
