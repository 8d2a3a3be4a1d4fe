"""Nobody waits for the store of request ids while it is known to be away."""

from __future__ import annotations

import pytest

from services.common.errors import StoreUnavailable
from services.gateway.adapters.breakers import STORE_LIMITS
from services.gateway.adapters.guarded_directory import GuardedRequestDirectory
from services.gateway.adapters.pybreaker_circuit import Circuit
from services.gateway.core.breaker import State, Verdict
from services.gateway.core.log import Claim
from tests.fakes.gateway_logs import FakeLogs
from tests.fakes.turned_clock import TurnedClock

CLAIM = Claim("m", "d")


async def test_it_is_asked_while_the_breaker_is_closed_and_only_then() -> None:
    """Neither while it sleeps nor while the way home is tried; an id from before stands for what it did."""
    clock, logs = TurnedClock(), FakeLogs()
    circuit = Circuit("store", STORE_LIMITS, clock, lambda _: None)
    directory = GuardedRequestDirectory(logs, circuit)
    assert await directory.claim("a", CLAIM, 60.0) is None
    permit = circuit.admit()
    assert permit is not None
    circuit.settle(permit, Verdict.FAILURE)
    await refuses(directory)
    clock.turn(1)
    permit = circuit.admit()
    assert circuit.breaker.state is State.HALF_OPEN
    await refuses(directory)
    assert permit is not None
    circuit.settle(permit, Verdict.SUCCESS)
    assert await directory.find("a") == CLAIM
    await directory.release("a", CLAIM)
    assert logs.claims == {}


async def test_what_it_says_does_not_move_the_breaker() -> None:
    """An id may lie on another node of the store than the queues, which go on."""
    logs = FakeLogs(down=True)
    circuit = Circuit("store", STORE_LIMITS, TurnedClock(), lambda _: None)
    directory = GuardedRequestDirectory(logs, circuit)
    with pytest.raises(StoreUnavailable):
        await directory.claim("a", CLAIM, 60.0)
    assert circuit.breaker.state is State.CLOSED


async def refuses(directory: GuardedRequestDirectory) -> None:
    """Every call fails."""
    for call in (
        directory.claim("b", CLAIM, 60.0),
        directory.find("a"),
        directory.release("a", CLAIM),
    ):
        with pytest.raises(StoreUnavailable, match="not asked"):
            await call
