"""A coordinator's rounds. Owns: when it judges leases, and when it brings the store to what it shall be."""

from __future__ import annotations

import asyncio
import contextlib

from services.common.clock import Clock
from services.controller.coordinator.coordinator import TICK_S, Coordinator
from services.controller.core.member import Kind

# While a worker is out of the line requests wait: it is looked after as often as people notice.
DRAIN_LOOK_S = 0.1


async def run(coordinator: Coordinator, clock: Clock) -> None:
    """Watches leases and keeps the store, until it is cancelled."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_watch(coordinator), name="controller.watch")
        tasks.create_task(_keep(coordinator, clock), name="controller.keep")


async def _watch(coordinator: Coordinator) -> None:
    while True:
        coordinator.tick()
        await asyncio.sleep(TICK_S)


async def _keep(coordinator: Coordinator, clock: Clock) -> None:
    renew_s = clock.monotonic()
    task = asyncio.current_task()
    assert task is not None
    # A store's library may swallow a cancellation that meets its answer; the task still knows of it.
    while not task.cancelling():
        now_s = clock.monotonic()
        renew = now_s >= renew_s
        if renew:
            renew_s = now_s + TICK_S
        coordinator.changed.clear()
        await coordinator.keep_store(renew=renew)
        if coordinator.store_lost:
            # Nothing is gained by trying again before the next tick, whatever changes.
            await asyncio.sleep(TICK_S)
            continue
        # Not `wait_for`: before Python 3.12 it loses a cancellation that meets the event.
        with contextlib.suppress(TimeoutError):
            left_s = renew_s - clock.monotonic()
            async with asyncio.timeout(min(left_s, DRAIN_LOOK_S) if drains(coordinator) else left_s):
                await coordinator.changed.wait()


def drains(coordinator: Coordinator) -> bool:
    """Whether a worker is out of the line until it has ended what it runs."""
    return any(member.quiet and member.active_revisions for member in coordinator.members(Kind.WORKER))
