"""What is asked of rollouts: what is refused, and what a caller leaves behind who asks at a bad moment."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import ArgumentInvalid, RolloutConflict
from services.controller.core.catalog import Manifest, Revision
from services.controller.core.commands import SendAbort
from services.controller.core.member import Hello, Kind, Ready
from services.controller.core.records import Route
from services.controller.core.rollout_events import Cancelled, Promoted
from services.controller.core.rollout_record import Rollout, Spec, State
from tests.fixtures.rollout_world import World, pair


@pytest.fixture
async def world() -> World:
    """Two workers that serve the old revision."""
    return await pair()


@pytest.mark.parametrize(("tokens", "refused"), [(63, True), (64, False), (65, False)])
async def test_a_shorter_context_is_refused(world: World, tokens: int, *, refused: bool) -> None:
    """Gateways have accepted requests by the one that serves, and workers would refuse some of them."""
    manifest = Manifest("m", "", (), "nf4", "auto", tokens, "t").named()
    world.catalog.register(Revision(manifest, "", 0.0))
    if not refused:
        assert (await world.start(revision=manifest.revision)).state is State.PENDING
        return
    with pytest.raises(ArgumentInvalid, match=r"holds 63 tokens, .* 64, .* model of its own"):
        await world.start(revision=manifest.revision)
    assert world.coordinator.rollouts.current is None


async def test_the_way_back_to_less_context_is_open(world: World) -> None:
    """An update to more of it can be taken back also after it was judged."""
    manifest = Manifest("m", "", (), "nf4", "auto", 65, "t").named()
    world.catalog.register(Revision(manifest, "", 0.0))
    await world.start(revision=manifest.revision, bake_s=0.0)
    await world.settle(2)
    assert world.states[-1] is State.COMPLETED
    with pytest.raises(ArgumentInvalid, match="holds 64 tokens"):
        await world.start(revision=world.new)
    back = await world.coordinator.start_rollout("back", Spec(model="m", revision=world.old))
    assert back.state is State.PENDING


async def test_none_begins_while_the_start_revision_is_loading() -> None:
    """The mesh was started with another revision than the one that serves: the route would go to nobody."""
    world = World()
    manifest = Manifest("m", "", (), "nf4", "auto", 64, "t").named()
    world.catalog.register(Revision(manifest, "", 0.0))
    world.store.route = Route(5, 0, {world.new: 100})
    await world.settle()
    world.lazy = {"a"}
    world.attach("a")
    world.held["a"] = {world.new}
    world.coordinator.hear(world.key("a"), world.workers["a"], Ready(world.new, 0))
    await world.settle(2)
    assert world.route == {world.new: 100}
    with pytest.raises(RolloutConflict, match=f"start revision {world.old} of m is still loading"):
        await world.start(revision=manifest.revision)
    await world.settle(2)
    assert world.route == {world.new: 100}
    assert world.held["a"] == {world.new}
    world.coordinator.hear(world.key("a"), world.workers["a"], Ready(world.old, 0))
    world.held["a"].add(world.old)
    await world.settle(2)
    assert world.route == {world.old: 100}
    world.lazy.clear()
    await world.start(revision=manifest.revision, bake_s=0.0)
    await world.settle(2)
    assert world.rollout.state is State.COMPLETED


async def test_a_load_may_take_as_long_as_the_rollout_allows(world: World) -> None:
    """The controller's own patience, of 600 s, is for what no rollout asks for; a reconnection keeps it."""
    world.lazy = {"b"}
    await world.start(prepare_timeout_s=3_000.0, bake_s=600.0)
    await world.settle(2)
    for _ in range(2):
        world.clock.seconds += 1_000.0
        await world.settle(2)
        residents = world.coordinator.members(Kind.WORKER)[1].residents
        hello = Hello(Kind.WORKER, "b", "again", "h:1", 8, residents=residents)
        world.coordinator.attach(hello, world.workers["b"])
    assert not any(isinstance(command, SendAbort) for _, command in world.told)
    assert world.rollout.state is State.PREPARING
    world.clock.seconds += 1_000.0
    await world.settle(2)
    assert world.rollout.history[-1].cause == "It was not ready within 3000 s."


async def test_one_that_is_asked_for_while_another_ends_follows_that_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replaces the revision that serves by then, and not the one that served when it was asked for."""
    manifest = Manifest("m", "", (), "nf4", "auto", 64, "t").named()
    world.catalog.register(Revision(manifest, "", 0.0))
    await world.start(bake_s=0.0)
    saving, go_on = asyncio.Event(), asyncio.Event()
    save = world.records.save

    async def slowly(rollout: Rollout) -> None:
        if rollout.state is State.COMPLETED:
            saving.set()
            await go_on.wait()
        await save(rollout)

    monkeypatch.setattr(world.records, "save", slowly)
    settling = asyncio.create_task(world.settle(2))
    async with asyncio.timeout(10):
        await saving.wait()
    spec = Spec(model="m", revision=manifest.revision)
    next_one = asyncio.create_task(world.coordinator.start_rollout("next", spec))
    await asyncio.sleep(0)
    go_on.set()
    assert (await next_one).previous == world.new
    await settling


async def test_what_is_on_record_is_obeyed_though_nobody_waits_for_the_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone while its promotion is written has promoted: the old revision stays away."""
    await world.start(bake_s=600.0)
    await world.settle(2)
    saving, save = asyncio.Event(), world.records.save

    async def slowly(rollout: Rollout) -> None:
        saving.set()
        await asyncio.sleep(0.01)
        await save(rollout)

    monkeypatch.setattr(world.records, "save", slowly)
    asking = asyncio.create_task(world.coordinator.tell_rollout("r", Promoted()))
    await saving.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await world.settle(3)
    assert (world.rollout.state, world.route) == (State.COMPLETED, {world.new: 100})
    assert world.held == {"a": {world.new}, "b": {world.new}}


async def test_a_clock_that_goes_back_changes_no_order(world: World) -> None:
    """Records are read in the order of their first time: the earlier one would serve again, unasked."""
    await world.start(bake_s=0.0)
    await world.settle(2)
    assert world.states[-1] is State.COMPLETED
    world.clock.now = lambda: 1_600_000_000.0  # type: ignore[method-assign]
    back = await world.coordinator.start_rollout("back", Spec(model="m", revision=world.old, bake_s=0.0))
    assert back.history[0].time_ms > world.rollout.history[0].time_ms


async def test_a_leader_keeps_no_more_than_the_next_one_would_take(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest ones, and what says which revision serves."""
    monkeypatch.setattr("services.controller.core.rollout_history.HISTORY_MAX", 2)
    await world.start(bake_s=0.0)
    await world.settle(2)
    assert world.rollout.state is State.COMPLETED
    for number in range(4):
        made = await world.coordinator.start_rollout(f"r{number}", Spec(model="m", revision=world.old))
        await world.coordinator.tell_rollout(made.id, Cancelled())
    assert [one.id for one in world.coordinator.rollouts.all] == ["r3", "r2", "r"]
