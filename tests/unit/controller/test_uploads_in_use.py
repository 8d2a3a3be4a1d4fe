"""Revisions in use: what serves, is in a rollout or inside a worker is not deleted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.common.errors import RevisionInUse, StoreUnavailable
from services.controller.core.rollout_record import State
from tests.fixtures.rollout_world import World


def free(world: World) -> Iterator[str]:
    """The revisions that may be deleted now."""
    for revision in (world.old, world.new):
        try:
            world.coordinator.check_unused("m", revision)
        except RevisionInUse:
            continue
        yield revision


async def test_what_a_rollout_or_a_worker_has_is_in_use() -> None:
    """The old one is free when no worker holds it any more, and the new one from then on is not."""
    world = World()
    with pytest.raises(StoreUnavailable):
        world.coordinator.check_unused("m", world.new)
    await world.settle()
    world.attach("a")
    await world.settle()
    assert list(free(world)) == [world.new]
    await world.start()
    assert list(free(world)) == []
    await world.settle(10)
    assert world.rollout.state is State.COMPLETED
    assert list(free(world)) == [world.old]
