"""What one request still owes the queue is done, whatever goes wrong once."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import StoreUnavailable
from services.common.system_clock import SystemClock
from services.gateway.dispatcher.errands import Errands


@pytest.mark.parametrize(
    ("failures", "tries"),
    [
        ([StoreUnavailable("gone"), StoreUnavailable("gone")], 3),
        ([RuntimeError()], 2),
        ([RuntimeError(), StoreUnavailable("gone")], 3),
        ([RuntimeError(), RuntimeError()], 2),
    ],
    ids=["store away", "once", "once, and the store away", "a defect"],
)
async def test_an_errand_is_tried_again(failures: list[Exception], tries: int) -> None:
    """While the store is away, and once where nobody knows why it failed; then the next one has its turn."""
    idle = asyncio.Event()
    done: list[str] = []

    async def settle() -> None:
        done.append("settle")
        if failures:
            raise failures.pop(0)

    async def behind() -> None:
        done.append("behind")

    errands = Errands(SystemClock(), idle.set)
    errands.add(settle)
    errands.add(behind)
    async with asyncio.timeout(5):
        await idle.wait()
    assert done == ["settle"] * tries + ["behind"]
