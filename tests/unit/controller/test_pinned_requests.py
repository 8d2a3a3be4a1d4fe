"""Requests whose text came from one revision go on with it, though its worker died and the route has left."""

from __future__ import annotations

import pytest

from services.common.errors import RevisionInUse
from services.controller.core.commands import SendAbort, SendPrepare, SendRetire
from services.controller.core.member import Ready
from services.controller.core.rollout_record import State, Strategy
from tests.fixtures.rollout_world import World


async def fleet(names: str = "ab") -> World:
    """Workers that serve the old revision."""
    world = World()
    await world.settle()
    for name in names:
        world.attach(name)
    await world.settle()
    return world


def die(world: World, names: str) -> None:
    """Workers are killed, and do nothing by themselves once they are back."""
    for name in names:
        world.kill(name, farewell=False)
    world.lazy = set("ab")
    world.told.clear()


def ready(world: World, name: str, revision: str) -> None:
    """A worker that was asked to has loaded a revision."""
    assert any(
        told == name and isinstance(command, SendPrepare) and command.revision == revision
        for told, command in world.told
    )
    world.held[name].add(revision)
    world.coordinator.hear(world.key(name), world.workers[name], Ready(revision, 1))


@pytest.mark.parametrize("canary_percent", [10, 100])
async def test_a_load_that_requests_wait_for_outlives_the_rollout(canary_percent: int) -> None:
    """All workers died while it was judged; it ends as soon as one is back, and the other revision stays."""
    world = await fleet("a")
    await world.start(canary_percent=canary_percent, bake_s=1.0)
    await world.settle()
    assert world.rollout.state is State.BAKING
    first, awaited = (world.new, world.old) if canary_percent == 100 else (world.old, world.new)
    die(world, "a")
    world.store.awaited = {awaited}
    await world.settle(2)
    world.attach("a")
    await world.settle()
    ready(world, "a", first)
    await world.settle()
    assert world.rollout.state is (State.COMPLETED if canary_percent == 100 else State.ROLLED_BACK)
    assert ("a", SendAbort(awaited)) not in world.told
    ready(world, "a", awaited)
    await world.settle(1)
    assert world.store.workers["a"].ready == {first, awaited}
    with pytest.raises(RevisionInUse):
        world.coordinator.check_unused("m", awaited)
    world.store.awaited.clear()
    await world.settle(1)
    assert ("a", SendRetire(awaited)) in world.told
    assert world.held == {"a": {first}}
    assert world.route == {first: 100}


async def test_one_worker_loads_again_what_nobody_has_and_requests_wait_for() -> None:
    """The last worker that ran the old revision died after the end; it is loaded once, and goes again."""
    world = await fleet()
    world.store.running = {("b", world.old)}
    await world.start(bake_s=0.0)
    await world.settle(1)
    assert world.rollout.state is State.COMPLETED
    assert world.held == {"a": {world.new}, "b": {world.old, world.new}}
    world.kill("b", farewell=False)
    world.store.running.clear()
    world.store.awaited = {world.old}
    await world.settle(2)
    world.attach("b")
    await world.settle(2)
    assert world.held == {"a": {world.old, world.new}, "b": {world.new}}
    assert world.store.workers["a"].ready == {world.old, world.new}
    world.store.awaited.clear()
    await world.settle(1)
    assert world.held == {"a": {world.new}, "b": {world.new}}


async def test_by_swap_a_worker_ends_first_what_waits_for_the_old_revision() -> None:
    """It died while it ended what it ran; it loads the old revision again, takes requests, and goes on."""
    world = await fleet("a")
    world.store.running.add(("a", world.old))
    await world.start(strategy=Strategy.SWAP, bake_s=0.0)
    await world.settle()
    assert world.store.workers["a"].draining
    world.kill("a", farewell=False)
    world.store.running.clear()
    world.store.awaited = {world.old}
    await world.settle(1)
    world.told.clear()
    world.attach("a")
    await world.settle(1)
    assert world.held == {"a": {world.old}}
    assert not world.store.workers["a"].draining
    assert world.rollout.state is State.PREPARING
    world.store.awaited.clear()
    await world.settle(3)
    assert world.rollout.state is State.COMPLETED
    assert world.held == {"a": {world.new}}


async def test_after_a_swap_a_worker_that_comes_back_runs_first_what_waits_for_the_old_revision() -> None:
    """It was the last that had it; who serves the new one is left alone, and no worker has both."""
    world = await fleet()
    world.store.running.add(("b", world.old))
    await world.start(strategy=Strategy.SWAP, bake_s=0.0)
    await world.settle(1)
    assert world.held == {"a": {world.new}, "b": {world.old}}
    world.kill("b")
    world.store.running.clear()
    world.store.awaited = {world.old}
    await world.settle(1)
    assert world.rollout.state is State.COMPLETED
    assert world.held["a"] == {world.new}
    world.told.clear()
    world.attach("b")
    await world.settle(1)
    assert world.held == {"a": {world.new}, "b": {world.old}}
    assert not world.store.workers["b"].draining
    world.store.awaited.clear()
    world.store.running.add(("b", world.old))
    await world.settle(1)
    assert world.held["b"] == {world.old}
    world.store.running.clear()
    await world.settle(2)
    assert world.held == {"a": {world.new}, "b": {world.new}}
    assert ("a", world.old) not in {
        (one, told.revision) for one, told in world.told if isinstance(told, SendPrepare)
    }


async def test_by_swap_what_is_bound_to_the_old_revision_does_not_wait_behind_its_drain() -> None:
    """Its session broke while it drained: it takes what comes back to it, for nobody else can."""
    world = await fleet("a")
    world.store.running.add(("a", world.old))
    await world.start(strategy=Strategy.SWAP, bake_s=0.0)
    await world.settle()
    world.store.running.clear()
    world.store.awaited = {world.old}
    await world.settle(1)
    assert not world.store.workers["a"].draining
    assert world.held == {"a": {world.old}}
    world.store.awaited.clear()
    await world.settle(3)
    assert world.rollout.state is State.COMPLETED
