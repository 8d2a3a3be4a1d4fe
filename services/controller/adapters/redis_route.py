"""Route and workers in Redis. Owns: the controller's fenced writes, and how they are laid out.

Fields and keys are those of `services.common.queue_keys`; the scripts of the gateways read them. It knows no
rollout and no member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from services.common.queue_keys import ROUTE_EPOCH, ROUTE_FENCE, ROUTE_WEIGHT_PREFIX, ModelKeys
from services.common.redis_client import RedisStore, Script, read_scores, read_script
from services.controller.core.ports import FenceStale
from services.controller.core.records import KnownMembers, Route, WorkerRecord

_COMMON = Path(__file__).parents[2] / "common" / "scripts"
_SCRIPTS = Path(__file__).parent / "scripts"
_SHARED = (_COMMON / "clock.lua", _SCRIPTS / "shared" / "fence.lua", _COMMON / "index.lua")
# A gateway that was not seen for longer has gone.
SEEN_MS = 3_000

_OPERATIONS = ("set_route", "set_worker", "remove_worker", "unready")


class RedisRouteStore:
    """`RouteStore` in Redis. The store's connection is the caller's."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._scripts: dict[str, Script] = {
            name: read_script(*_SHARED, _SCRIPTS / f"{name}.lua") for name in _OPERATIONS
        }

    async def read_route(self, model: str) -> Route | None:
        """See `RouteStore.read_route`."""
        reply = await self._store.fetch("HGETALL", ModelKeys(model).route)
        if ROUTE_EPOCH not in reply:
            return None
        weights = {
            name.removeprefix(ROUTE_WEIGHT_PREFIX): int(weight)
            for name, weight in reply.items()
            if name.startswith(ROUTE_WEIGHT_PREFIX)
        }
        return Route(int(reply[ROUTE_EPOCH]), int(reply[ROUTE_FENCE]), weights)

    async def read_members(self, model: str) -> KnownMembers:
        """See `RouteStore.read_members`. The gateway that was seen last says what time it is."""
        keys = ModelKeys(model)
        workers = await self._store.fetch("SMEMBERS", keys.workers)
        reply = await self._store.fetch("ZRANGE", keys.gateways, "0", "-1", "WITHSCORES")
        seen = read_scores(reply)
        latest_ms = max(seen.values(), default=0.0)
        lately = (name for name, seen_ms in seen.items() if latest_ms - seen_ms < SEEN_MS)
        return KnownMembers(frozenset(workers), frozenset(lately))

    async def read_awaited(self, model: str) -> frozenset[str]:
        """See `RouteStore.read_awaited`."""
        return frozenset(await self._store.fetch("SMEMBERS", ModelKeys(model).pins))

    async def write_route(self, model: str, epoch: int, fence: int, weights: Mapping[str, int]) -> None:
        """See `RouteStore.write_route`."""
        pairs = [value for pair in sorted(weights.items()) for value in pair]
        await self._write("set_route", model, fence, epoch, *pairs)

    async def write_worker(self, model: str, record: WorkerRecord, fence: int) -> None:
        """See `RouteStore.write_worker`."""
        await self._write(
            "set_worker",
            model,
            fence,
            record.worker_id,
            record.address,
            record.incarnation,
            record.slots,
            int(record.draining),
            math.ceil(record.lease_ttl_s * 1000),
            *sorted(record.ready),
        )

    async def remove_worker(self, model: str, worker_id: str, fence: int) -> None:
        """See `RouteStore.remove_worker`."""
        await self._write("remove_worker", model, fence, worker_id)

    async def unready(
        self, model: str, worker_id: str, revision: str, fence: int, *, routed: bool = False
    ) -> bool:
        """See `RouteStore.unready`."""
        return await self._write("unready", model, fence, worker_id, revision, int(routed)) == 1

    async def _write(self, name: str, model: str, fence: int, *args: str | int) -> int:
        written = await self._store.run_script(self._scripts[name], [ModelKeys(model).prefix], [fence, *args])
        if not written:
            raise FenceStale(f"A controller with a fence above {fence} has written.")
        return int(written)
