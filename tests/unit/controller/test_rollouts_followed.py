"""The coordinator follows rollouts: members, route and records in memory, and a clock that stands still."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.common.errors import (
    ArgumentInvalid,
    RevisionInUse,
    RevisionUnknown,
    RolloutConflict,
    RolloutRefused,
    RolloutUnknown,
    StoreUnavailable,
)
from services.controller.coordinator import rounds
from services.controller.core import rollout_fleet
from services.controller.core.catalog import Manifest, Revision
from services.controller.core.commands import SendAbort, SendActivate, SendPrepare, SendRetire, SendStage
from services.controller.core.member import Goal, Kind, Progress, Retired, Staged
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_events import Cancelled, Paused, Promoted, Resumed, TakenBack
from services.controller.core.rollout_record import Spec, State, Strategy
from tests.fixtures.rollout_world import World


@pytest.fixture
async def world() -> World:
    """Two workers that serve the old revision."""
    world = World()
    await world.settle()
    world.attach("a")
    world.attach("b")
    await world.settle()
    assert world.route == {world.old: 100}
    return world


SIDE_BY_SIDE = [
    State.PENDING,
    State.PREPARING,
    State.READY,
    State.SWITCHING,
    State.BAKING,
    State.COMPLETED,
]


async def test_side_by_side_switches_and_retires_the_old_revision(world: World) -> None:
    """Both are held until the end of the judgement; then the old one's memory is free."""
    await world.start()
    await world.settle()
    assert world.rollout.state is State.BAKING
    assert world.route == {world.new: 100}
    assert world.held == {"a": {world.old, world.new}, "b": {world.old, world.new}}
    await world.settle(6)
    assert world.states == SIDE_BY_SIDE
    assert world.held == {"a": {world.new}, "b": {world.new}}
    assert world.store.workers["a"].ready == {world.new}


async def test_nothing_is_retired_while_requests_run_on_it(world: World) -> None:
    """The old revision goes when its last request has ended."""
    world.store.running.add(("a", world.old))
    await world.start(bake_s=0.0)
    await world.settle(2)
    assert world.held == {"a": {world.old, world.new}, "b": {world.new}}
    world.store.running.clear()
    await world.settle(2)
    assert world.held["a"] == {world.new}


async def test_workers_know_no_epoch_before_the_store_has_it(world: World) -> None:
    """Else they would refuse what the route of that moment grants."""
    seen: list[tuple[int, int]] = []
    await world.start()
    for _ in range(12):
        await world.coordinator.keep_store()
        world._act()
        assert world.store.route is not None
        epochs = [command.epoch for _, command in world.told if isinstance(command, SendActivate)]
        seen.append((max(epochs), world.store.route.epoch))
    assert all(told <= stored for told, stored in seen)
    assert seen[-1][0] == seen[-1][1]


async def test_a_canary_gets_its_share_until_it_is_promoted(world: World) -> None:
    """10 % go to the new revision, then all."""
    await world.start(canary_percent=10, bake_s=600.0)
    await world.settle(3)
    assert world.route == {world.new: 10, world.old: 90}
    await world.coordinator.tell_rollout("r", Promoted())
    await world.settle()
    assert world.route == {world.new: 100}
    assert world.rollout.state is State.COMPLETED


async def test_what_is_held_waits_for_its_operator(world: World) -> None:
    """Its judging does not end meanwhile; once it goes on it ends, and takes no such word any more."""
    await world.start(canary_percent=10, bake_s=5.0)
    await world.settle()
    await world.coordinator.tell_rollout("r", Paused())
    await world.settle(60)
    assert (world.states[-1], world.rollout.paused) == (State.BAKING, True)
    assert world.route == {world.new: 10, world.old: 90}
    await world.coordinator.tell_rollout("r", Resumed())
    await world.settle()
    assert (world.rollout.state, world.rollout.paused) == (State.COMPLETED, False)
    assert world.route == {world.new: 100}
    with pytest.raises(RolloutRefused):
        await world.coordinator.tell_rollout("r", Paused())


async def test_what_is_held_goes_back_when_told(world: World) -> None:
    """The word that it goes back does not wait for another one."""
    await world.start(bake_s=600.0)
    await world.settle()
    await world.coordinator.tell_rollout("r", Paused())
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(1)
    assert world.states[-2:] == [State.ROLLING_BACK, State.ROLLED_BACK]


