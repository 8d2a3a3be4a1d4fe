"""A controller over a real Redis: what gateways find there, and what happens when it restarts empty."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from interlock.v1 import controller_service_pb2 as pb

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.ports import FenceStale
from tests.fakes.controller_ports import TIMEOUT_S
from tests.fakes.controller_process import lead_in, started

KEYS = ModelKeys("m")


async def until(store: RedisStore, field: str, key: str) -> dict[str, Any]:
    """The hash at `key`, as soon as it has `field`; Redis tells nobody, so it is asked again."""
    async with asyncio.timeout(TIMEOUT_S):
        while field not in (found := await store.fetch("HGETALL", key)):  # noqa: ASYNC110 - no event exists
            await asyncio.sleep(0.02)
    return dict(found)


@pytest.mark.usefixtures("redis_server")
async def test_redis_is_kept(tmp_path: Path, redis_store: RedisStore) -> None:
    """Record and route are written, and written again with a higher epoch after Redis was emptied."""
    async with (
        started(tmp_path, RedisRouteStore(redis_store), lead=lead_in(redis_store)) as controller,
        controller.member() as worker,
    ):
        await controller.serving()
        activate = await worker.become_active(pb.MEMBER_KIND_WORKER, "w", "1")
        weight, ready = f"w:{activate.revision}", f"r:{activate.revision}"
        route = await until(redis_store, weight, KEYS.route)
        assert (int(route["epoch"]), route["fence"], route[weight]) == (activate.epoch, "1", "100")
        record = await until(redis_store, ready, KEYS.worker("w"))
        assert (record["address"], record["incarnation"], record["slots"]) == ("127.0.0.1:1", "1", "8")
        await redis_store.fetch("FLUSHALL")
        again = await until(redis_store, weight, KEYS.route)
        assert int(again["epoch"]) > activate.epoch
        assert await until(redis_store, ready, KEYS.worker("w"))
        assert int((await worker.hear("activate")).activate.epoch) == int(again["epoch"])
    with pytest.raises(FenceStale):
        await RedisRouteStore(redis_store).write_route("m", 1, 0, {})
