"""The controller's surroundings in memory: its store, its streams, its clock, and members over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import grpc
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import controller_service_pb2_grpc, worker_pb2

from services.common import channel
from services.common.clock import Clock
from services.common.credential import mesh_metadata
from services.common.errors import StoreUnavailable
from services.controller.coordinator import Tenure
from services.controller.core.commands import Command
from services.controller.core.ports import FenceStale
from services.controller.core.records import Claimed, KnownMembers, Route, Standing, WorkerRecord
from services.controller.core.rollout_record import Rollout

# Longer than anything takes, shorter than the patience of whoever waits for a test.
TIMEOUT_S = 10.0
# As a controller's own default.
LEAD_TTL_S = 4.0


class MemoryRouteStore:
    """`RouteStore` in memory, with the fencing of the real one.

    Attributes:
        route: What gateways would read; None: nothing was written.
        workers: The records, by worker.
        running: Workers with revisions that requests run on.
        awaited: Revisions that waiting requests must go on with.
        reachable: False: every call raises StoreUnavailable.
        calls: How many calls came, failed ones included.
        writes: The epochs of all routes that were written, in order.
        workers_before: The workers that were known when the route was written last.
        gateways: Those that were seen lately.
        leader: Who leads; None: nobody, or it was forgotten.
        left: Whether the last one who led left.
        led_with: The highest fencing number that was given.
    """

    def __init__(self) -> None:
        self.route: Route | None = None
        self.workers: dict[str, WorkerRecord] = {}
        self.running: set[tuple[str, str]] = set()
        self.awaited: set[str] = set()
        self.reachable = True
        self.calls = 0
        self.writes: list[int] = []
        self.workers_before: frozenset[str] = frozenset()
        self.gateways: set[str] = set()
        self.leader: MemoryLead | None = None
        self.left = False
        self.led_with = 0
        self._changed = asyncio.Condition()

    async def read_route(self, model: str) -> Route | None:
        """See `RouteStore.read_route`."""
        del model
        self._check()
        return self.route

    async def read_members(self, model: str) -> KnownMembers:
        """See `RouteStore.read_members`."""
        del model
        self._check()
        return KnownMembers(frozenset(self.workers), frozenset(self.gateways))

    async def read_awaited(self, model: str) -> frozenset[str]:
        """See `RouteStore.read_awaited`."""
        del model
        self._check()
        return frozenset(self.awaited)

    async def write_route(self, model: str, epoch: int, fence: int, weights: Mapping[str, int]) -> None:
        """See `RouteStore.write_route`."""
        del model
        self._check(fence)
        self.route = Route(epoch, fence, dict(weights))
        self.writes.append(epoch)
        self.workers_before = frozenset(self.workers)
        await self._tell()

    async def write_worker(self, model: str, record: WorkerRecord, fence: int) -> None:
        """See `RouteStore.write_worker`."""
        del model
        self._check(fence)
        self.workers[record.worker_id] = record
        await self._tell()

    async def remove_worker(self, model: str, worker_id: str, fence: int) -> None:
        """See `RouteStore.remove_worker`."""
        del model
        self._check(fence)
        self.workers.pop(worker_id, None)
        await self._tell()

    async def unready(
        self, model: str, worker_id: str, revision: str, fence: int, *, routed: bool = False
    ) -> bool:
        """See `RouteStore.unready`; what runs is `running`."""
        del model
        self._check(fence)
        record = self.workers.get(worker_id)
        is_routed = self.route is not None and self.route.weights.get(revision, 0) > 0
        if (is_routed and not routed) or (worker_id, revision) in self.running:
            return False
        if record is not None:
            self.workers[worker_id] = replace(record, ready=record.ready - {revision})
        return True

    def clear(self) -> None:
        """Forgets everything, as a store does that was restarted empty."""
        self.route, self.leader, self.left, self.led_with = None, None, False, 0
        self.workers.clear()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Returns when `holds`, which is looked at after every write."""
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(holds)

    def _check(self, fence: int | None = None) -> None:
        self.calls += 1
        if not self.reachable:
            raise StoreUnavailable("The store is away.")
        if fence is not None and self.route is not None and fence < self.route.fence:
            raise FenceStale

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class MemoryLead:
    """`Lead` of one controller, over a store that several share.

    Args:
        store: Its `leader` is whoever leads.
    """

    def __init__(self, store: MemoryRouteStore, leader_id: str = "c") -> None:
        self._store = store
        self._id = leader_id

    async def take(self, *, may_found: bool, may_replace: bool) -> Standing:
        """See `Lead.take`; a lease ends only when it is left."""
        self._store._check()
        leader = self._store.leader
        if leader not in {None, self} and not (may_replace and leader._id == self._id):
            return Standing(0, leader._id)
        free = leader is not None or self._store.left or may_found
        return Standing(self.grant(), self._id) if free else Standing(0, "")

    def grant(self) -> int:
        """Gives it the lead, whoever had it; returns the fencing number."""
        written = 0 if self._store.route is None else self._store.route.fence
        self._store.leader, self._store.led_with = self, max(written, self._store.led_with) + 1
        return self._store.led_with

    async def keep(self, fence: int) -> None:
        """See `Lead.keep`."""
        self._store._check()
        if self._store.leader not in {None, self}:
            raise FenceStale
        self._store.leader, self._store.led_with = self, fence

    async def leave(self) -> None:
        """See `Lead.leave`."""
        self._store._check()
        if self._store.leader is self:
            self._store.leader, self._store.left = None, True


