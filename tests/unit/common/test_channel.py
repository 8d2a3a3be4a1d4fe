"""Connections to a peer that was there and does not answer any more, as a stopped process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from interlock.v1 import worker_service_pb2_grpc

from services.common import channel

# All that a server must say for a connection: an empty frame of settings.
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """Where somebody takes connections, reads, and answers nothing."""
    connections: set[asyncio.Task[None] | None] = set()

    async def read_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        writer.write(SETTINGS)
        with suppress(ConnectionError):
            while await reader.read(65_536):
                pass
        writer.close()

    listening = await asyncio.start_server(read_on, "127.0.0.1", 0)
    yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()
    await asyncio.gather(*(task for task in connections if task is not None))


@pytest.mark.parametrize("light", [True, False])
async def test_a_peer_that_does_not_answer_is_given_up_where_nothing_large_passes(
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    light: bool,  # noqa: FBT001 - parametrized
) -> None:
    """Elsewhere its answer may stand behind a file: it is given a minute."""
    assert dict(channel.OPTIONS)["grpc.keepalive_time_ms"] + channel.LIGHT[0][1] == 15_000
    quick = [(name, 200 if name == "grpc.keepalive_time_ms" else value) for name, value in channel.OPTIONS]
    monkeypatch.setattr(channel, "OPTIONS", tuple(quick))
    monkeypatch.setattr(channel, "LIGHT", ((channel.LIGHT[0][0], 200),))
    async with channel.connect(address, light=light) as connection:
        call: Any = worker_service_pb2_grpc.WorkerServiceStub(connection).Session()
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait({reading}, timeout=10 if light else 1)
        assert reading.done() is light
        if light:
            with pytest.raises(grpc.aio.AioRpcError):
                await reading
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
