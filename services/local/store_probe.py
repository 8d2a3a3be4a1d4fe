"""A store that is not ours. Owns: whether anybody listens at its URL, asked before a mesh leans on it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

_Connecting: TypeAlias = Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]

# A store that needs longer for a connection is too slow for a queue.
_CONNECT_TIMEOUT_S = 3.0
_DEFAULT_PORT = 6379
_DEFAULT_SENTINEL_PORT = 26379


async def listens(url: str) -> bool:
    """Whether a connection can be made to a `redis://`, `rediss://`, `unix://`, sentinel or cluster URL."""
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            return await _any_listens(url)
    except TimeoutError:
        return False


async def _any_listens(url: str) -> bool:
    split = urlsplit(url)
    if split.scheme == "unix":
        return await _connects(asyncio.open_unix_connection(unquote(split.path)))
    default = _DEFAULT_SENTINEL_PORT if split.scheme == "redis+sentinel" else _DEFAULT_PORT
    # One sentinel or cluster node that answers knows the others.
    for address in split.netloc.rpartition("@")[2].split(","):
        try:
            place = urlsplit(f"//{address}")
            host, port = place.hostname or "localhost", place.port or default
        except ValueError:
            continue
        if await _connects(asyncio.open_connection(host, port)):
            return True
    return False


async def _connects(connecting: _Connecting) -> bool:
    try:
        _, writer = await connecting
    except OSError:
        return False
    writer.close()
    return True
