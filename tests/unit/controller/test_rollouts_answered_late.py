"""Swaps whose workers answer late, or still hold what an earlier one brought: what serves is not given up."""

from __future__ import annotations

from typing import Any

import pytest

from services.controller.core.commands import Command, SendAbort, SendRetire
from services.controller.core.member import Failed
from services.controller.core.rollout_events import Cancelled, TakenBack
from services.controller.core.rollout_record import Spec, State, Strategy
from tests.fixtures.rollout_world import World

# Looks of the controller before a worker answers.
LOOKS = 3


async def fleet(workers: str) -> World:
    """A world whose workers serve the old revision."""
    world = World()
    await world.settle()
    for name in workers:
        world.attach(name)
    await world.settle()
    return world


async def unheard(world: World) -> list[tuple[str, Command]]:
    """What workers are told while nobody answers."""
    world.deaf = set(world.workers)
    heard = dict(world.heard)
    for _ in range(LOOKS):
        await world.coordinator.keep_store()
    return [(name, one) for name, stream in world.workers.items() for one in stream.sent[heard[name] :]]


def listed(world: World) -> dict[str, list[str]]:
    """The workers that take requests, with what they take them for."""
    records = world.store.workers.values()
    return {one.worker_id: sorted(one.ready) for one in records if not one.draining}


async def ends_aborted(world: World) -> None:
    """Checks that all who answer at last have what they had before, and nothing else."""
    world.deaf.clear()
    world.lazy.clear()
    await world.settle(2)
    assert world.rollout.state is State.ABORTED
    assert world.held == {name: {world.old} for name in world.workers}


@pytest.mark.parametrize("staged", [True, False])
async def test_a_swap_that_is_cancelled_leaves_what_serves(*, staged: bool) -> None:
    """They have been told to drop the files, and not yet answered: those take no memory."""
    world = await fleet("ab")
    world.slow = {"b"} if staged else {"a", "b"}
    await world.start(strategy=Strategy.SWAP)
    await world.settle(2)
    await world.coordinator.tell_rollout("r", Cancelled())
    told = await unheard(world)
    assert sorted(told, key=lambda one: one[0]) == [(name, SendAbort(world.new)) for name in "ab"]
    assert listed(world) == {name: [world.old] for name in "ab"}
    await ends_aborted(world)


async def test_a_swap_that_fails_takes_nothing_from_the_others() -> None:
    """The first worker cannot load it; the two that serve drop the staged files, and no more."""
    world = await fleet("abc")
    world.lazy = {"a"}
    await world.start(strategy=Strategy.SWAP)
    await world.settle(2)
    assert world.rollout.swapping == ("a",)
    world.coordinator.hear(world.key("a"), world.workers["a"], Failed(world.new, "load", "no memory"))
    told = await unheard(world)
    assert not any(isinstance(command, SendRetire) for _, command in told)
    assert listed(world) == {name: [world.old] for name in "bc"}
    await ends_aborted(world)


async def test_a_swap_that_is_asked_for_again_takes_in_who_still_holds_what_it_brings() -> None:
    """Two still end what the first try had begun: they serve it again, and do not unload what is routed."""
    world = await fleet("abc")
    world.store.running = {("c", world.old)}
    await world.start(strategy=Strategy.SWAP, bake_s=30.0)
    await world.settle(2)
    world.store.running = {("a", world.new), ("b", world.new), ("c", world.old)}
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(2)
    assert world.rollout.state is State.ROLLED_BACK
    assert listed(world) == {"c": [world.old]}
    world.told.clear()
    again = Spec(model="m", revision=world.new, strategy=Strategy.SWAP, bake_s=5.0)
    await world.coordinator.start_rollout("again", again)
    await world.settle(2)
    assert world.route == {world.new: 100}
    assert listed(world) == {"a": [world.new], "b": [world.new]}
    world.store.running.clear()
    await world.settle(6)
    assert world.coordinator.rollouts.find("again").state is State.COMPLETED
    assert [told for told in world.told if isinstance(told[1], SendRetire)] == [("c", SendRetire(world.old))]
    assert listed(world) == {name: [world.new] for name in "abc"}


async def last_to_change() -> World:
    """A swap that is judged: `a` and `b` run new requests, and `c` has ended its last old one."""
    world = await fleet("abc")
    world.store.running = {("c", world.old)}
    await world.start(strategy=Strategy.SWAP, bake_s=30.0)
    await world.settle(2)
    assert (world.rollout.state, world.rollout.swapping) == (State.BAKING, ("a", "b", "c"))
    world.store.running = {("a", world.new), ("b", world.new)}
    world.lazy = set("abc")
    return world


async def test_the_way_back_keeps_the_only_old_copy() -> None:
    """It was about to be unloaded when an operator's word came: the route goes back to it at once."""
    world = await last_to_change()
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(3)
    assert world.rollout.state is State.ROLLED_BACK
    assert world.route == {world.old: 100}
    assert listed(world) == {"c": [world.old]}
    assert world.held["c"] == {world.old}


async def test_what_is_asked_for_again_while_the_store_answers_is_not_unloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The word comes between the store's answer and the command; gateways see the revision again."""
    world = await last_to_change()
    unready = world.store.unready

    async def taken_back_meanwhile(*args: Any, **options: Any) -> bool:
        monkeypatch.undo()
        spared = await unready(*args, **options)
        await world.coordinator.tell_rollout("r", TakenBack())
        return spared

    monkeypatch.setattr(world.store, "unready", taken_back_meanwhile)
    await world.settle(3)
    assert world.rollout.state is State.ROLLED_BACK
    assert listed(world) == {"c": [world.old]}
    assert world.held["c"] == {world.old}


async def test_a_rollout_that_never_began_lets_no_worker_hold_two() -> None:
    """Memory holds one copy as before: what the last swap has left is unloaded before the other one loads."""
    world = await fleet("ab")
    await world.start(strategy=Strategy.SWAP, bake_s=30.0)
    await world.settle(2)
    world.store.running = {("b", world.new)}
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(2)
    assert world.held == {"a": {world.old}, "b": {world.new}}
    await world.coordinator.start_rollout("s", Spec(model="m", revision=world.new, strategy=Strategy.SWAP))
    await world.coordinator.tell_rollout("s", Cancelled())
    await world.settle(2)
    assert world.coordinator.rollouts.find("s").state is State.ABORTED
    assert world.held == {"a": {world.old}, "b": {world.new}}
    world.store.running.clear()
    await world.settle(2)
    assert world.held == {"a": {world.old}, "b": {world.old}}
