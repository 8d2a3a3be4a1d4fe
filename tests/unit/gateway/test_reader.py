"""When a client that does not read counts as stalled."""

from __future__ import annotations

import asyncio
import time

from services.common.clock import Clock
from services.common.errors import ClientStalled
from services.common.standstill import OWN_PAUSE_S
from services.common.system_clock import SystemClock
from services.gateway.dispatcher.reader import ReaderWatch
from tests.fakes.turned_clock import TurnedClock

STALL_S = 0.1


def watch(clock: Clock | None = None) -> tuple[ReaderWatch, list[ClientStalled]]:
    """A watch, and what it has found."""
    found: list[ClientStalled] = []
    return ReaderWatch(clock or SystemClock(), STALL_S, found.append), found


async def test_who_stays_away_is_stalled_once() -> None:
    """And is told so whenever it comes back."""
    reading, found = watch()
    reading.left()
    await asyncio.sleep(3 * STALL_S)
    reading.left()
    await asyncio.sleep(3 * STALL_S)
    assert found == [reading.stalled]


async def test_who_takes_a_part_is_there() -> None:
    """Of an event that is written in several."""
    clock = TurnedClock()
    reading, found = watch(clock)
    reading.left()
    for _ in range(4):
        clock.turn(0.6 * STALL_S)
        reading.took()
    await asyncio.sleep(2 * STALL_S)
    assert not found
    reading.returned()
    reading.took()
    clock.turn(2 * STALL_S)
    await asyncio.sleep(2 * STALL_S)
    assert not found
    reading.close()


async def test_a_process_that_stood_still_blames_nobody() -> None:
    """The end of a write, which came meanwhile, reaches its handler only after the timer."""
    reading, found = watch()
    reading.left()
    loop = asyncio.get_running_loop()
    time.sleep(STALL_S + OWN_PAUSE_S + 0.1)  # noqa: ASYNC251 - it is the loop that stands still
    loop.call_soon(loop.call_soon, loop.call_soon, reading.returned)
    await asyncio.sleep(OWN_PAUSE_S + 2 * STALL_S)
    assert not found
    reading.close()
