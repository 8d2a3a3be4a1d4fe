"""A client of `/v1/generate` over plain HTTP/1.1. Owns: as much of HTTP as a stream of events needs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from bench.load_callers import fate_of
from bench.load_plan import Ask
from bench.load_trace import Fate, Trace

_FATES = {429: Fate.REFUSED, 503: Fate.REFUSED, 504: Fate.MISSED}
_STATUS_OF_CODE = {"RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}
# The longest line that a stream reader holds; an event is far shorter.
_LINE_BYTES_MAX = 1 << 20


class HttpCaller:
    """Asks by server-sent events, with a connection a request.

    Args:
        address: `host:port` of the mesh's proxy.
        tokens: Bearer tokens by tenant.
    """

    def __init__(self, address: str, tokens: dict[str, str]) -> None:
        self._address = address
        self._tokens = tokens

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        host, _, port = self._address.rpartition(":")
        try:
            reader, writer = await asyncio.open_connection(host, int(port), limit=_LINE_BYTES_MAX)
        except OSError:
            trace.end(time.monotonic(), Fate.FAILED)
            return
        try:
            writer.write(self._request(ask))
            await self._read(reader, trace)
        except (OSError, EOFError, ValueError):
            trace.end(time.monotonic(), Fate.FAILED)
        finally:
            writer.close()

    def _request(self, ask: Ask) -> bytes:
        body = json.dumps(
            {
                "tokens": ask.prompt_ids,
                "max_tokens": ask.answer_tokens,
                "priority": ask.tenant.priority,
                "stream": True,
            }
        )
        lines = [
            "POST /v1/generate HTTP/1.1",
            f"host: {self._address}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"authorization: Bearer {self._tokens[ask.tenant.name]}",
        ]
        if ask.deadline_s is not None:
            lines.append(f"x-interlock-deadline: {ask.deadline_s:g}")
        return "\r\n".join([*lines, "", body]).encode()

    async def _read(self, reader: asyncio.StreamReader, trace: Trace) -> None:
        status, headers = await read_head(reader)
        if status != 200:
            fate = _FATES.get(status, Fate.FAILED)
            # The connection closes after the reply, so the whole of it is what is left.
            trace.end(time.monotonic(), fate, _seconds(headers.get("retry-after")))
            return
        async for event in read_events(reader, chunked="chunked" in headers.get("transfer-encoding", "")):
            note(event, trace)
        if trace.ended_s is None:
            trace.end(time.monotonic(), Fate.FAILED)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers of a reply, names in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    pairs = (line.partition(":") for line in lines[1:] if line)
    return status, {name.lower(): value.strip() for name, _, value in pairs}


async def read_events(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[dict[str, Any]]:
    """The data of each server-sent event; one message of the gateway may hold several, or a part of one."""
    rest = b""
    async for piece in _pieces(reader) if chunked else reader:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def note(event: dict[str, Any], trace: Trace) -> None:
    """Notes one event; `error` and `finished` end the trace."""
    now_s = time.monotonic()
    match event:
        case {"queued": {"estimated_wait_s": float() | int() as wait_s}}:
            trace.wait_told(now_s, wait_s)
        case {"started": _}:
            trace.started_s = trace.started_s or now_s
        case {"chunk": {"token_ids": [_, *_] as ids}}:
            trace.arrivals.append((now_s, len(ids)))
        case {"finished": _}:
            trace.end(now_s, Fate.FINISHED)
        case {"error": error}:
            fate = _FATES.get(_STATUS_OF_CODE.get(error["code"], 500), Fate.FAILED)
            delay_ms = error.get("retry_after_ms")
            trace.end(now_s, fate_of(fate, trace), None if delay_ms is None else delay_ms / 1_000)


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None
