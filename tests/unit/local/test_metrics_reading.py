"""What is read of a process's metrics, and that whoever asks is never kept waiting for it."""

from __future__ import annotations

import asyncio

import pytest

from services.common.metrics import expose
from services.local import metrics_reading
from tests.fixtures.proxy import name_a_dead_proxy


async def test_numbers_are_read_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the environment's is for the rest of the world; a process without metrics has no numbers."""
    name_a_dead_proxy(monkeypatch)
    shown = expose("127.0.0.1:0")
    try:
        found = await metrics_reading.read(shown.address)
    finally:
        shown.close()
    assert found is not None
    assert found["process_resident_memory_bytes"] > 0
    assert await metrics_reading.read(shown.address) is None
    assert await metrics_reading.read("") is None


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.0 404 Not Found\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n<html>\xe9"],
)
async def test_what_shows_no_metrics_is_not_known(answer: bytes) -> None:
    """Whatever it says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        assert await metrics_reading.read(f"{host}:{port}") is None


async def test_who_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stands still has open ports."""
    monkeypatch.setattr(metrics_reading, "_TIMEOUT_S", 0.05)
    over = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        assert await asyncio.wait_for(metrics_reading.read(f"{host}:{port}"), 1.5) is None
        over.set()
