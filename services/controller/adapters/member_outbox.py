"""The way to one member. Owns: the commands that wait for its stream, and how the stream ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from services.common.errors import Draining, InterlockError
from services.controller.core.commands import Command, SendLease

# A handshake is five commands; a member that is this many behind does not read.
COMMANDS_WAITING_MAX = 64


class MemberOutbox:
    """`MemberStream` as a bounded queue; whoever serves the stream iterates over it."""

    def __init__(self) -> None:
        self._waiting: deque[Command] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._error: InterlockError | None = None

    def send(self, command: Command) -> None:
        """See `MemberStream.send`; a member that does not read loses its stream.

        A renewal takes the place of one that waits last: the newer one says it all. After the end nothing
        is taken in, for a member that never reads keeps the end itself waiting.
        """
        if self._ended:
            return
        if self._waiting and isinstance(command, SendLease) and isinstance(self._waiting[-1], SendLease):
            self._waiting.pop()
        if len(self._waiting) >= COMMANDS_WAITING_MAX:
            self.end("The member does not read.")
            return
        self._waiting.append(command)
        self._wake.set()

    def end(self, reason: str) -> None:
        """See `MemberStream.end`."""
        self.fail(Draining(reason))

    def fail(self, error: InterlockError | None) -> None:
        """Ends the stream after the commands before; with `error`, or in peace. The first end counts."""
        if not self._ended:
            self._ended, self._error = True, error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Command]:
        """Yields the commands as they come, then ends or raises as it was told to."""
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            if self._ended:
                break
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error
