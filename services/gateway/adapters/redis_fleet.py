"""The fleet in Redis. Owns: what this gateway shows of its breakers, and what it learns each second.

It learns the route and the workers, for the time when Redis is gone; which worker is a new process; and what
operators hold. It asks Redis whatever its breaker says: one call a second, which may be the one that ends a
hold of that breaker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from services.common import logs
from services.common.errors import StoreUnavailable
from services.common.queue_keys import (
    BREAKER_HOLDS,
    ROUTE_EPOCH,
    ROUTE_WEIGHT_PREFIX,
    WORKER_ADDRESS,
    WORKER_DRAINING,
    WORKER_INCARNATION,
    WORKER_READY_PREFIX,
    WORKER_SLOTS,
    ModelKeys,
    breakers_of,
)
from services.common.redis_client import RedisStore, read_script
from services.gateway.adapters.breakers import BreakerReport, Breakers
from services.gateway.adapters.standby import FleetView, Standby
from services.gateway.core.breaker import FORCED, State
from services.gateway.core.queue_line import QueueWorker

_SCRIPTS = Path(__file__).parent / "scripts"

# A hold, or a restarted worker, is known within this; a call costs a tenth of a millisecond.
LOOK_S = 1.0
# Until every model that is served is known the store must not go: nothing could take its place.
LOOK_FOR_UNKNOWN_S = 0.1
# Ten seconds of such looks: a mesh that helps out may have no workers for weeks.
LOOKS_FOR_UNKNOWN_MAX = 100
# Five looks that could not be taken are a loss.
SHOWN_S = 5.0


class RedisFleet:
    """Looks at Redis each second, and more often at first until it knows each model's fleet.

    Args:
        store: Redis.
        gateway_id: This gateway.
        models: The models that are served now.
        standby: Is told what was learned of route and workers.
        breakers: Are shown, held, and told of new processes.
    """

    def __init__(
        self,
        store: RedisStore,
        gateway_id: str,
        models: Callable[[], Collection[str]],
        standby: Standby,
        breakers: Breakers,
    ) -> None:
        self._store = store
        self._keys = (breakers_of(gateway_id), BREAKER_HOLDS)
        self._models = models
        self._standby = standby
        self._breakers = breakers
        self._served: frozenset[str] = frozenset()
        self._looks_for_unknown = 0
        self._look = read_script(_SCRIPTS / "look.lua")
        self._show = read_script(_SCRIPTS / "show_breakers.lua")

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            try:
                await self.look()
            except StoreUnavailable:
                # What was known before is what the standby is for.
                pass
            except Exception:  # noqa: BLE001 - logged with its traceback; the next look may be well
                logs.get_logger().error("fleet.crashed", exc_info=True)
            await asyncio.sleep(self._pause_s())

    async def look(self) -> None:
        """Looks once.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        for model in self._models():
            view = read_view(await self._store.run_script(self._look, [ModelKeys(model).prefix], []))
            self._standby.remember(model, view)
            for worker_id, incarnation in view.incarnations.items():
                self._breakers.meet(model, worker_id, incarnation)
        shown = [text for report in self._breakers.reports() for text in (report.target, _text(report))]
        args: list[str | int | float] = [round(SHOWN_S * 1000), *shown]
        self._breakers.hold(read_holds(await self._store.run_script(self._show, self._keys, args)))

    def _pause_s(self) -> float:
        """How long until the next look: less while a model has just come of which nothing is known."""
        models = frozenset(self._models())
        if models != self._served:
            self._served, self._looks_for_unknown = models, 0
        if models and all(map(self._standby.serves, models)):
            return LOOK_S
        self._looks_for_unknown += 1
        return LOOK_S if self._looks_for_unknown > LOOKS_FOR_UNKNOWN_MAX and models else LOOK_FOR_UNKNOWN_S


def read_view(reply: Sequence[Any]) -> FleetView:
    """Reads the reply of `look.lua`."""
    route, gateways, *workers = reply
    fields = _pairs(route)
    records = {worker_id: _pairs(record) for worker_id, record in workers}
    return FleetView(
        epoch=int(fields.get(ROUTE_EPOCH, 0)),
        weights={
            name.removeprefix(ROUTE_WEIGHT_PREFIX): int(weight)
            for name, weight in fields.items()
            if name.startswith(ROUTE_WEIGHT_PREFIX)
        },
        # A record may vanish between the set and the hash.
        workers=[_worker(worker_id, record) for worker_id, record in records.items() if record],
        incarnations={
            worker_id: record[WORKER_INCARNATION] for worker_id, record in records.items() if record
        },
        gateways=int(gateways),
    )


def read_holds(reply: Sequence[str]) -> dict[str, State]:
    """Reads what operators hold; a state that this version does not know holds nothing."""
    known = {state.value: state for state in FORCED}
    return {target: known[state] for target, state in _pairs(reply).items() if state in known}


def _worker(worker_id: str, record: dict[str, str]) -> QueueWorker:
    ready = (name for name in record if name.startswith(WORKER_READY_PREFIX))
    return QueueWorker(
        worker_id,
        record[WORKER_ADDRESS],
        int(record[WORKER_SLOTS]),
        frozenset(name.removeprefix(WORKER_READY_PREFIX) for name in ready),
        draining=record[WORKER_DRAINING] == "1",
    )


def _text(report: BreakerReport) -> str:
    return json.dumps(
        {
            "state": report.state.value,
            "calls": report.calls,
            "failures": report.failures,
            "changed_ms": round(report.changed_s * 1000),
        }
    )


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