def granted(store: MemoryRouteStore, clock: Clock) -> Tenure:
    """The time of a controller that leads from now on."""
    lead = MemoryLead(store)
    return Tenure(lead, lead.grant(), clock, ttl_s=LEAD_TTL_S)


class MemoryRolloutRecords:
    """`RolloutRecords` in memory.

    Attributes:
        records: By id, in the order in which they were made.
        fence: That of the last claim.
        writable: False: every save raises StoreUnavailable.
        taken_over: True: every save raises FenceStale.
        is_partial: Whether there may be more records than these.
    """

    def __init__(self) -> None:
        self.records: dict[str, Rollout] = {}
        self.fence = 0
        self.writable = True
        self.taken_over = False
        self.is_partial = False

    async def claim(self, model: str, fence: int) -> Claimed:
        """See `RolloutRecords.claim`."""
        self.fence = max(fence, self.fence + 1)
        found = tuple(record for record in self.records.values() if record.spec.model == model)
        return Claimed(self.fence, found, self.is_partial)

    async def save(self, rollout: Rollout) -> None:
        """See `RolloutRecords.save`."""
        if not self.writable:
            raise StoreUnavailable("The records are away.")
        if self.taken_over:
            raise FenceStale
        self.records[rollout.id] = rollout

    def close(self) -> None:
        """See `RolloutRecords.close`."""


class FakeClock:
    """`Clock` that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self.seconds

    def now(self) -> float:
        """See `Clock.now`."""
        return 1_700_000_000.0 + self.seconds


@dataclass(slots=True)
class FakeStream:
    """`MemberStream` that keeps what was sent."""

    sent: list[Command] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def send(self, command: Command) -> None:
        """See `MemberStream.send`."""
        self.sent.append(command)

    def end(self, reason: str) -> None:
        """See `MemberStream.end`."""
        self.ended.append(reason)


class FakeMember:
    """A worker or gateway over a real channel that says what the test tells it to."""

    def __init__(self, address: str, mesh_token: str) -> None:
        self._channel = channel.connect(address)
        self._stub = controller_service_pb2_grpc.ControllerServiceStub(self._channel)
        self._metadata = mesh_metadata(mesh_token)
        self._call: grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse] | None = None

    async def __aenter__(self) -> Self:
        """Nothing is opened before the first call."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Breaks the stream, as the end of a process does."""
        await self.vanish()
        await self._channel.close()

    def open(self) -> None:
        """Opens a stream without a word."""
        self._call = self._stub.Attach(metadata=self._metadata)

    async def hello(self, kind: int, member_id: str, incarnation: str, **fields: object) -> None:
        """Opens a stream and says who it is."""
        self.open()
        hello = pb.Hello(id=member_id, incarnation=incarnation, **fields)  # type: ignore[arg-type]
        hello.kind = pb.MemberKind.ValueType(kind)
        if kind == pb.MEMBER_KIND_WORKER:
            hello.address = hello.address or "127.0.0.1:1"
            hello.slots = hello.slots or 8
        await self.say(hello=hello)

    async def say(self, **event: object) -> None:
        """Sends one event, such as `ready=Ready(...)`."""
        assert self._call is not None
        await self._call.write(pb.AttachRequest(**event))  # type: ignore[arg-type]

    async def load(self) -> None:
        """Sends the sign of life."""
        await self.say(load=worker_pb2.WorkerLoad(slots=8))

    async def hear(self, command: str) -> pb.AttachResponse:
        """The next command, which must be of the named kind."""
        assert self._call is not None
        async with asyncio.timeout(TIMEOUT_S):
            response = await self._call.read()
            # Leases are renewed all the time; whoever waits for something else passes over them.
            while (
                isinstance(response, pb.AttachResponse) and response.HasField("lease") and command != "lease"
            ):
                response = await self._call.read()
        assert isinstance(response, pb.AttachResponse), "the stream has ended"
        assert response.WhichOneof("command") == command
        return response

    async def end(self) -> grpc.aio.AioRpcError | None:
        """Waits until the controller ends the stream; returns the error that it ended with."""
        assert self._call is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while await self._call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError as error:
            return error
        return None

    async def leave(self) -> None:
        """Says goodbye: closes its side of the stream."""
        assert self._call is not None
        await self._call.done_writing()
        assert await self.end() is None

    async def vanish(self) -> None:
        """Breaks the stream without a word."""
        if self._call is not None:
            self._call.cancel()

    async def become_active(
        self, kind: int, member_id: str, incarnation: str, **fields: object
    ) -> pb.Activate:
        """Goes through the whole handshake; returns the activation."""
        await self.hello(kind, member_id, incarnation, **fields)
        await self.hear("lease")
        revision = (await self.hear("prepare")).prepare.manifest.revision
        await self.say(ready=pb.Ready(revision=revision, weights_bytes=1))
        activate = (await self.hear("activate")).activate
        await self.say(activated=pb.Activated(revision=activate.revision, epoch=activate.epoch))
        return activate

    def download(self, model: str, revision: str) -> Callable[[str, int], AsyncIterator[bytes]]:
        """What `artifacts.fetch` takes, over `DownloadRevision`."""

        async def read(path: str, offset: int) -> AsyncIterator[bytes]:
            request = pb.DownloadRevisionRequest(model=model, revision=revision, path=path, offset=offset)
            async for response in self._stub.DownloadRevision(request, metadata=self._metadata):
                yield response.data

        return read