async def test_an_operator_takes_it_back(world: World) -> None:
    """The old revision gets everything again, and the new one goes."""
    await world.start(bake_s=600.0)
    await world.settle()
    await world.coordinator.tell_rollout("r", TakenBack())
    await world.settle(1)
    assert world.states[-2:] == [State.ROLLING_BACK, State.ROLLED_BACK]
    assert world.route == {world.old: 100}
    assert world.held == {"a": {world.old}, "b": {world.old}}


async def test_a_failed_preparation_aborts_with_its_cause(world: World) -> None:
    """The old revision never stops serving, and a later attempt begins afresh."""
    world.refuses[world.new] = "The weights are not finite."
    await world.start()
    await world.settle(1)
    assert world.rollout.state is State.ABORTED
    assert "not finite" in world.rollout.history[-1].cause
    assert world.route == {world.old: 100}
    world.refuses.clear()
    spec = Spec(model="m", revision=world.new, bake_s=0.0)
    await world.coordinator.start_rollout("again", spec)
    await world.settle(1)
    assert world.coordinator.rollouts.find("again").state is State.COMPLETED


async def test_a_preparation_that_takes_too_long_is_aborted(world: World) -> None:
    """A worker that never gets ready is told to stop."""
    world.lazy = {"a"}
    await world.start(prepare_timeout_s=3.0)
    await world.settle(5)
    assert world.states == [State.PENDING, State.PREPARING, State.ABORTING, State.ABORTED]
    assert ("a", SendAbort(world.new)) in world.told
    assert world.held["b"] == {world.old}


async def test_cancelling_while_it_prepares(world: World) -> None:
    """The operator's word ends it before the switch."""
    world.lazy = {"a"}
    await world.start()
    await world.settle()
    await world.coordinator.tell_rollout("r", Cancelled())
    await world.settle()
    assert world.rollout.state is State.ABORTED
    assert world.route == {world.old: 100}


@pytest.mark.parametrize("workers", [1, 2])
async def test_swap_replaces_one_worker_after_the_other(workers: int) -> None:
    """Never two copies in one worker, and never a worker that gives up before the last one serves."""
    world = World()
    await world.settle()
    for name in "ab"[:workers]:
        world.attach(name)
    await world.settle()
    world.store.running.add(("a", world.old))
    await world.start(strategy=Strategy.SWAP, bake_s=0.0)
    await world.settle(1)
    # It ends what it runs, and gets nothing new.
    assert world.store.workers["a"].draining
    assert world.held["a"] == {world.old}
    world.store.running.clear()
    most = 0
    for _ in range(4):
        await world.settle(1)
        most = max(most, *(len(held) for held in world.held.values()))
    assert most == 1
    assert world.rollout.state is State.COMPLETED
    assert all(held == {world.new} for held in world.held.values())
    assert not any(record.draining for record in world.store.workers.values())
    order = [(name, type(command)) for name, command in world.told if isinstance(command, SendRetire)]
    assert order == [(name, SendRetire) for name in "ab"[:workers]]


async def test_a_swap_begins_when_every_worker_has_the_files() -> None:
    """Until then both serve the old revision; and nobody is told to load what others may not get."""
    world = World()
    await world.settle()
    world.attach("a")
    world.attach("b")
    await world.settle()
    world.slow = {"b"}
    await world.start(strategy=Strategy.SWAP, bake_s=0.0)
    await world.settle(3)
    assert world.held == {"a": {world.old}, "b": {world.old}}
    assert not any(record.draining for record in world.store.workers.values())
    assert ("a", SendStage("m", world.new, "r")) in world.told
    world.coordinator.hear(world.key("b"), world.workers["b"], Staged(world.new))
    await world.settle(4)
    assert world.rollout.state is State.COMPLETED
    assert world.held == {"a": {world.new}, "b": {world.new}}


async def swapping(world: World) -> None:
    """A worker that is out of the line for a swap, and still runs a request on the old revision."""
    await world.settle()
    world.attach("a")
    await world.settle()
    world.store.running.add(("a", world.old))
    await world.start(strategy=Strategy.SWAP)
    await world.settle()
    assert world.store.workers["a"].draining
    assert rounds.drains(world.coordinator)


async def test_a_worker_loads_as_soon_as_it_has_unloaded() -> None:
    """Requests wait meanwhile: it is told by the word that the old one is gone, not by the next tick."""
    world = World()
    await swapping(world)
    world.store.running.clear()
    await world.coordinator.keep_store()
    stream = world.workers["a"]
    assert SendRetire(world.old) in stream.sent
    assert SendPrepare("m", world.new, "r") not in stream.sent
    world.coordinator.hear(world.key("a"), stream, Retired(world.old))
    assert SendPrepare("m", world.new, "r") in stream.sent


