"""Breakers through the controller: what gateways show in Redis is listed, and holds are written for them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.queue_keys import BREAKER_HOLDS, breakers_of
from services.common.redis_client import RedisStore
from services.controller.adapters.redis_breakers import RedisBreakerFleet
from services.controller.adapters.redis_route import RedisRouteStore
from tests.fakes.controller_process import Controller, bearer, lead_in, started


@pytest.fixture
async def controller(tmp_path: Path, redis_store: RedisStore) -> AsyncIterator[Controller]:
    """A controller over Redis with one gateway, which shows two breakers."""
    shown = {"state": "open", "calls": 24, "failures": 13, "changed_ms": 1_700_000_000_500}
    key = breakers_of("g")
    await redis_store.fetch(
        "HSET", key, "w", json.dumps(shown), "store", json.dumps({**shown, "state": "closed"})
    )
    await redis_store.fetch("PEXPIRE", key, "60000")
    breakers = RedisBreakerFleet(redis_store)
    async with (
        started(
            tmp_path, RedisRouteStore(redis_store), lead=lead_in(redis_store), breakers=breakers
        ) as found,
        found.member() as member,
    ):
        await found.serving()
        await member.become_active(pb.MEMBER_KIND_GATEWAY, "g", "1")
        yield found


async def test_what_gateways_show_is_listed(controller: Controller) -> None:
    """Gateway, target, state, counts and the time of the change, by gateway and target."""
    stub: Any = controller.stub
    reply = await stub.ListBreakers(pb.ListBreakersRequest(), metadata=bearer("admin"))
    store, worker = reply.breakers
    assert (store.target, store.state) == ("store", worker_pb2.BREAKER_STATE_CLOSED)
    assert (worker.gateway_id, worker.target, worker.calls, worker.failures) == ("g", "w", 24, 13)
    assert worker.state == worker_pb2.BREAKER_STATE_OPEN
    assert worker.change_time.ToMilliseconds() == 1_700_000_000_500


async def test_a_hold_is_written_and_taken_back(controller: Controller, redis_store: RedisStore) -> None:
    """Gateways find it in one hash; the answer shows what they are about to do; a release leaves no key."""
    stub: Any = controller.stub
    hold = pb.ForceBreakerRequest(target="w", state=worker_pb2.BREAKER_STATE_FORCED_OPEN)
    (told,) = (await stub.ForceBreaker(hold, metadata=bearer("admin"))).breakers
    assert told.state == worker_pb2.BREAKER_STATE_FORCED_OPEN
    assert await redis_store.fetch("HGETALL", BREAKER_HOLDS) == {"w": "forced_open"}
    release = pb.ForceBreakerRequest(target="w", state=worker_pb2.BREAKER_STATE_CLOSED)
    await stub.ForceBreaker(release, metadata=bearer("admin"))
    assert await redis_store.fetch("EXISTS", BREAKER_HOLDS) == 0


async def test_a_hold_is_listed_at_once(controller: Controller) -> None:
    """Before any gateway has read it, as its answer says, and so is its end; others stay as they were."""
    stub: Any = controller.stub

    async def listed() -> dict[str, int]:
        reply = await stub.ListBreakers(pb.ListBreakersRequest(), metadata=bearer("admin"))
        return {one.target: one.state for one in reply.breakers}

    hold = pb.ForceBreakerRequest(target="store", state=worker_pb2.BREAKER_STATE_FORCED_OPEN)
    await stub.ForceBreaker(hold, metadata=bearer("admin"))
    assert await listed() == {
        "store": worker_pb2.BREAKER_STATE_FORCED_OPEN,
        "w": worker_pb2.BREAKER_STATE_OPEN,
    }
    hold.state = worker_pb2.BREAKER_STATE_CLOSED
    await stub.ForceBreaker(hold, metadata=bearer("admin"))
    assert (await listed())["store"] == worker_pb2.BREAKER_STATE_CLOSED


async def test_a_released_hold_is_listed_at_once(controller: Controller, redis_store: RedisStore) -> None:
    """A gateway that still shows it held has not read of the release yet."""
    stub: Any = controller.stub
    shown = {"state": "forced_open", "calls": 0, "failures": 0, "changed_ms": 1_700_000_000_500}
    await redis_store.fetch("HSET", breakers_of("g"), "w", json.dumps(shown))
    reply = await stub.ListBreakers(pb.ListBreakersRequest(), metadata=bearer("admin"))
    assert [(one.target, one.state) for one in reply.breakers] == [
        ("store", worker_pb2.BREAKER_STATE_CLOSED),
        ("w", worker_pb2.BREAKER_STATE_CLOSED),
    ]


async def test_a_target_that_nobody_knows_is_refused(controller: Controller, redis_store: RedisStore) -> None:
    """The message names those there are; what is held already can be let go by any name.

    Until the members are back with a new controller any name may be that of one of them.
    """
    stub: Any = controller.stub
    hold = pb.ForceBreakerRequest(target="nope", state=worker_pb2.BREAKER_STATE_FORCED_OPEN)
    release = pb.ForceBreakerRequest(target="nope", state=worker_pb2.BREAKER_STATE_CLOSED)
    await stub.ForceBreaker(hold, metadata=bearer("admin"))
    assert await redis_store.fetch("HGETALL", BREAKER_HOLDS) == {"nope": "forced_open"}
    await stub.ForceBreaker(release, metadata=bearer("admin"))
    async with controller.member() as member:
        await member.become_active(pb.MEMBER_KIND_WORKER, "v", "1")
        for request in (hold, release):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ForceBreaker(request, metadata=bearer("admin"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert "there are store, v, w." in str(caught.value.details())
    assert await redis_store.fetch("EXISTS", BREAKER_HOLDS) == 0
    await redis_store.fetch("HSET", BREAKER_HOLDS, "nope", "forced_open")
    assert not (await stub.ForceBreaker(release, metadata=bearer("admin"))).breakers
    assert await redis_store.fetch("EXISTS", BREAKER_HOLDS) == 0


@pytest.mark.parametrize(
    ("request_fields", "scope", "code"),
    [
        ({"target": "w", "state": worker_pb2.BREAKER_STATE_OPEN}, "admin", grpc.StatusCode.INVALID_ARGUMENT),
        ({"target": "w"}, "admin", grpc.StatusCode.INVALID_ARGUMENT),
        ({"state": worker_pb2.BREAKER_STATE_CLOSED}, "admin", grpc.StatusCode.INVALID_ARGUMENT),
        (
            {"target": "w/../x", "state": worker_pb2.BREAKER_STATE_CLOSED},
            "admin",
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            {"target": "w", "state": worker_pb2.BREAKER_STATE_CLOSED},
            "generate",
            grpc.StatusCode.PERMISSION_DENIED,
        ),
    ],
    ids=["state-not-a-hold", "no-state", "no-target", "target-no-id", "no-admin"],
)
async def test_what_is_no_hold_is_refused(
    controller: Controller, request_fields: dict[str, Any], scope: str, code: grpc.StatusCode
) -> None:
    """Only a well-formed target, one of three states, and an administrator."""
    stub: Any = controller.stub
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ForceBreaker(pb.ForceBreakerRequest(**request_fields), metadata=bearer(scope))
    assert caught.value.code() is code
