"""A Redis that says what a test wants of it, and resets its connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import hiredis

READ_ONLY = b"-READONLY You can't write against a read only replica.\r\n"
_OTHER_REPLIES = {b"PING": b"+PONG\r\n", b"GET": b"$1\r\na\r\n"}


@dataclass
class ResettingRedis:
    """What it knows.

    Attributes:
        port: Where it listens.
        connections: Those that were ever made to it.
        scripts: The first key of each script that it ran.
        refuses: Whether it resets each connection as soon as it is made.
        is_replica: Whether it takes no writes.
        leads_elsewhere: Whether new connections reach a primary although it is a replica, as behind an
            address that moved.
    """

    port: int = 0
    connections: list[asyncio.StreamWriter] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    refuses: bool = False
    is_replica: bool = False
    leads_elsewhere: bool = False

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0?protocol=2"

    def reset(self) -> None:
        """Breaks every connection at once, as a firewall or a killed process does."""
        for writer in self.connections:
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one connection."""
        is_new = self.is_replica and self.leads_elsewhere
        self.connections.append(writer)
        if self.refuses:
            self.reset()
        parser = hiredis.Reader()
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                parser.feed(data)
                while isinstance(command := parser.gets(), list):
                    writer.write(self._reply(command, takes_writes=is_new or not self.is_replica))
        writer.close()

    def _reply(self, command: list[bytes], *, takes_writes: bool) -> bytes:
        if command[0] != b"EVALSHA":
            return _OTHER_REPLIES.get(command[0], b"+OK\r\n")
        if not takes_writes:
            return READ_ONLY
        self.scripts.append(command[3].decode())
        return b":1\r\n"


@contextlib.asynccontextmanager
async def resetting_redis() -> AsyncIterator[ResettingRedis]:
    """One on a free port."""
    redis = ResettingRedis()
    serving = await asyncio.start_server(redis.serve, "127.0.0.1", 0)
    redis.port = serving.sockets[0].getsockname()[1]
    try:
        yield redis
    finally:
        serving.close()
        for writer in redis.connections:
            writer.close()
        # Their handlers end with them.
        await asyncio.sleep(0.01)
