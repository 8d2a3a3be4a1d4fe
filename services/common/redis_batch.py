"""Calls to Redis that travel together. Owns: which calls share a round trip, and who gets which reply.

While one batch is on its way, calls gather for the next: an idle process sends each call at once and alone, a
busy one sends many in one message. It knows no key and no script.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

# Redis runs a batch in one go; this many scripts take a few milliseconds, which nobody else notices.
BATCH_CALLS_MAX = 64

Command: TypeAlias = Sequence[str | int | float]


@dataclass(slots=True)
class _Call:
    command: Command
    reply: asyncio.Future[Any]


class RedisBatcher:
    """Sends commands over one connection of a client, as many at once as wait.

    Args:
        client: A client of one node; the keys of a batch may lie anywhere in it.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client
        # Bounded by the callers, each of whom waits for its reply and gives up after its own time-out.
        self._waiting: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None

    async def call(self, *command: str | float) -> Any:
        """Returns the reply to a command.

        A caller that is cancelled before its command was sent leaves nothing behind.

        Raises:
            RedisError, OSError, TimeoutError: Redis refused the command, or could not be reached.
        """
        loop = asyncio.get_running_loop()
        call = _Call(command, loop.create_future())
        self._waiting.append(call)
        if self._task is None:
            self._task = loop.create_task(self._send_all(), name="redis-batches")
        return await call.reply

    async def close(self) -> None:
        """Ends what is on its way; whoever waits hears of a lost connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _send_all(self) -> None:
        batch: list[_Call] = []
        try:
            while batch := self._next_batch():
                _answer(batch, await self._send([call.command for call in batch]))
        finally:
            # Nobody waits for ever, whatever ended this task.
            left = [*batch, *self._waiting]
            self._waiting.clear()
            _answer(left, [RedisConnectionError("The connection was closed.")] * len(left))
            self._task = None

    def _next_batch(self) -> list[_Call]:
        batch: list[_Call] = []
        while self._waiting and len(batch) < BATCH_CALLS_MAX:
            call = self._waiting.popleft()
            if not call.reply.done():
                batch.append(call)
        return batch

    async def _send(self, commands: Sequence[Command]) -> Sequence[Any]:
        """One reply for each command, or the exception that stands in its place."""
        try:
            if len(commands) == 1:
                reply = await self._client.execute_command(*commands[0])  # type: ignore[no-untyped-call, unused-ignore]
                return [reply]
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001 - it is raised again where each call is awaited
            return [error] * len(commands)


def _answer(batch: Sequence[_Call], replies: Sequence[Any]) -> None:
    for call, reply in zip(batch, replies, strict=True):
        if call.reply.done():
            continue
        if isinstance(reply, Exception):
            call.reply.set_exception(reply)
            # A caller that is cancelled at this moment will not ask; that is no defect to warn of.
            call.reply.exception()
        else:
            call.reply.set_result(reply)
