"""Breakers in Redis. Owns: what the controller reads of the gateways' breakers, and how a hold is written.

Gateways read holds and show their breakers each second; what is shown vanishes with its gateway.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from services.common.queue_keys import BREAKER_HOLDS, breakers_of
from services.common.redis_client import RedisStore, read_script
from services.controller.core.records import BreakerRecord

_HOLD = Path(__file__).parent / "scripts" / "hold_breaker.lua"

RELEASED = "closed"


class RedisBreakerFleet:
    """`BreakerFleet` in Redis. The store's connection is the caller's."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._hold = read_script(_HOLD)

    async def list_breakers(self, gateway_ids: Iterable[str]) -> tuple[BreakerRecord, ...]:
        """See `BreakerFleet.list_breakers`."""
        found: list[BreakerRecord] = []
        for gateway_id in sorted(gateway_ids):
            shown = await self._store.fetch("HGETALL", breakers_of(gateway_id))
            found.extend(_read(gateway_id, target, text) for target, text in sorted(shown.items()))
        return tuple(found)

    async def holds(self) -> Mapping[str, str]:
        """See `BreakerFleet.holds`."""
        held: dict[str, str] = await self._store.fetch("HGETALL", BREAKER_HOLDS)
        return held

    async def hold(self, target: str, state: str) -> None:
        """See `BreakerFleet.hold`."""
        await self._store.run_script(
            self._hold, [BREAKER_HOLDS], [target, "" if state == RELEASED else state]
        )


def _read(gateway_id: str, target: str, text: str) -> BreakerRecord:
    fields = json.loads(text)
    return BreakerRecord(
        gateway_id=gateway_id,
        target=target,
        state=fields["state"],
        calls=fields["calls"],
        failures=fields["failures"],
        changed_s=fields["changed_ms"] / 1000,
    )
