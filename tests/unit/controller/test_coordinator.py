"""The coordinator between members and store, with both in memory and a clock that stands still."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from structlog.testing import capture_logs

from services.common.errors import NotLeader, StoreUnavailable, WorkerUnknown
from services.controller.coordinator import (
    LOST_KEPT_S,
    RECORD_TTL_S,
    SLEPT_S,
    STEP_DOWN_S,
    TICK_S,
    Coordinator,
    MemberKey,
    rounds,
)
from services.controller.core.catalog import Catalog, Manifest, Revision
from services.controller.core.commands import SendActivate, SendDrain, SendLease, SendPrepare
from services.controller.core.member import Activated, Hello, Kind, Load, LoadReport, Presence, Ready
from services.controller.core.ports import FenceStale
from services.controller.core.records import Route
from services.controller.core.residency import EventIllegal, Phase, Resident
from tests.fakes.controller_ports import (
    FakeClock,
    FakeStream,
    MemoryRolloutRecords,
    MemoryRouteStore,
    granted,
)

LEASE_TTL_S = 5.0


class Mesh:
    """A coordinator and what is around it."""

    def __init__(self, store: MemoryRouteStore | None = None) -> None:
        self.catalog = Catalog()
        manifest = Manifest("m", "", (), "auto", "auto", 64, "").named()
        self.revision = manifest.revision
        self.catalog.register(Revision(manifest, "", 0.0))
        self.store = store or MemoryRouteStore()
        self.records = MemoryRolloutRecords()
        self.clock = FakeClock()
        self.tenure = granted(self.store, self.clock)
        self.coordinator = Coordinator(
            self.catalog,
            self.store,
            self.records,
            self.clock,
            self.tenure,
            lease_ttl_s=LEASE_TTL_S,
            prepare_timeout_s=600.0,
        )

    def hello(self, worker_id: str = "w", incarnation: str = "a", **fields: object) -> FakeStream:
        """Attaches a worker."""
        stream = FakeStream()
        hello = Hello(Kind.WORKER, worker_id, incarnation, "h:1", 8, **fields)  # type: ignore[arg-type]
        self.coordinator.attach(hello, stream)
        return stream

    async def activate(self, worker_id: str = "w") -> FakeStream:
        """Attaches a worker and takes it through the handshake."""
        stream, key = self.hello(worker_id), MemberKey(Kind.WORKER, worker_id)
        self.coordinator.hear(key, stream, Ready(self.revision, 1))
        (activate,) = (command for command in stream.sent if isinstance(command, SendActivate))
        self.coordinator.hear(key, stream, Activated(self.revision, activate.epoch))
        await self.coordinator.keep_store()
        return stream

    async def pass_time(self, seconds: float, *speaking: tuple[str, FakeStream]) -> None:
        """Ticks once a second; the `speaking` workers send their load."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.seconds += TICK_S
            for worker_id, stream in speaking:
                self.coordinator.hear(MemberKey(Kind.WORKER, worker_id), stream, LoadReport(Load(slots=8)))
            with contextlib.suppress(StoreUnavailable, FenceStale):
                await self.tenure.keep()
            self.coordinator.tick()
            await self.coordinator.keep_store()


@pytest.fixture
async def mesh() -> Mesh:
    """A coordinator that leads."""
    mesh = Mesh()
    await mesh.coordinator.keep_store()
    assert mesh.coordinator.led.is_set()
    return mesh


async def test_handshake_ends_in_the_route(mesh: Mesh) -> None:
    """Prepare, ready, activate, activated: then the record and the route are in the store, at one epoch."""
    claimed = mesh.store.route
    assert claimed is not None
    assert claimed.weights == {}
    stream = await mesh.activate()
    lease, prepare, activate = stream.sent
    assert lease == SendLease(LEASE_TTL_S, 1)
    assert prepare == SendPrepare("m", mesh.revision, "")
    assert isinstance(activate, SendActivate)
    assert mesh.store.route == Route(activate.epoch, 1, {mesh.revision: 100})
    assert activate.epoch > claimed.epoch
    record = mesh.store.workers["w"]
    assert (record.address, record.incarnation, record.slots, record.draining) == ("h:1", "a", 8, False)
    assert record.ready == {mesh.revision}
    assert record.lease_ttl_s == RECORD_TTL_S


