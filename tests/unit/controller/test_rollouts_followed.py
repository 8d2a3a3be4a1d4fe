"""The coordinator follows rollouts: members, route and records in memory, and a clock that stands still."""

from __future__ import annotations

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
from services.controller.coordinator import TICK_S, Coordinator, MemberKey
from services.controller.core.catalog import Catalog, Manifest, ModelFile, Revision
from services.controller.core.commands import Command, SendAbort, SendActivate, SendPrepare, SendRetire
from services.controller.core.member import (
    Activated,
    Device,
    Failed,
    Hello,
    Kind,
    Load,
    LoadReport,
    Ready,
    Report,
    Retired,
)
from services.controller.core.rollout_events import Cancelled, Promoted, TakenBack
from services.controller.core.rollout_record import Rollout, Spec, State, Strategy
from tests.fakes.controller_ports import FakeClock, FakeStream, MemoryRolloutRecords, MemoryRouteStore

OLD, NEW = "none", "int8"


class World:
    """A coordinator with two revisions, and workers that do at once what they are told."""

    def __init__(
        self,
        store: MemoryRouteStore | None = None,
        records: MemoryRolloutRecords | None = None,
        weights_bytes: int = 0,
    ) -> None:
        self.catalog = Catalog()
        self.names: dict[str, str] = {}
        files = (ModelFile("model.safetensors", weights_bytes, ""),)
        for quantization in (OLD, NEW):
            manifest = Manifest("m", "", files, quantization, "auto", 64, "t").named()
            self.names[quantization] = manifest.revision
            self.catalog.register(Revision(manifest, "", 0.0))
        self.old, self.new = self.names[OLD], self.names[NEW]
        self.store = store or MemoryRouteStore()
        self.records = records or MemoryRolloutRecords()
        self.clock = FakeClock()
        self.coordinator = Coordinator(
            self.catalog, self.store, self.records, self.clock, lease_ttl_s=1e6, prepare_timeout_s=600.0
        )
        self.workers: dict[str, FakeStream] = {}
        self.held: dict[str, set[str]] = {}
        self.heard: dict[str, int] = {}
        self.gateways: set[str] = set()
        self.told: list[tuple[str, Command]] = []
        self.refuses: dict[str, str] = {}
        self.lazy: set[str] = set()

    def attach(self, worker_id: str, memory_bytes: int = 0) -> None:
        """Attaches a worker; it is a new process."""
        stream = FakeStream()
        devices = (Device("cpu", "c", memory_bytes),) if memory_bytes else ()
        self.workers[worker_id], self.held[worker_id], self.heard[worker_id] = stream, set(), 0
        incarnation = f"i{len(self.told)}"
        self.coordinator.attach(Hello(Kind.WORKER, worker_id, incarnation, "h:1", 8, devices), stream)
        load = Load(slots=8, memory_bytes=memory_bytes // 2)
        self.coordinator.hear(MemberKey(Kind.WORKER, worker_id), stream, LoadReport(load))

    def attach_gateway(self, gateway_id: str, incarnation: str) -> None:
        """Attaches a gateway, which does what it is told as workers do."""
        stream = FakeStream()
        self.gateways.add(gateway_id)
        self.workers[gateway_id], self.held[gateway_id], self.heard[gateway_id] = stream, set(), 0
        self.coordinator.attach(Hello(Kind.GATEWAY, gateway_id, incarnation), stream)

    def key(self, member_id: str) -> MemberKey:
        """How the coordinator knows a member."""
        return MemberKey(Kind.GATEWAY if member_id in self.gateways else Kind.WORKER, member_id)

    def kill(self, worker_id: str) -> None:
        """Its stream ends with a goodbye, which counts as a loss at once."""
        stream = self.workers.pop(worker_id)
        self.coordinator.detach(self.key(worker_id), stream, farewell=True)

    async def settle(self, seconds: float = 0.0) -> None:
        """Lets everybody act until nothing more happens; then time passes, second by second."""
        for passed in range(int(seconds) + 1):
            if passed:
                self.clock.seconds += TICK_S
                self.coordinator.tick()
            for _ in range(12):
                await self.coordinator.keep_store()
                self._act()

    def _act(self) -> None:
        for worker_id, stream in list(self.workers.items()):
            while self.heard[worker_id] < len(stream.sent):
                command = stream.sent[self.heard[worker_id]]
                self.heard[worker_id] += 1
                self.told.append((worker_id, command))
                if (report := self._obey(worker_id, command)) is not None:
                    self.coordinator.hear(self.key(worker_id), stream, report)

    def _obey(self, worker_id: str, command: Command) -> Report | None:
        held = self.held[worker_id]
        match command:
            case SendPrepare(_, revision, _) if revision in self.refuses:
                return Failed(revision, "load", self.refuses[revision])
            case SendPrepare(_, revision, _) if worker_id not in self.lazy:
                held.add(revision)
                return Ready(revision, 1)
            case SendActivate(_, revision, epoch):
                assert revision in held
                return Activated(revision, epoch)
            case SendRetire(revision):
                held.discard(revision)
                return Retired(revision)
            case SendAbort(revision):
                return Retired(revision)
        return None

    async def start(self, **fields: object) -> Rollout:
        """Starts a rollout to the new revision."""
        spec = replace(Spec(model="m", revision=self.new, bake_s=5.0), **fields)  # type: ignore[arg-type]
        return await self.coordinator.start_rollout("r", spec)

    @property
    def rollout(self) -> Rollout:
        """The rollout as it is."""
        return self.coordinator.rollouts.find("r")

    @property
    def states(self) -> list[State]:
        """Every state that it entered."""
        return [entered.state for entered in self.rollout.history]

    @property
    def route(self) -> dict[str, int]:
        """What gateways read."""
        assert self.store.route is not None
        return dict(self.store.route.weights)


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


@pytest.mark.parametrize(("memory_bytes", "taken"), [(2_000, Strategy.SWAP), (4_000, Strategy.SIDE_BY_SIDE)])
async def test_auto_takes_swap_where_two_copies_do_not_fit(memory_bytes: int, taken: Strategy) -> None:
    """By the memory that workers report: half of it is in use, and the new weights take 1,000 bytes."""
    world = World(weights_bytes=1_000)
    await world.settle()
    world.attach("a", memory_bytes)
    await world.settle()
    await world.start(bake_s=0.0)
    await world.settle(3)
    assert world.rollout.strategy is taken
    assert world.rollout.state is State.COMPLETED


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
    assert conductor.serving(world.old) == world.old
    assert conductor.serving(world.new) == world.new
    await world.coordinator.start_rollout("again", Spec(model="m", revision=world.new, bake_s=0.0))
    await world.settle(2)
    assert conductor.serving(world.old) == world.new


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
