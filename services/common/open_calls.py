"""Calls under way. Owns: how many there are, and the wait for the last of them."""

from __future__ import annotations

import asyncio
import contextlib


class OpenCalls:
    """Counts calls; their handlers run inside it, each entering it once.

    The handler of a stream has ended when its last message is written: also what is large, or read slowly.
    """

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def wait_none(self, timeout_s: float) -> None:
        """Returns once no call is under way, and when that takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()