async def test_a_report_is_answered_with_the_lease(mesh: Mesh) -> None:
    """By this members tell a controller that stands still from one that has nothing to say."""
    stream = await mesh.activate()
    sent = len(stream.sent)
    mesh.coordinator.hear(MemberKey(Kind.WORKER, "w"), stream, LoadReport(Load(slots=8)))
    assert stream.sent[sent:] == [SendLease(LEASE_TTL_S, 1)]


async def test_members_wait_for_leadership() -> None:
    """Before the store was reached nobody may attach: fence and epoch are not known yet."""
    mesh = Mesh()
    mesh.store.reachable = False
    await mesh.coordinator.keep_store()
    assert not mesh.coordinator.led.is_set()
    with pytest.raises(StoreUnavailable):
        mesh.hello()
    mesh.store.reachable = True
    await mesh.coordinator.keep_store()
    assert mesh.hello().sent


async def test_fence_and_epoch_grow_over_restarts(mesh: Mesh) -> None:
    """The next controller writes above its predecessor and keeps the route that serves."""
    await mesh.activate()
    before = mesh.store.route
    assert before is not None
    later = Mesh(mesh.store)
    await later.coordinator.keep_store()
    after = mesh.store.route
    assert after is not None
    assert (after.fence, after.weights) == (2, before.weights)
    assert after.epoch > before.epoch


async def test_stale_controller_is_deposed(mesh: Mesh) -> None:
    """A controller whose fence was surpassed writes nothing more and lets its members go."""
    stream = await mesh.activate()
    await Mesh(mesh.store).coordinator.keep_store()
    led = mesh.store.route
    with capture_logs() as lines:
        await mesh.coordinator.keep_store()
        await mesh.coordinator.keep_store()
    assert [line["event"] for line in lines] == ["controller.deposed"]
    assert mesh.store.route == led
    assert mesh.coordinator.deposed.is_set()
    assert stream.ended == ["Another controller leads."]
    with pytest.raises(NotLeader):
        mesh.hello("w2")


async def test_silent_worker_is_removed(mesh: Mesh) -> None:
    """A worker that speaks keeps its lease; one that does not is removed when the lease has run out."""
    speaking, silent = await mesh.activate("speaking"), await mesh.activate("silent")
    await mesh.pass_time(LEASE_TTL_S - 1, ("speaking", speaking))
    assert set(mesh.store.workers) == {"speaking", "silent"}
    await mesh.pass_time(1, ("speaking", speaking))
    assert set(mesh.store.workers) == {"speaking"}
    assert silent.ended
    assert not speaking.ended
    presences = {member.id: member.presence for member in mesh.coordinator.members(Kind.WORKER)}
    assert presences == {"speaking": Presence.ATTACHED, "silent": Presence.LOST}


async def test_lost_worker_is_forgotten_in_the_end(mesh: Mesh) -> None:
    """A lost worker stays visible for a while, then its name costs nothing."""
    await mesh.activate()
    await mesh.pass_time(LEASE_TTL_S)
    assert len(mesh.coordinator.members(Kind.WORKER)) == 1
    await mesh.pass_time(LOST_KEPT_S + 1)
    assert mesh.coordinator.members(Kind.WORKER) == ()


async def test_inherited_record_is_removed(mesh: Mesh) -> None:
    """A record that an earlier controller left is gone once its worker is back with nothing in it."""
    await mesh.activate()
    later = Mesh(mesh.store)
    await later.coordinator.keep_store()
    assert set(mesh.store.workers) == {"w"}
    later.hello(incarnation="b")
    await later.coordinator.keep_store(renew=False)
    assert mesh.store.workers == {}


async def test_broken_stream_holds_new_requests(mesh: Mesh) -> None:
    """A broken stream marks the worker as draining at once; within its lease it returns as it was."""
    stream = await mesh.activate()
    mesh.coordinator.detach(MemberKey(Kind.WORKER, "w"), stream, farewell=False)
    await mesh.coordinator.keep_store(renew=False)
    assert mesh.store.workers["w"].draining
    again = mesh.hello(residents={mesh.revision: Resident(Phase.ACTIVE)})
    await mesh.coordinator.keep_store(renew=False)
    assert not mesh.store.workers["w"].draining
    assert [type(command) for command in again.sent] == [SendLease, SendActivate]


