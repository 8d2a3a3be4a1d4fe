"""The subscription ends when it is told to, whatever the library makes of that."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import pytest

from services.gateway.adapters import redis_grants
from services.gateway.adapters.redis_grants import GrantListener


class DeafStore:
    """Takes the first cancellations while it connects for timeouts."""

    def __init__(self, swallowed: int) -> None:
        self.swallowed = swallowed
        self.connecting = asyncio.Event()

    async def open_pubsub(self) -> Any:
        """See `RedisStore.open_pubsub`."""
        self.connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.swallowed -= 1
            if self.swallowed < 0:
                raise
            raise TimeoutError from None


@pytest.mark.parametrize("swallowed", [0, 1, 2])
async def test_a_cancellation_that_is_taken_for_a_timeout_is_repeated(
    swallowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that cannot start ends while its subscription is being made."""
    monkeypatch.setattr(redis_grants, "_CANCEL_AGAIN_S", 0.01)
    monkeypatch.setattr(redis_grants, "_RESUBSCRIBE_MIN_S", 0.0)
    store: Any = DeafStore(swallowed)
    listener = GrantListener(store, "g1", lambda _: None, lambda _: None)
    listener.start()
    await store.connecting.wait()
    async with asyncio.timeout(5.0):
        await listener.close()
        # Twice does no harm.
        await listener.close()
    assert store.swallowed == -1


async def test_a_defect_of_a_connection_does_not_end_the_subscription(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is made anew: what uvloop says of a reset is no error of Redis, nor is a message without text."""
    monkeypatch.setattr(redis_grants, "_RESUBSCRIBE_MIN_S", 0.0)
    store: Any = DeafStore(0)
    no_text = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    reset = AsyncMock(side_effect=[RuntimeError("the handler is closed"), OSError(), no_text])
    listener = GrantListener(store, "g1", lambda _: None, lambda _: None)

    async def open_pubsub() -> Any:
        if reset.call_count < 3:
            await reset()
        return await DeafStore.open_pubsub(store)

    store.open_pubsub = open_pubsub
    listener.start()
    async with asyncio.timeout(5.0):
        await store.connecting.wait()
        await listener.close()
