"""The lead in Redis. Owns: how controllers of a model agree on one of them, by one key and Redis's own clock.

The key lies beside the route, so that the scripts which write the route see in the same step whether their
caller still leads.
"""

from __future__ import annotations

from pathlib import Path

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore, Script, read_script
from services.controller.core.ports import FenceStale
from services.controller.core.records import Standing

_COMMON = Path(__file__).parents[2] / "common" / "scripts"
_SCRIPTS = Path(__file__).parent / "scripts"
_SHARED = (_COMMON / "clock.lua", _SCRIPTS / "shared" / "fence.lua")
_OPERATIONS = ("take_lead", "keep_lead", "leave_lead")


class RedisLead:
    """`Lead` in Redis. The store's connection is the caller's.

    Args:
        store: The connection.
        model: The model that is led.
        controller_id: Who we are.
        incarnation: Names our process.
        ttl_s: How long a lease holds that is not renewed.
    """

    def __init__(
        self, store: RedisStore, model: str, controller_id: str, incarnation: str, *, ttl_s: float
    ) -> None:
        self._store = store
        self._keys = [ModelKeys(model).prefix]
        self._id = controller_id
        self._incarnation = incarnation
        self._ttl_ms = round(ttl_s * 1000)
        self._scripts: dict[str, Script] = {
            name: read_script(*_SHARED, _SCRIPTS / f"{name}.lua") for name in _OPERATIONS
        }

    async def take(self, *, may_found: bool, may_replace: bool) -> Standing:
        """See `Lead.take`."""
        arguments = (self._id, self._incarnation, self._ttl_ms, int(may_found), int(may_replace))
        fence, leader_id = await self._store.run_script(self._scripts["take_lead"], self._keys, arguments)
        return Standing(int(fence), str(leader_id))

    async def keep(self, fence: int) -> None:
        """See `Lead.keep`."""
        arguments = (self._id, self._incarnation, self._ttl_ms, fence)
        if not await self._store.run_script(self._scripts["keep_lead"], self._keys, arguments):
            raise FenceStale(f"A controller with a fence above {fence} leads.")

    async def leave(self) -> None:
        """See `Lead.leave`."""
        await self._store.run_script(self._scripts["leave_lead"], self._keys, (self._incarnation,))
