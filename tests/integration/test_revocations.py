"""Revoked tokens in a real Redis: between processes, over its loss, and through the controller."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
import redis
from interlock.v1 import controller_service_pb2 as pb

from services.common.errors import ArgumentInvalid
from services.common.redis_client import RedisStore, connect
from services.common.redis_revocations import KEY, RedisRevocations
from services.common.revocation import RevocationList, RevocationsFull
from services.common.token_claims import TimeRules
from services.common.token_mint import mint
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import JWT_SECRET, bearer, started
from tests.fixtures.gateway_world import reason_of
from tests.fixtures.redis_server import RedisServer


@pytest.fixture
def now_s() -> float:
    """The time of this test: entries end by the store's own clock, however late in a run it comes."""
    return time.time()


async def test_entries_come_back_with_their_ends(
    now_s: float, redis_store: RedisStore, redis_client: redis.Redis
) -> None:
    """What is over is left out of a read and removed by the next write; the key ends with its last entry."""
    revocations = RedisRevocations(redis_store)
    assert await revocations.read(now_s) == {}
    await revocations.add({"one": now_s + 100.5, "two": now_s + 10, "a b\u00e9": now_s + 50}, now_s)
    assert await revocations.read(now_s + 10) == {"one": now_s + 100.5, "a bé": now_s + 50}
    await revocations.add({"one": now_s + 20}, now_s + 10)
    assert (await revocations.read(now_s + 20))["one"] == now_s + 100.5
    assert redis_client.zcard(KEY) == 2
    assert 0 < redis_client.ttl(KEY) <= 101


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.usefixtures("redis_client")
async def test_entries_are_read_by_either_protocol(
    now_s: float, redis_process: RedisServer, protocol: int
) -> None:
    """The URL may ask for the older one, as some proxies need, whose replies have no pairs."""
    store = connect(f"{redis_process.url}?protocol={protocol}")
    revocations = RedisRevocations(store)
    assert await revocations.read(now_s) == {}
    entries = {"one": now_s + 100.5, "two": now_s + 10}
    await revocations.add(entries, now_s)
    assert await revocations.read(now_s) == entries
    await store.close()


async def test_the_list_is_bounded_in_the_store(
    now_s: float, redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is left out, and told; what is over makes room."""
    monkeypatch.setattr("services.common.redis_revocations.REVOCATIONS_MAX", 2)
    revocations = RedisRevocations(redis_store)
    with pytest.raises(RevocationsFull):
        await revocations.add({"one": now_s + 10, "two": now_s + 99, "three": now_s + 99}, now_s)
    assert set(await revocations.read(now_s)) == {"one", "two"}
    await revocations.add({"two": now_s + 100}, now_s)
    await revocations.add({"three": now_s + 99}, now_s + 10)
    assert set(await revocations.read(now_s + 10)) == {"two", "three"}


async def test_a_redis_that_was_killed_learns_again(redis_server: RedisServer) -> None:
    """Stopped, it changes nothing; back and empty, it is told what was revoked before."""
    store = connect(redis_server.url)
    here = RevocationList(RedisRevocations(store), TimeRules(), time.time)
    await here.revoke("one")
    redis_server.stop()
    await here.refresh()
    assert here.is_revoked("one")
    redis_server.start()
    await here.refresh()
    later = RevocationList(RedisRevocations(store), TimeRules(), time.time)
    await later.refresh()
    assert later.is_revoked("one")
    await store.close()


async def test_an_operator_takes_a_token_back(tmp_path: Path) -> None:
    """RevokeToken wants the scope `admin`; afterwards the token is refused by its reason, others are not."""
    stolen = mint(JWT_SECRET, subject="s", scopes=["admin"], ttl_s=60, extra={"jti": "stolen"})
    metadata = (("authorization", f"Bearer {stolen}"),)
    async with started(tmp_path, MemoryRouteStore()) as controller:
        await controller.serving()
        await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=metadata)
        request = pb.RevokeTokenRequest(token_id="stolen")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.stub.RevokeToken(request, metadata=bearer("generate"))
        assert reason_of(caught.value) == "SCOPE_MISSING"
        reply = await controller.stub.RevokeToken(request, metadata=bearer("admin"))
        assert reply.forget_time.ToSeconds() > time.time() + 86_400
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=metadata)
        assert (caught.value.code(), reason_of(caught.value)) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_REVOKED",
        )
        await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=bearer("admin"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.stub.RevokeToken(pb.RevokeTokenRequest(), metadata=bearer("admin"))
        assert reason_of(caught.value) == ArgumentInvalid.reason
