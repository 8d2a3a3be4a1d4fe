"""Calls to Redis that travel together. Owns: which calls share a round trip, and who gets which reply.

While one batch is on its way, calls gather for the next: an idle process sends each call at once and alone, a
busy one sends many in one message. It knows no key and no script.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import hiredis
from redis.asyncio import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

# Redis runs a batch in one go; this many scripts take a few milliseconds, which nobody else notices.
BATCH_CALLS_MAX = 64

Command: TypeAlias = Sequence[str | int | float]


@contextmanager
def resets_told() -> Iterator[None]:
    """Lets the library's callers hear of a connection that the other side has reset.

    Writing to one is an OSError with asyncio's loop, which the library translates, and a bare RuntimeError
    with uvloop's.
    """
    try:
        yield
    except RuntimeError as error:
        raise RedisConnectionError("The connection was reset.") from error


@dataclass(slots=True)
class _Call:
    command: Command
    reply: asyncio.Future[Any]


class RedisBatcher:
    """Sends commands over one connection of a client, as many at once as wait.

    Replies come as Redis gives them: none of the library's conversions is applied.

    Args:
        client: A client of one node; the keys of a batch may lie anywhere in it.
        timeout_s: How long a batch may take.
        call_timeout_s: How long a call may take, with its wait for the batch before it.
    """

    def __init__(self, client: Redis, timeout_s: float, call_timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._call_timeout_s = call_timeout_s
        self._connection: Connection | None = None
        self._socket_timeout_s: float | None = None
        # Bounded by the callers, each of whom waits for its reply and gives up after a while.
        self._waiting: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def call(self, *command: str | float) -> Any:
        """Returns the reply to a command.

        A caller that is cancelled before its command was sent leaves nothing behind.

        Raises:
            RedisError, OSError, TimeoutError: Redis refused the command, could not be reached, or took too
                long.
        """
        if self._is_closed:
            raise RedisConnectionError("The connection was closed.")
        loop = asyncio.get_running_loop()
        call = _Call(command, loop.create_future())
        self._waiting.append(call)
        if self._task is None:
            self._task = loop.create_task(self._send_all(), name="redis-batches")
        # Nothing else is cancelled by it, and it takes a tenth of the time of `asyncio.timeout`.
        lapse = loop.call_later(self._call_timeout_s, _give_up, call.reply)
        try:
            return await call.reply
        finally:
            lapse.cancel()

    async def close(self) -> None:
        """Ends what is on its way; whoever waits, or calls later, hears of a lost connection."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._let_go()

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
            is_kept = self._connection is not None
            try:
                replies = await self._exchange(commands)
            except RedisConnectionError:
                # One that broke while idle is made anew, once. After a timeout nothing is tried again.
                return await self._exchange(commands)
            return await self._sent_elsewhere(commands, replies) if is_kept else replies
        except Exception as error:  # noqa: BLE001 - it is raised again where each call is awaited
            return [error] * len(commands)

    async def _sent_elsewhere(self, commands: Sequence[Command], replies: Sequence[Any]) -> Sequence[Any]:
        """Sends once more, over a new connection, what was refused by a server that takes no writes.

        It is no primary any more, and the address may lead to another one by now.
        """
        refused = [at for at, reply in enumerate(replies) if isinstance(reply, ReadOnlyError)]
        if not refused:
            return replies
        await self._let_go()
        told = list(replies)
        try:
            again = await self._exchange([commands[at] for at in refused])
        except (RedisError, OSError) as error:
            # The others have their answers.
            again = [error] * len(refused)
        for at, reply in zip(refused, again, strict=True):
            told[at] = reply
        return told

    async def _exchange(self, commands: Sequence[Command]) -> Sequence[Any]:
        connection = self._connection or await self._connect()
        try:
            async with asyncio.timeout(self._timeout_s):
                with resets_told():
                    # The library packs in Python, seven times as slowly.
                    await connection.send_packed_command(b"".join(map(_packed, commands)))
                return [await _reply(connection) for _ in commands]
        except TimeoutError as error:
            await self._let_go()
            raise RedisTimeoutError("The commands were not answered in time.") from error
        except BaseException:
            # The replies that were not read would be taken for those of the next batch.
            await self._let_go()
            raise

    async def _connect(self) -> Connection:
        """The connection that the batches use: one of the client's, kept until it breaks."""
        pool = self._client.connection_pool
        with resets_told():
            connection: Connection = await pool.get_connection()  # type: ignore[no-untyped-call, unused-ignore]
        # One time-out holds for a whole batch; the library's own costs a task for each message.
        self._connection, self._socket_timeout_s = connection, connection.socket_timeout
        connection.socket_timeout = None
        return connection

    async def _let_go(self) -> None:
        """Breaks the connection. The pool knows where the next one leads to: perhaps to another primary."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.socket_timeout = self._socket_timeout_s
            await connection.disconnect(nowait=True)
            await self._client.connection_pool.release(connection)


def _give_up(reply: asyncio.Future[Any]) -> None:
    if not reply.done():
        reply.set_exception(RedisTimeoutError("The command was not answered in time."))


def _packed(command: Command) -> bytes:
    packed: bytes = hiredis.pack_command(tuple(command))  # type: ignore[arg-type]
    return packed


async def _reply(connection: Connection) -> Any:
    """The next reply; what Redis refuses stands in its place."""
    try:
        return await connection.read_response(timeout=math.inf)
    except ResponseError as error:
        return error


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
