"""How often a gateway looks at Redis for workers that it does not know."""

from __future__ import annotations

from typing import cast

from services.common.redis_client import RedisStore
from services.gateway.adapters.breakers import Breakers
from services.gateway.adapters.redis_fleet import (
    LOOK_FOR_UNKNOWN_S,
    LOOK_S,
    LOOKS_FOR_UNKNOWN_MAX,
    RedisFleet,
)
from services.gateway.adapters.standby import FleetView, Standby
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.fallback_world import W1


def test_a_model_without_workers_is_not_looked_for_in_a_hurry_for_ever() -> None:
    """Ten times a second at first, and again when another one comes; each second once all are known."""
    models = {"helper"}
    standby = Standby(TurnedClock(), QueueLimits())
    # Nothing of these is asked for a pause.
    store, breakers = cast("RedisStore", None), cast("Breakers", None)
    fleet = RedisFleet(store, "gateway-1", lambda: models, standby, breakers)
    pauses = [fleet._pause_s() for _ in range(LOOKS_FOR_UNKNOWN_MAX + 2)]
    assert pauses == [LOOK_FOR_UNKNOWN_S] * LOOKS_FOR_UNKNOWN_MAX + [LOOK_S] * 2
    models.add("m")
    assert fleet._pause_s() == LOOK_FOR_UNKNOWN_S
    for model in models:
        standby.remember(model, FleetView(1, {"r1": 1}, (W1,), {"w1": "i1"}, 1))
    assert fleet._pause_s() == LOOK_S
