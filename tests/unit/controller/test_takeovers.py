"""What a new leader finds, and what the old one still does: rollouts over the end of a time of leading."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.common.errors import RevisionInUse, StoreUnavailable
from services.controller.adapters.file_rollouts import FileRolloutRecords
from services.controller.core.member import Hello, Kind
from services.controller.core.ports import FenceStale
from services.controller.core.records import KnownMembers, Route
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_events import Cancelled, Paused, Resumed
from services.controller.core.rollout_record import Rollout, Spec, State, Strategy, create
from tests.fakes.controller_ports import FakeStream, MemoryLead, MemoryRolloutRecords, MemoryRouteStore
from tests.fixtures.rollout_world import World, heir_of, pair


def come(world: World, name: str, *, ready: bool) -> None:
    """A worker attaches again, with the old revision and perhaps the new one."""
    stream = FakeStream()
    world.workers[name], world.heard[name] = stream, 0
    world.held[name] = {world.old, world.new} if ready else {world.old}
    residents = {revision: Resident(Phase.ACTIVE) for revision in world.held[name]}
    world.coordinator.attach(Hello(Kind.WORKER, name, "i0", "h:1", 8, (), residents), stream)


async def test_the_first_worker_that_comes_back_is_not_the_fleet() -> None:
    """All were to be ready: one that is, while the other is not back yet, does not switch the route."""
    world = await pair()
    world.lazy = {"b"}
    await world.start(bake_s=600.0)
    await world.settle(3)
    heir = heir_of(world)
    await heir.settle()
    come(heir, "a", ready=True)
    await heir.settle(2)
    assert (heir.rollout.state, heir.route) == (State.PREPARING, {world.old: 100})
    come(heir, "b", ready=False)
    heir.lazy = {"b"}
    await heir.settle(2)
    assert heir.rollout.state is State.PREPARING
    heir.lazy = set()
    come(heir, "b", ready=True)
    await heir.settle(2)
    assert (heir.rollout.state, heir.route) == (State.BAKING, {world.new: 100})


async def test_an_operators_word_does_not_make_the_first_one_the_fleet() -> None:
    """It is taken, and what follows waits for the others: one of two that is ready would stand for all."""
    world = await pair()
    world.lazy = {"b"}
    await world.start(bake_s=600.0)
    await world.settle(3)
    await world.coordinator.tell_rollout("r", Paused())
    heir = heir_of(world)
    await heir.settle()
    come(heir, "a", ready=True)
    await heir.settle(2)
    assert not (await heir.coordinator.tell_rollout("r", Resumed())).paused
    await heir.settle(2)
    assert (heir.rollout.state, heir.route) == (State.PREPARING, {world.old: 100})
    come(heir, "b", ready=True)
    await heir.settle(2)
    assert (heir.rollout.state, heir.route) == (State.BAKING, {world.new: 100})


async def test_what_is_cancelled_ends_when_those_who_prepare_it_are_back() -> None:
    """An empty fleet has nothing left of it; the workers have, and it ends when they have not."""
    world = await pair()
    world.lazy = {"a", "b"}
    await world.start()
    await world.settle(3)
    heir = heir_of(world)
    await heir.settle()
    await heir.coordinator.tell_rollout("r", Cancelled())
    await heir.settle(2)
    assert heir.states[-1:] == [State.ABORTING]
    for name in "ab":
        come(heir, name, ready=True)
    await heir.settle(2)
    assert heir.states[-1:] == [State.ABORTED]
    assert heir.held == {"a": {world.old}, "b": {world.old}}


async def test_who_was_there_is_read_when_the_store_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It went away between the records and the members; without them nobody would be waited for, or all."""
    world = await pair()
    await world.start(bake_s=600.0)
    heir = heir_of(world)
    read, asked = heir.store.read_members, 0

    async def lost_once(model: str) -> KnownMembers:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise StoreUnavailable("The store is away.")
        return await read(model)

    monkeypatch.setattr(heir.store, "read_members", lost_once)
    await heir.settle()
    for name in "ab":
        come(heir, name, ready=True)
    await heir.settle(2)
    assert asked == 2
    assert heir.rollout.state is State.BAKING


