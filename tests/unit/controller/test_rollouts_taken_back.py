"""The way back of a swap where the old revision cannot be had: what serves is not given up for it."""

from __future__ import annotations

import pytest

from services.controller.core.commands import Command, SendPrepare, SendRetire, SendStage
from services.controller.core.member import Failed
from services.controller.core.membership import RETRY_AFTER_S
from services.controller.core.rollout_events import Promoted, TakenBack
from services.controller.core.rollout_record import Spec, State, Strategy
from tests.fixtures.rollout_world import World

# Until nobody asks for a revision any more that always fails at once.
TRIED_S = sum(RETRY_AFTER_S)
DAMAGED = "model.safetensors: the content is damaged."


async def swapped(workers: str) -> World:
    """A world whose workers have given up the old revision for the new one, which is judged."""
    world = World()
    await world.settle()
    for name in workers:
        world.attach(name)
    await world.settle()
    await world.start(strategy=Strategy.SWAP, bake_s=600.0)
    await world.settle(2)
    assert world.rollout.state is State.BAKING
    assert world.held == {name: {world.new} for name in workers}
    world.told.clear()
    return world


def asked(world: World, command: Command) -> list[str]:
    """The workers that were told this, in order."""
    return [name for name, told in world.told if told == command]


async def take_back(world: World) -> None:
    """The word of an operator, and what follows at once."""
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(2)


@pytest.mark.parametrize("workers", ["a", "ab"])
async def test_what_serves_stays_where_the_old_files_are_gone(workers: str) -> None:
    """Asked for as often as is tried: the new revision was never retired, and the rollout ends with it."""
    world = await swapped(workers)
    world.damaged[world.old] = DAMAGED
    await take_back(world)
    await world.settle(TRIED_S - 5)
    assert world.states[-1] is State.ROLLING_BACK
    assert world.held == {name: {world.new} for name in workers}
    assert not any(record.draining for record in world.store.workers.values())
    await world.settle(10)
    assert world.states[-2:] == [State.ROLLING_BACK, State.COMPLETED]
    assert f"a: {DAMAGED}" in world.rollout.history[-1].cause
    assert asked(world, SendStage("m", world.old, "r")).count("a") == len(RETRY_AFTER_S) + 1
    assert not asked(world, SendRetire(world.new))
    assert world.route == {world.new: 100}
    assert world.held == {name: {world.new} for name in workers}
    # It is what serves from now on, and another rollout may begin.
    assert world.coordinator.plan is not None
    assert world.coordinator.plan.wanted == world.new
    world.damaged.clear()
    await world.coordinator.start_rollout("s", Spec(model="m", revision=world.old, bake_s=0.0))
    await world.settle(3)
    assert world.coordinator.rollouts.find("s").state is State.COMPLETED


async def test_a_passing_cause_does_not_end_the_way_back() -> None:
    """A full disk, say: it is tried again, and what serves is given up when the files are here."""
    world = await swapped("a")
    world.damaged[world.old] = "The disk is full."
    await take_back(world)
    world.damaged.clear()
    await world.settle(6)
    assert world.states[-1] is State.ROLLED_BACK
    assert world.held == {"a": {world.old}}
    order = [
        command
        for _, command in world.told
        if command in (SendRetire(world.new), SendPrepare("m", world.old, "r"))
    ]
    assert order == [SendRetire(world.new), SendPrepare("m", world.old, "r")]


async def test_an_operator_keeps_what_serves() -> None:
    """The files may take hours to be mended, and nobody has to wait for the end of it."""
    world = await swapped("ab")
    world.damaged[world.old] = DAMAGED
    await take_back(world)
    after = await world.coordinator.tell_rollout("r", Promoted())
    assert [one.state for one in after.history[-2:]] == [State.BAKING, State.COMPLETED]
    await world.settle(2)
    assert world.route == {world.new: 100}
    assert world.held == {"a": {world.new}, "b": {world.new}}
    assert not asked(world, SendRetire(world.new))


@pytest.mark.parametrize("kept", [False, True])
async def test_a_worker_comes_back_to_what_it_can_load(*, kept: bool) -> None:
    """The files are whole and the load fails: by itself in the end, or at once by an operator's word."""
    world = await swapped("a")
    world.refuses[world.old] = "It needs more memory than there is."
    await take_back(world)
    assert world.held == {"a": set()}
    if kept:
        await world.coordinator.tell_rollout("r", Promoted())
        await world.settle(2)
    else:
        await world.settle(TRIED_S)
    assert world.states[-1] is State.COMPLETED
    assert world.route == {world.new: 100}
    assert world.held == {"a": {world.new}}
    assert world.store.workers["a"].ready == {world.new}


async def test_another_worker_leads_back_where_the_first_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk alone is full; it serves the new revision until the route has left that."""
    world = await swapped("ab")
    stage = world._stage
    monkeypatch.setattr(
        world,
        "_stage",
        lambda worker_id, revision: (
            stage(worker_id, revision) if worker_id == "b" else Failed(revision, "fetch", "The disk is full.")
        ),
    )
    await take_back(world)
    await world.settle(TRIED_S - 5)
    assert world.held == {"a": {world.new}, "b": {world.new}}
    await world.settle(10)
    assert world.states[-1] is State.ROLLED_BACK
    assert world.route == {world.old: 100}
    assert asked(world, SendRetire(world.new))[0] == "b"


@pytest.mark.parametrize("deadly", ["", "old", "new", "old new"])
async def test_a_rollout_whose_revisions_both_fail_ends(deadly: str) -> None:
    """Nothing serves, and a third one must be able to come; also where loads end the worker's process."""
    world = await swapped("a")
    for name in ("old", "new"):
        if name in deadly:
            world.deadly.add(getattr(world, name))
        else:
            world.refuses[getattr(world, name)] = "It needs more memory than there is."
    await take_back(world)
    await world.settle(2 * TRIED_S + 10)
    assert world.states[-1] is State.ROLLED_BACK
    assert world.rollout.history[-1].cause.startswith("Neither revision can be loaded any more. a: It")


async def test_a_rollout_ends_where_its_only_worker_comes_back_with_neither() -> None:
    """It was judged beside the old revision; what loaded before does not any more, whichever it is."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    await world.start(strategy=Strategy.SIDE_BY_SIDE, bake_s=5.0)
    await world.settle(1)
    assert world.states[-1] is State.BAKING
    world.kill("a")
    world.refuses = dict.fromkeys((world.old, world.new), "It needs more memory than there is.")
    world.attach("a")
    await world.settle(2 * TRIED_S)
    assert world.states[-2:] == [State.ROLLING_BACK, State.ROLLED_BACK]
    assert world.rollout.history[-2].cause == "a: It needs more memory than there is."
    assert world.rollout.history[-1].cause.startswith("Neither revision can be loaded any more. a: It")