async def test_broken_stream_ends_in_removal(mesh: Mesh) -> None:
    """Nobody came back within the lease: the record is gone."""
    stream = await mesh.activate()
    mesh.coordinator.detach(MemberKey(Kind.WORKER, "w"), stream, farewell=False)
    await mesh.pass_time(LEASE_TTL_S)
    assert mesh.store.workers == {}


async def test_farewell_removes_at_once(mesh: Mesh) -> None:
    """A worker that says goodbye is not waited for."""
    stream = await mesh.activate()
    mesh.coordinator.detach(MemberKey(Kind.WORKER, "w"), stream, farewell=True)
    await mesh.coordinator.keep_store(renew=False)
    assert mesh.store.workers == {}


async def test_same_process_replaces_its_stream(mesh: Mesh) -> None:
    """The same process on a new stream ends the old one, and what still comes by that is not heard."""
    old = await mesh.activate()
    new = mesh.hello(residents={mesh.revision: Resident(Phase.ACTIVE)})
    assert old.ended
    key = MemberKey(Kind.WORKER, "w")
    mesh.coordinator.hear(key, old, Ready("nobody asked", 1))
    mesh.coordinator.detach(key, old, farewell=True)
    with pytest.raises(EventIllegal):
        mesh.coordinator.hear(key, new, Ready("nobody asked", 1))
    (member,) = mesh.coordinator.members(Kind.WORKER)
    assert member.presence is Presence.ATTACHED


async def test_emptied_store_is_rebuilt(mesh: Mesh) -> None:
    """Route and records that vanished are written again, with a higher epoch that the members hear of."""
    stream = await mesh.activate()
    before = mesh.store.route
    assert before is not None
    mesh.store.clear()
    await mesh.coordinator.keep_store(renew=False)
    after = mesh.store.route
    assert after is not None
    assert after.epoch > before.epoch
    assert after.weights == before.weights
    assert set(mesh.store.workers) == {"w"}
    # Gateways take the route as the sign that the store knows the workers again.
    assert mesh.store.workers_before == {"w"}
    assert stream.sent[-1] == SendActivate("m", mesh.revision, after.epoch)


async def test_altered_route_is_put_right(mesh: Mesh) -> None:
    """A route that somebody else changed under our fence is replaced by a newer one."""
    await mesh.activate()
    good = mesh.store.route
    assert good is not None
    mesh.store.route = Route(good.epoch, good.fence, {"other": 100})
    await mesh.coordinator.keep_store()
    assert mesh.store.route.weights == good.weights
    assert mesh.store.route.epoch > good.epoch


async def test_quiet_store_is_not_written(mesh: Mesh) -> None:
    """While the route is right it is only read."""
    await mesh.activate()
    written = list(mesh.store.writes)
    await mesh.coordinator.keep_store()
    assert mesh.store.writes == written


async def test_reported_epoch_and_fence_are_surpassed(mesh: Mesh) -> None:
    """What a member has seen of an earlier controller is exceeded, though the store forgot it."""
    far = 10**15
    stream = mesh.hello(residents={mesh.revision: Resident(Phase.ACTIVE)}, epoch=far, fence=41)
    await mesh.coordinator.keep_store()
    route = mesh.store.route
    assert route is not None
    assert route.epoch > far
    assert route.fence == 42
    assert stream.sent[0] == SendLease(LEASE_TTL_S, 42)
    (activate,) = (command for command in stream.sent if isinstance(command, SendActivate))
    assert activate.epoch == route.epoch


async def test_outage_is_logged_once(mesh: Mesh) -> None:
    """Members stay while the store is away; the log has one line for it and one for its return."""
    stream = await mesh.activate()
    mesh.store.reachable = False
    with capture_logs() as lines:
        for _ in range(5):
            await mesh.pass_time(1, ("w", stream))
        mesh.store.reachable = True
        await mesh.pass_time(1, ("w", stream))
    assert [line["event"] for line in lines] == ["store.lost", "store.recovered"]
    assert not stream.ended


