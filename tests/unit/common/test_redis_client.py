"""Which Redis URLs are understood. Nothing is connected here."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool

from services.common.config import ConfigInvalid
from services.common.redis_client import SOCKET_TIMEOUT_S, connect


@pytest.mark.parametrize(
    "url",
    ["redis://localhost:6379/0", "rediss://user:secret@localhost", "unix:///tmp/redis.sock?db=1"],
)
async def test_a_single_server_is_reached_with_bounded_sockets(url: str) -> None:
    """Each form gives a client whose sockets give up after a second."""
    store = connect(url)
    assert isinstance(store._client, Redis)
    assert store._client.connection_pool.connection_kwargs["socket_timeout"] == SOCKET_TIMEOUT_S
    await store.close()


async def test_sentinels_are_asked_for_their_service() -> None:
    """Several sentinels, a default port, a password, a service and a database."""
    store = connect("redis+sentinel://:p%40ss@s1:5000,s2/main/3")
    assert isinstance(store._client, Redis)
    pool = store._client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "main"
    assert [
        (node.connection_pool.connection_kwargs["host"], node.connection_pool.connection_kwargs["port"])
        for node in pool.sentinel_manager.sentinels
    ] == [("s1", 5000), ("s2", 26379)]
    assert pool.connection_kwargs["password"] == "p@ss"
    assert pool.connection_kwargs["db"] == 3
    await store.close()


async def test_a_cluster_is_entered_by_any_of_its_nodes() -> None:
    """All nodes that the URL names are tried."""
    store = connect("redis+cluster://user:secret@n1:7000,n2")
    assert isinstance(store._client, RedisCluster)
    assert [(node.host, node.port) for node in store._client.startup_nodes] == [("n1", 7000), ("n2", 6379)]
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://:secret@localhost",
        "redis+sentinel://:secret@s1",
        "redis+cluster://:secret@",
        "redis+cluster://:secret@n1:port",
        "redis://:secret@localhost:port",
    ],
)
def test_a_wrong_url_is_refused_without_being_shown(url: str) -> None:
    """The message says what is expected, and holds no password."""
    with pytest.raises(ConfigInvalid, match="redis_url") as refusal:
        connect(url)
    assert "secret" not in str(refusal.value)
