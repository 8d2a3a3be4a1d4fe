"""The connection to Redis. Owns: which URLs it understands, how a script is run, and what a call may take.

Gateway and controller alone use it. It knows no key and no script.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from services.common.config import ConfigInvalid
from services.common.errors import StoreUnavailable
from services.common.redis_batch import RedisBatcher, resets_told
from services.common.redis_url import REDIS_URL_FORMS

Client: TypeAlias = Redis | RedisCluster

# Redis answers within a millisecond or two; after a second it is gone, and callers must learn that.
SOCKET_TIMEOUT_S = 1.0
# A command with its one repetition on a fresh connection, and its wait for a connection, ends within this; a
# script that Redis does not know takes two.
CALL_TIMEOUT_S = 2.0
# Redis runs one call after another anyway; more connections only lengthen the line inside it.
CALLS_AT_ONCE_MAX = 32
# Finds a connection that a firewall has forgotten.
HEALTH_CHECK_INTERVAL_S = 10
RETRY_AFTER_S = 1.0

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its text, and the digest by which Redis remembers it."""

    text: str
    sha1: str


def read_script(*files: Path) -> Script:
    """Reads a script from one or more files, in their order: shared parts come before the operation.

    Each part becomes a function within the one before it: Lua makes the functions of a script anew with each
    call, and looks for each variable of one among all variables of the function around it, but finds at
    once what is farther out. A part and those behind it may use 60 names of those before it.
    """
    parts = [file.read_text(encoding="utf-8") for file in files]
    text = "\nreturn (function()\n".join(parts) + "\nend)()" * (len(parts) - 1)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisStore:
    """A connection to Redis in any of its forms. Build it with `connect`; close it when done."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE_MAX)
        self._is_closed = False
        # A cluster's client finds the node of each call by itself.
        self._batcher = (
            RedisBatcher(client, SOCKET_TIMEOUT_S, CALL_TIMEOUT_S) if isinstance(client, Redis) else None
        )

    async def run_script(self, script: Script, keys: Sequence[str], args: Iterable[str | int | float]) -> Any:
        """Runs a script and returns its reply, with text for bytes.

        Scripts must be safe to repeat: a call whose connection broke is sent once more.

        Raises:
            StoreUnavailable: Redis cannot be reached, did not answer in time, or refused.
        """
        return await self._told(self._evaluate(script, [*keys, *args], len(keys)))

    async def fetch(self, *command: str) -> Any:
        """Runs a command that only reads, and returns its reply. Raises StoreUnavailable as `run_script`."""
        return await self._told(self._execute_alone(*command))

    async def open_pubsub(self) -> PubSub:
        """Returns a subscription on a connection of its own; the caller closes it.

        Raises:
            RedisError, OSError, TimeoutError: Redis cannot be reached.
        """
        self._check_open()
        # In a cluster the nodes must be known before a channel can be looked up.
        await self._client.initialize()
        return self._client.pubsub()  # type: ignore[no-any-return, unused-ignore]

    async def close(self) -> None:
        """Closes all connections. What is under way may be answered yet; what comes later is refused."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._batcher is not None:
            await self._batcher.close()
        await self._client.aclose()
        # The library makes a connection anew that is closed under a call; each call has its bound.
        for _ in range(CALLS_AT_ONCE_MAX):
            await self._calls.acquire()
        await self._client.aclose()
        for sentinel in _sentinels_of(self._client):
            await sentinel.aclose()

    async def _evaluate(self, script: Script, values: list[str | int | float], key_count: int) -> Any:
        try:
            return await self._execute("EVALSHA", script.sha1, key_count, *values)
        except NoScriptError:
            return await self._execute("EVAL", script.text, key_count, *values)

    async def _execute(self, *command: str | float) -> Any:
        if self._batcher is not None:
            return await self._batcher.call(*command)
        return await self._execute_alone(*command)

    async def _execute_alone(self, *command: str | float) -> Any:
        self._check_open()
        async with asyncio.timeout(CALL_TIMEOUT_S), self._calls:
            # It may have been closed while this call waited.
            self._check_open()
            try:
                return await self._client.execute_command(*command)
            except RuntimeError:
                # As `resets_told` has it. The library has closed the connection and makes it anew, but does
                # not try again itself, as it does after an error that it knows.
                with resets_told():
                    return await self._client.execute_command(*command)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RedisConnectionError("The store is closed.")

    async def _told(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Awaits a call, each of whose commands is bounded; what goes wrong with Redis becomes our error."""
        try:
            return await call
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(
                "The queue's store does not answer. Try again in a moment.", retry_after_s=RETRY_AFTER_S
            ) from error


def connect(url: str) -> RedisStore:
    """Returns a store for a URL; the connection is made with the first call.

    Raises:
        ConfigInvalid: The URL is of no known form.
    """
    try:
        return RedisStore(_client(url))
    except ValueError as error:
        # The URL stays out of the message: it may hold a password.
        raise ConfigInvalid(f"redis_url: not usable; expected a {REDIS_URL_FORMS}") from error


def read_scores(reply: Sequence[Any]) -> dict[str, float]:
    """Members and scores, which come in pairs or one after the other, as the protocol's version has it."""
    flat = not all(isinstance(one, list | tuple) for one in reply)
    pairs = zip(reply[::2], reply[1::2], strict=True) if flat else reply
    return {str(name): float(score) for name, score in pairs}


def _client(url: str) -> Client:
    parts = urlsplit(url)
    if parts.scheme in {"redis", "rediss", "unix"}:
        return Redis.from_url(url, **_options())
    if parts.scheme == "redis+sentinel":
        return _sentinel_client(parts)
    if parts.scheme == "redis+cluster":
        nodes = [ClusterNode(host, port) for host, port in _hosts(parts, DEFAULT_PORT)]
        return RedisCluster(startup_nodes=nodes, **_credentials(parts), **_options())
    raise ValueError("unknown scheme")


def _sentinel_client(parts: SplitResult) -> Redis:
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service name")
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        _hosts(parts, DEFAULT_SENTINEL_PORT),
        sentinel_kwargs={"socket_timeout": SOCKET_TIMEOUT_S},
        db=int(database or 0),
        **_credentials(parts),
        **_options(),
    )
    return sentinel.master_for(service)  # type: ignore[no-any-return, unused-ignore]


def _sentinels_of(client: Client) -> Sequence[Redis]:
    """The clients by which a client finds its primary; closing it leaves them open."""
    pool = client.connection_pool if isinstance(client, Redis) else None
    return pool.sentinel_manager.sentinels if isinstance(pool, SentinelConnectionPool) else ()


def _options() -> dict[str, Any]:
    return {
        "decode_responses": True,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_INTERVAL_S,
        # A pooled connection that broke while idle is replaced once; a timeout is not tried again.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }


def _hosts(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    hosts = []
    for address in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{address}")
        if not one.hostname:
            raise ValueError("no host")
        hosts.append((one.hostname, one.port or default_port))
    return hosts


def _credentials(parts: SplitResult) -> dict[str, Any]:
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in found.items() if value}
