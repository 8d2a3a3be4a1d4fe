"""Signals that ask a process to end. Owns: which of them is the first, and which a second one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Whoever tells a process and its whole group tells it twice within milliseconds.
REPEAT_S = 1.0


def end_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Callable[[int], None]:
    """Returns what hears of each signal: the first one sets `stop`, a second one `hurry`.

    The same signal within a second is the first one again: `timeout` sends it to the command and to the
    command's group, and `make` passes on what the group has heard as well.
    """
    loop = asyncio.get_running_loop()
    first: tuple[int, float] | None = None

    def heard(number: int) -> None:
        nonlocal first
        now_s = loop.time()
        if first is None:
            first = (number, now_s)
            stop.set()
        elif number != first[0] or now_s - first[1] >= REPEAT_S:
            hurry.set()

    return heard