async def test_gateways_are_waited_for_as_well() -> None:
    """One that has not fetched the tokenizer yet may only be on its way back."""
    world = await pair()
    world.lazy = {"b"}
    await world.start(bake_s=600.0)
    await world.settle(3)
    world.store.gateways = {"g"}
    heir = heir_of(world)
    await heir.settle()
    come(heir, "a", ready=True)
    come(heir, "b", ready=True)
    await heir.settle(2)
    assert heir.states[-1] is State.PREPARING
    heir.attach_gateway("g", "x")
    await heir.settle(2)
    assert heir.rollout.state is State.BAKING


async def test_nobody_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was there and does not come back in two of its leases is gone."""
    world = await pair()
    await world.start(bake_s=600.0)
    heir = heir_of(world)
    monkeypatch.setattr(heir.coordinator.reunion, "_patience_s", 10.0)
    await heir.settle()
    come(heir, "a", ready=True)
    await heir.settle(9)
    assert heir.states[-1] is State.PENDING
    await heir.settle(2)
    assert heir.rollout.state is State.BAKING


async def test_who_was_lost_while_nobody_led_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no lease that could run out with the new leader; one that came late is as it says."""
    world = await pair()
    world.attach("c")
    await world.settle()
    assert set(world.store.workers) == {"a", "b", "c"}
    heir = heir_of(world)
    monkeypatch.setattr(heir.coordinator.reunion, "_patience_s", 10.0)
    await heir.settle()
    come(heir, "a", ready=False)
    await heir.settle(9)
    assert set(world.store.workers) == {"a", "b", "c"}
    come(heir, "b", ready=False)
    await heir.settle(2)
    assert set(world.store.workers) == {"a", "b"}
    come(heir, "c", ready=False)
    await heir.settle(1)
    assert set(world.store.workers) == {"a", "b", "c"}


async def test_nobody_leads_back_for_want_of_records() -> None:
    """Requests go to a revision that no record here names, and some may be where nobody can look now."""
    world = await pair()
    await world.start(bake_s=0.0)
    await world.settle(2)
    assert world.route == {world.new: 100}
    heir = World(world.store, MemoryRolloutRecords())
    heir.records.is_partial = True
    with capture_logs() as lines:
        await heir.settle()
    assert not heir.coordinator.led.is_set()
    assert heir.route == {world.new: 100}
    (line,) = (line for line in lines if line["event"] == "store.lost")
    assert "share data_dir" in line["reason"]
    knowing = World(world.store, world.records)
    knowing.records.is_partial = True
    await knowing.settle()
    assert knowing.coordinator.led.is_set()


@pytest.mark.parametrize("state", [State.COMPLETED, State.BAKING])
async def test_nobody_leads_back_while_a_revision_cannot_be_looked_up(state: State) -> None:
    """The artifacts' URL is away, and what serves is not cached here; when it is back everything goes on."""
    world = await pair()
    await world.start(bake_s=0.0 if state is State.COMPLETED else 600.0)
    await world.settle(2)
    assert (world.rollout.state, world.route) == (state, {world.new: 100})
    heir = heir_of(world, without=world.new)
    heir.catalog.is_partial = True
    with capture_logs() as lines:
        await heir.settle(3)
    assert not heir.coordinator.led.is_set()
    (line,) = (line for line in lines if line["event"] == "store.lost")
    assert f"revision {world.new} serves" in line["reason"]
    assert (heir.rollout.state, heir.route) == (state, {world.new: 100})
    heir.catalog.register(world.catalog.revision("m", world.new))
    heir.catalog.is_partial = False
    await heir.settle(3)
    assert heir.coordinator.led.is_set()
    assert (heir.rollout.state, heir.route) == (state, {world.new: 100})


async def test_a_rollout_whose_revision_turns_out_to_be_gone_ends_with_the_next_term() -> None:
    """Nobody could look when its record was read."""
    world = await pair()
    await world.start(bake_s=600.0)
    await world.settle(2)
    heir = heir_of(world, without=world.new)
    heir.catalog.is_partial = True
    await heir.settle()
    heir.catalog.is_partial = False
    await heir.settle(2)
    assert not heir.coordinator.led.is_set()
    later = heir_of(heir, without=world.new)
    await later.settle(2)
    assert later.coordinator.led.is_set()
    assert later.rollout.history[-1].cause == f"The revision {world.new} is not registered any more."


