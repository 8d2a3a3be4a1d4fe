"""The line of one worker. Owns: what waits for the wire to it, in its order, and that it travels together.

Must not know: attempts, or who waits for an answer. Many orders come at once, with a reply of the queue's
store or at the end of a step, and a write of them all costs little more than that of one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from interlock.v1 import worker_service_pb2

# A request that joins others is copied, which costs as much as a write of its own where its prompt is long.
TOGETHER_BYTES_MAX = 16 * 1024


@dataclass(slots=True)
class WorkerLine:
    """Requests to a worker that are not on the wire yet.

    Attributes:
        commands_max: How many the worker takes in one message; 0: it has not said that it takes several.
    """

    commands_max: int = 0
    _waiting: deque[worker_service_pb2.SessionRequest] = field(default_factory=deque)
    _has_some: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, request: worker_service_pb2.SessionRequest) -> None:
        """Puts a request behind the others."""
        self._waiting.append(request)
        self._has_some.set()

    def starts(self) -> list[worker_service_pb2.StartJob]:
        """The orders that have never reached the worker."""
        return [request.start for request in self._waiting if request.HasField("start")]

    async def write_to(self, call: Any) -> None:
        """Writes what comes, until the stream ends."""
        while True:
            while self._waiting:
                message, requests = self._next()
                # They stay in the line until they are on the wire: a stream that has ended takes nothing.
                await call.write(message)
                for _ in range(requests):
                    self._waiting.popleft()
            self._has_some.clear()
            await self._has_some.wait()

    def _next(self) -> tuple[worker_service_pb2.SessionRequest, int]:
        """The next message, and how many of those that wait are in it."""
        together: list[worker_service_pb2.SessionRequest] = []
        if len(self._waiting) > 1:
            room = TOGETHER_BYTES_MAX
            for request in islice(self._waiting, self.commands_max):
                room -= request.ByteSize()
                if room < 0:
                    break
                together.append(request)
        if len(together) < 2:
            return self._waiting[0], 1
        commands = worker_service_pb2.Commands(requests=together)
        return worker_service_pb2.SessionRequest(commands=commands), len(together)