async def test_removal_survives_an_outage(mesh: Mesh) -> None:
    """A worker that was lost while the store was away is removed when it is back."""
    stream = await mesh.activate()
    mesh.store.reachable = False
    mesh.coordinator.detach(MemberKey(Kind.WORKER, "w"), stream, farewell=True)
    await mesh.pass_time(LEASE_TTL_S)
    assert set(mesh.store.workers) == {"w"}
    mesh.store.reachable = True
    await mesh.coordinator.keep_store(renew=False)
    assert mesh.store.workers == {}


async def test_silence_proves_nothing_while_the_lead_is_doubtful(mesh: Mesh) -> None:
    """Members may speak to another controller by then; when the lead is sure, their leases begin anew."""
    stream = await mesh.activate()
    mesh.store.reachable = False
    await mesh.pass_time(LEASE_TTL_S + 2)
    assert not stream.ended
    mesh.store.reachable = True
    await mesh.tenure.keep()
    await mesh.pass_time(LEASE_TTL_S - 1)
    assert not stream.ended
    await mesh.pass_time(1)
    assert stream.ended


async def test_members_are_let_go_when_the_lead_cannot_be_renewed(mesh: Mesh) -> None:
    """Somebody else may lead whom the store answers; the records of the workers outlive the search for it."""
    stream = await mesh.activate()
    mesh.store.reachable = False
    await mesh.pass_time(STEP_DOWN_S)
    assert not stream.ended
    await mesh.pass_time(1)
    assert stream.ended == ["The controller has lost its store."]
    assert mesh.coordinator.deposed.is_set()
    assert STEP_DOWN_S < RECORD_TTL_S / 2
    calls = mesh.store.calls
    await mesh.coordinator.keep_store()
    assert mesh.store.calls == calls


async def test_own_sleep_is_not_their_silence(mesh: Mesh) -> None:
    """A controller that was stopped does not hold the pause against its members."""
    stream = await mesh.activate()
    mesh.clock.seconds += max(LEASE_TTL_S, SLEPT_S) + 60
    mesh.coordinator.tick()
    assert not stream.ended
    await mesh.pass_time(LEASE_TTL_S + 1)
    assert stream.ended


async def test_drain(mesh: Mesh) -> None:
    """A drained worker stays a member but is marked for the gateways; an unknown one is an error."""
    stream = await mesh.activate()
    assert mesh.coordinator.drain("w", 7.0).draining
    await mesh.coordinator.keep_store(renew=False)
    assert mesh.store.workers["w"].draining
    assert stream.sent[-1] == SendDrain(7.0)
    with pytest.raises(WorkerUnknown):
        mesh.coordinator.drain("nobody", 7.0)


async def test_change_is_written_without_waiting(mesh: Mesh) -> None:
    """The running loops write a change when it happens."""
    running = asyncio.create_task(rounds.run(mesh.coordinator, mesh.clock))
    try:
        stream = mesh.hello(residents={mesh.revision: Resident(Phase.ACTIVE)})
        await mesh.store.wait_until(lambda: "w" in mesh.store.workers)
        await mesh.store.wait_until(lambda: bool(mesh.store.route and mesh.store.route.weights))
        mesh.coordinator.detach(MemberKey(Kind.WORKER, "w"), stream, farewell=True)
        await mesh.store.wait_until(lambda: "w" not in mesh.store.workers)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_defect_ends_the_run(mesh: Mesh) -> None:
    """An error that nobody foresaw is not swallowed: the loops end with it."""

    async def broken(model: str) -> Route | None:
        raise RuntimeError(model)

    mesh.store.read_route = broken  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(rounds.run(mesh.coordinator, mesh.clock), 5.0)


async def test_swallowed_cancellation_ends_the_run(mesh: Mesh) -> None:
    """A store that answers although its caller was cancelled does not keep the controller alive."""
    reading = asyncio.Event()

    async def deaf(model: str) -> Route | None:
        del model
        reading.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return None

    mesh.store.read_route = deaf  # type: ignore[method-assign]
    running = asyncio.create_task(rounds.run(mesh.coordinator, mesh.clock))
    await reading.wait()
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=5.0)
    assert running in done