async def test_a_worker_out_of_the_line_is_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait meanwhile: it is told to unload when its last request has ended, not at the next tick."""
    world = World()
    await swapping(world)
    monkeypatch.setattr(rounds, "TICK_S", 600.0)
    stream = world.workers["a"]
    running = asyncio.create_task(rounds.run(world.coordinator, world.clock))
    try:
        await asyncio.sleep(2 * rounds.DRAIN_LOOK_S)
        assert SendRetire(world.old) not in stream.sent
        world.store.running.clear()
        async with asyncio.timeout(30):
            while SendRetire(world.old) not in stream.sent:  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_swap_to_damaged_files_ends_before_anybody_gave_up_what_serves() -> None:
    """The cause is the worker's; no worker was told to unload, and what was staged is forgotten."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    world.damaged[world.new] = "model.safetensors: the content is damaged."
    await world.start(strategy=Strategy.SWAP)
    await world.settle(3)
    assert world.rollout.state is State.ABORTED
    assert world.rollout.history[-1].cause == "a: model.safetensors: the content is damaged."
    assert not any(isinstance(command, SendRetire) for _, command in world.told)
    assert not world.store.workers["a"].draining
    world.coordinator.check_unused("m", world.new)


async def asked_of(old: Phase, new: Phase) -> tuple[World, Goal]:
    """What is asked of the only worker of a swap while the route leads to the old revision."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    await world.start(strategy=Strategy.SWAP)
    world.slow = {"a"}
    await world.settle()
    residents = {world.old: Resident(old), world.new: Resident(new)}
    member = replace(world.coordinator.members(Kind.WORKER)[0], residents=residents)
    return world, rollout_fleet.goal(world.rollout, member, ((world.old, 100),), 7)


@pytest.mark.parametrize("phase", [Phase.STAGING, Phase.PREPARING, Phase.ABORTING, Phase.RETIRING])
async def test_a_worker_goes_on_serving_whatever_becomes_of_the_other(phase: Phase) -> None:
    """Files take no memory, and a load that nobody asked for any more is stopped: what serves stays."""
    world, asked = await asked_of(Phase.ACTIVE, phase)
    assert asked.holds.keys() == {world.old}
    assert not asked.quiet
    assert asked.stages == {world.new}


@pytest.mark.parametrize("leaving", [Phase.ABORTING, Phase.RETIRING])
@pytest.mark.parametrize("other", [Phase.PREPARING, Phase.ACTIVE, Phase.RETIRING, Phase.ABORTING])
async def test_a_worker_loads_nothing_beside_what_still_takes_memory(leaving: Phase, other: Phase) -> None:
    """What shall serve is on its way out itself: it is out of the line until the other one has gone."""
    _, asked = await asked_of(leaving, other)
    assert (set(asked.holds), asked.quiet) == (set(), True)


async def test_a_swap_that_fails_loads_the_old_revision_again() -> None:
    """Nothing is lost but time."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    world.refuses[world.new] = "no"
    await world.start(strategy=Strategy.SWAP)
    await world.settle(3)
    assert world.rollout.state is State.ABORTED
    assert world.held == {"a": {world.old}}
    assert world.store.workers["a"].ready == {world.old}


@pytest.mark.parametrize(
    ("memory_bytes", "process_bytes", "taken"),
    [
        # The memory is a graphics card's, of which the process takes none.
        (2_000, 10, Strategy.SWAP),
        # The process has libraries and a KV cache, which are no weights.
        (4_000, 3_900, Strategy.SIDE_BY_SIDE),
    ],
)
async def test_auto_takes_swap_where_two_copies_do_not_fit(
    memory_bytes: int, process_bytes: int, taken: Strategy
) -> None:
    """By the memory that workers have for weights, and by weights alone: each revision's take 1,000 bytes."""
    world = World(weights_bytes=1_000)
    await world.settle()
    world.attach("a", memory_bytes, process_bytes)
    await world.settle()
    await world.start(bake_s=0.0)
    await world.settle(3)
    assert world.rollout.strategy is taken
    assert world.rollout.state is State.COMPLETED


async def test_a_worker_that_dies_of_a_load_ends_the_rollout(world: World) -> None:
    """As where the kernel ends it for want of memory: a restarted one is not made to try that again."""
    world.lazy = {"a"}
    await world.start()
    await world.settle()
    world.coordinator.hear(world.key("a"), world.workers["a"], Progress(world.new, "load", 1, 2))
    world.kill("a")
    world.lazy = set()
    world.attach("a")
    await world.settle(3)
    assert world.rollout.state is State.ABORTED
    assert world.rollout.history[-1].cause.startswith("a: Its process ended while it loaded the revision")
    assert world.held == {"a": {world.old}, "b": {world.old}}