async def test_of_two_that_are_under_way_the_later_one_goes_on() -> None:
    """A leader did not know of the first one, for its record was out of reach then."""
    world = await pair()
    for id_ in ("first", "r"):
        made = create(id_, Spec(model="m", revision=world.new, bake_s=600.0), world.old, len(id_), world.old)
        world.records.records[id_] = made
    heir = heir_of(world)
    await heir.settle()
    assert heir.coordinator.rollouts.find("first").history[-1].state is State.ABORTED
    assert "did not know" in heir.coordinator.rollouts.find("first").history[-1].cause
    current = heir.coordinator.rollouts.current
    assert current is not None
    assert current.id == "r"


async def test_one_that_was_followed_by_another_has_no_say() -> None:
    """Its leader died, and the next one, which did not know of it, led another one to its end."""
    world = await pair()
    await world.start(bake_s=0.0)
    await world.settle(2)
    assert world.rollout.state is State.COMPLETED
    made = create("lost", Spec(model="m", revision=world.new, bake_s=600.0), world.old, 1, world.old)
    world.records.records = {made.id: made, **world.records.records}
    heir = heir_of(world)
    await heir.settle()
    assert heir.coordinator.rollouts.current is None
    assert heir.coordinator.rollouts.find("lost").state is State.ABORTED
    assert heir.route == {world.new: 100}


async def test_auto_is_not_decided_before_anybody_is_there() -> None:
    """Two copies do not fit; an empty fleet would not object to them."""
    world = await pair(weights_bytes=60, memory_bytes=100)
    await world.start(strategy=Strategy.AUTO)
    heir = heir_of(world, weights_bytes=60)
    await heir.settle()
    for name in "ab":
        heir.attach(name, 100)
    await heir.settle()
    assert heir.rollout.strategy is Strategy.SWAP


async def test_a_rollout_to_a_revision_that_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was damaged on disk, perhaps: nobody can lead it on, and the mesh serves what it served."""
    world = await pair()
    await world.start(bake_s=600.0)
    await world.settle(2)
    assert world.rollout.state is State.BAKING
    heir = heir_of(world, without=world.new)
    await heir.settle()
    assert heir.states[-2:] == [State.ROLLING_BACK, State.ROLLED_BACK]
    assert "is not registered any more" in heir.rollout.history[-1].cause
    for name in "ab":
        heir.attach(name)
    await heir.settle(2)
    assert heir.route == {world.old: 100}
    monkeypatch.undo()


async def test_what_serves_is_registered() -> None:
    """A rollout that completed names what serves, unless that is gone."""
    world = await pair()
    await world.start(bake_s=0.0)
    await world.settle(3)
    assert world.rollout.state is State.COMPLETED
    heir = heir_of(world, without=world.new)
    await heir.settle()
    assert heir.coordinator.plan is not None
    assert heir.coordinator.plan.wanted == world.old
    heir.attach("c")
    await heir.settle()
    assert heir.held["c"] == {world.old}


async def test_a_revision_is_used_while_its_rollout_is_made() -> None:
    """The record takes its time; a delete in between would leave a rollout to nothing."""
    world = await pair()
    gate, save = asyncio.Event(), world.records.save

    async def slow(rollout: Rollout) -> None:
        await gate.wait()
        await save(rollout)

    world.records.save = slow  # type: ignore[method-assign]
    making = asyncio.create_task(world.start())
    await asyncio.sleep(0)
    with pytest.raises(RevisionInUse):
        world.coordinator.check_unused("m", world.new)
    gate.set()
    await making
    with pytest.raises(RevisionInUse):
        world.coordinator.check_unused("m", world.new)


class SlowDisk:
    """A disk that writes nothing down while it is held, and says when somebody waits for it."""

    def __init__(self) -> None:
        self.free, self.asked = threading.Event(), threading.Event()
        self.free.set()
        self._sync = os.fsync

    def fsync(self, descriptor: int) -> None:
        """See `os.fsync`."""
        self.asked.set()
        assert self.free.wait(30)
        self._sync(descriptor)

    def hold(self) -> None:
        """Whoever writes from now on waits for its release."""
        self.free.clear()
        self.asked.clear()

    async def cancel(self, call: asyncio.Task[Any]) -> None:
        """Cancels a call that waits for the disk: it ends once the disk has gone on, and not before."""
        assert await asyncio.to_thread(self.asked.wait, 30)
        call.cancel()
        ended, _ = await asyncio.wait({call}, timeout=0.1)
        self.free.set()
        assert not ended, "its write is still under way"
        with pytest.raises(asyncio.CancelledError):
            await call


async def on_a_slow_disk(world: World, directory: Path, patch: pytest.MonkeyPatch) -> SlowDisk:
    """Gives a world records in files, on a disk that takes its time."""
    records, disk = FileRolloutRecords(directory), SlowDisk()
    await records.claim("m", 1)
    world.coordinator.rollouts._records = records
    patch.setattr(os, "fsync", disk.fsync)
    return disk


async def test_a_caller_that_goes_away_leaves_no_ghost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk and what is known are the same, whenever the call was cancelled."""
    world = await pair()
    disk = await on_a_slow_disk(world, tmp_path, monkeypatch)
    disk.hold()
    made = asyncio.create_task(world.coordinator.start_rollout("r", Spec(model="m", revision=world.new)))
    await disk.cancel(made)
    claimed = await FileRolloutRecords(tmp_path).claim("m", 9)
    assert world.coordinator.rollouts.all == claimed.rollouts
    assert len(claimed.rollouts) == 1