async def test_a_worker_that_comes_in_the_middle_holds_what_it_must(world: World) -> None:
    """It learns the route's epoch with its first word, and serves what is routed."""
    await world.start(bake_s=600.0)
    await world.settle()
    world.kill("a")
    world.attach("c")
    await world.settle(1)
    assert world.held["c"] == {world.old, world.new}
    assert world.store.workers["c"].ready == {world.old, world.new}


async def test_all_workers_die_while_it_prepares(world: World) -> None:
    """Those that come back go on with it."""
    world.lazy = {"a", "b"}
    await world.start()
    await world.settle()
    world.kill("a")
    world.kill("b")
    await world.settle(2)
    assert world.states == [State.PENDING, State.PREPARING]
    world.lazy = set()
    world.attach("a")
    await world.settle(1)
    assert world.states[-1] is State.BAKING
    assert world.route == {world.new: 100}


@pytest.mark.parametrize("died_in", [State.PENDING, State.PREPARING, State.BAKING, State.COMPLETED])
async def test_the_next_controller_goes_on(world: World, died_in: State) -> None:
    """From the record and the store alone; a completed one stays, though the mesh began with the other."""
    if died_in is State.PREPARING:
        world.lazy = {"a", "b"}
    await world.start(bake_s=5.0)
    if died_in is not State.PENDING:
        await world.settle(6 if died_in is State.COMPLETED else 0)
    assert world.rollout.state is died_in
    later = World(world.store, world.records)
    later.clock.seconds = world.clock.seconds
    await later.settle()
    for name in "ab":
        later.attach(name)
    await later.settle(7)
    assert later.rollout.state is State.COMPLETED
    assert later.route == {later.new: 100}
    assert later.held == {"a": {later.new}, "b": {later.new}}


async def test_what_the_mesh_is_started_with_counts(world: World) -> None:
    """A rollout to and from a revision does not take its place in a mesh that is started with it."""
    await world.start(bake_s=0.0)
    await world.settle(2)
    back = Spec(model="m", revision=world.old, bake_s=0.0)
    await world.coordinator.start_rollout("back", back)
    await world.settle(2)
    assert world.route == {world.old: 100}
    conductor = world.coordinator.rollouts
    assert conductor.serving(world.old, None) == world.old
    assert conductor.serving(world.new, None) == world.new
    await world.coordinator.start_rollout("again", Spec(model="m", revision=world.new, bake_s=0.0))
    await world.settle(2)
    assert conductor.serving(world.old, None) == world.new


async def test_an_emptied_store_gets_the_rollouts_route_back(world: World) -> None:
    """Redis restarted empty in the middle."""
    await world.start(canary_percent=10, bake_s=600.0)
    await world.settle()
    world.store.clear()
    await world.settle()
    assert world.route == {world.new: 10, world.old: 90}
    assert world.store.workers["a"].ready == {world.old, world.new}


async def test_what_cannot_be_asked(world: World) -> None:
    """Each refusal says why."""
    with pytest.raises(RevisionInUse):
        await world.start(revision=world.old)
    with pytest.raises(RevisionUnknown):
        await world.start(revision="nope")
    foreign = Manifest("m", "", (), "int8", "auto", 64, "other").named()
    world.catalog.register(Revision(foreign, "", 0.0))
    with pytest.raises(ArgumentInvalid, match="tokenizer"):
        await world.start(revision=foreign.revision)
    with pytest.raises(RolloutUnknown):
        await world.coordinator.tell_rollout("nope", Cancelled())
    world.records.writable = False
    with pytest.raises(StoreUnavailable):
        await world.start()
    world.records.writable = True
    await world.start()
    with pytest.raises(RolloutConflict, match="r of m is PENDING"):
        await world.start()
    await world.settle(6)
    with pytest.raises(RolloutRefused, match="COMPLETED"):
        await world.coordinator.tell_rollout("r", TakenBack())


async def test_nothing_is_done_that_is_not_on_record(world: World) -> None:
    """While records cannot be written the rollout stands still, and goes on afterwards."""
    await world.start()
    world.records.writable = False
    await world.settle(3)
    assert world.route == {world.old: 100}
    world.records.writable = True
    await world.settle(7)
    assert world.rollout.state is State.COMPLETED