async def test_a_caller_that_goes_away_deposes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its write ends before the next one begins."""
    world = await pair()
    disk = await on_a_slow_disk(world, tmp_path, monkeypatch)
    await world.coordinator.start_rollout("r", Spec(model="m", revision=world.new))
    world.lazy = {"a", "b"}
    await world.coordinator.keep_store()
    disk.hold()
    told = asyncio.create_task(world.coordinator.tell_rollout("r", Paused()))
    await disk.cancel(told)
    await world.coordinator.tell_rollout("r", Paused())
    assert not world.coordinator.deposed.is_set()
    assert world.rollout.paused


async def test_a_worker_that_breaks_off_while_it_is_relieved_is_asked_later() -> None:
    """Its stream ends between the store's consent and the word to it."""
    world = await pair()
    await world.start(bake_s=0.0)
    unready, broken = world.store.unready, set()

    async def breaking(
        model: str, worker_id: str, revision: str, fence: int, *, routed: bool = False
    ) -> bool:
        consent = await unready(model, worker_id, revision, fence, routed=routed)
        if consent and worker_id not in broken:
            broken.add(worker_id)
            world.coordinator.detach(world.key(worker_id), world.workers.pop(worker_id), farewell=False)
        return consent

    world.store.unready = breaking  # type: ignore[method-assign]
    await world.settle(3)
    assert broken == {"a", "b"}
    for name in sorted(broken):
        come(world, name, ready=True)
    await world.settle(3)
    assert world.held == {"a": {world.new}, "b": {world.new}}


async def test_a_number_that_a_member_told_is_backed_before_it_is_used() -> None:
    """A stale leader that hears of its successor's number must not write with one above it."""

    class Fenced(MemoryRouteStore):
        def _check(self, fence: int | None = None) -> None:
            super()._check()
            known = max(self.led_with, self.route.fence if self.route else 0)
            if fence is not None and fence < known:
                raise FenceStale

    store = Fenced()
    stale = await pair(store)
    successor = MemoryLead(store, "successor").grant()
    assert store.route is not None
    switched = store.route = Route(store.route.epoch + 1, successor, {stale.new: 100})
    read = store.read_route

    async def met(model: str) -> Route | None:
        stored = await read(model)
        hello = Hello(Kind.WORKER, "c", "y", "h:2", 8, (), {}, 0, successor)
        stale.coordinator.attach(hello, FakeStream())
        return stored

    store.read_route = met  # type: ignore[method-assign]
    await stale.coordinator.keep_store(renew=False)
    assert store.route == switched
    assert stale.coordinator.deposed.is_set()
