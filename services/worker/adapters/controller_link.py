"""The link to the controller. Owns: membership: `Attach`, its reports, and finding a controller that leads.

While no controller answers, the worker serves on; the link walks the list until one does. What happened
meanwhile is in the next Hello. Knows what commands mean only as far as their verb.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
from interlock.v1 import controller_service_pb2, controller_service_pb2_grpc, worker_pb2

from services.common import logs
from services.common.channel import connect
from services.common.credential import mesh_metadata
from services.worker.adapters.worker_messages import (
    report_message,
    resident_revisions,
    revision_spec,
    worker_load,
)
from services.worker.core.ports import RevisionHandshake
from services.worker.core.revision import Progressed, Report, Residency
from services.worker.core.stepper import Pulse

# The controller's lease lasts several of these.
REPORT_INTERVAL_S = 1.0

# A controller that restarts is back within seconds; asking it more often than this helps nobody.
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 2.0

# A controller that accepts the stream and grants no lease in this time is not the one to wait for.
LEASE_TIMEOUT_S = 3.0

# Reports that wait for the stream. Progress gives way to what matters, so this is never reached by it.
REPORTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Membership:
    """What a worker says of itself.

    Attributes:
        worker_id: Its name.
        incarnation: Names the process.
        address: Where gateways reach it.
        slots: Sequences at once.
        controllers: Where controllers listen, in the order in which they are tried.
        mesh_token: The join token of the mesh.
        devices: Kind, name and memory in bytes of each device.
    """

    worker_id: str
    incarnation: str
    address: str
    slots: int
    controllers: tuple[str, ...]
    mesh_token: str
    devices: tuple[tuple[str, str, int], ...]


class ControllerLink:
    """Keeps a worker attached.

    Args:
        membership: What is said in Hello.
        residency: What is resident, and the highest epoch and fence.
        pulse: Returns what the worker carries.
        on_drain: Called when the controller takes the worker out of service.
    """

    def __init__(
        self,
        membership: Membership,
        residency: Residency,
        pulse: Callable[[], Pulse],
        on_drain: Callable[[], None],
    ) -> None:
        self._membership = membership
        self._residency = residency
        self._pulse = pulse
        self._on_drain = on_drain
        self._reports: deque[Report] = deque()
        self._wake = asyncio.Event()
        self._load_at_s = 0.0
        self._attached = False
        self._downloads: grpc.aio.Channel | None = None
        self._leased = asyncio.Event()

    async def connected(self) -> grpc.aio.Channel:
        """Where files come from: the controller that granted a lease; waits while there is none."""
        while (channel := self._downloads) is None:
            await self._leased.wait()
        return channel

    def report(self, report: Report) -> None:
        """Sends a report; while nobody is attached it is dropped, for the next Hello says it all."""
        if not self._attached:
            return
        last = self._reports[-1] if self._reports else None
        if isinstance(report, Progressed) and isinstance(last, Progressed) and report.phase is last.phase:
            self._reports.pop()
        if len(self._reports) < REPORTS_MAX:
            self._reports.append(report)
        self._wake.set()

    def report_load(self) -> None:
        """Sends the load now: something changed that should not wait for its turn."""
        self._load_at_s = 0.0
        self._wake.set()

    async def run(self, handshake: RevisionHandshake) -> None:
        """Attaches, again and again, until cancelled."""
        retry_s = RETRY_FIRST_S
        while True:
            for address in self._membership.controllers:
                if await self._guarded(self._attach(address, handshake)):
                    retry_s = RETRY_FIRST_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_MAX_S)

    async def _guarded(self, attachment: Awaitable[bool]) -> bool:
        """Keeps a defect in one attachment from ending the membership."""
        try:
            return await attachment
        except Exception:  # noqa: BLE001 - logged with its traceback; the worker must attach again
            logs.get_logger().error("controller.crashed", exc_info=True)
            return False

    async def _attach(self, address: str, handshake: RevisionHandshake) -> bool:
        """One attachment, to its end; returns whether a lease was granted."""
        # Files have a connection of their own, which opens when one is asked for: on a slow line the lease
        # would wait behind them for longer than it holds.
        channel, downloads = connect(address, light=True), connect(address)
        leased = False
        try:
            stub = controller_service_pb2_grpc.ControllerServiceStub(channel)
            call = stub.Attach(metadata=mesh_metadata(self._membership.mesh_token))
            # Hello says all that was; what happens after it was made is reported, lease or not.
            self._reports.clear()
            self._attached = True
            async with asyncio.timeout(LEASE_TIMEOUT_S):
                await call.write(self._hello())
                first = await call.read()
            lease = self._accept(first)
            if lease is not None:
                leased, self._downloads = True, downloads
                self._leased.set()
                await self._serve(call, handshake, _silence_s(lease))
        except (grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
            logs.get_logger().debug("controller.lost", code=code)
        finally:
            self._attached, self._downloads = False, None
            self._leased.clear()
            await asyncio.gather(channel.close(), downloads.close())
        if leased:
            logs.get_logger().warning("controller.detached")
        return leased

    def _accept(self, first: object) -> controller_service_pb2.Lease | None:
        """The lease that the first response grants, unless on behalf of a leader of yesterday."""
        if not isinstance(first, controller_service_pb2.AttachResponse) or not first.HasField("lease"):
            return None
        if first.lease.fence < self._residency.fence:
            logs.get_logger().warning("controller.refused", fence=first.lease.fence)
            return None
        self._residency.fence = first.lease.fence
        logs.get_logger().info("controller.attached", fence=first.lease.fence)
        return first.lease

    async def _serve(
        self,
        call: grpc.aio.StreamStreamCall[
            controller_service_pb2.AttachRequest, controller_service_pb2.AttachResponse
        ],
        handshake: RevisionHandshake,
        silence_s: float | None,
    ) -> None:
        """Obeys until the stream ends, or the controller is silent for as long as its lease holds."""
        writer = asyncio.create_task(self._write(call), name="controller-writer")
        try:
            while True:
                # The connection to a process that was stopped stays open.
                async with asyncio.timeout(silence_s):
                    response = await call.read()
                if not isinstance(response, controller_service_pb2.AttachResponse):
                    break
                self._obey(response, handshake)
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await writer

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[
            controller_service_pb2.AttachRequest, controller_service_pb2.AttachResponse
        ],
    ) -> None:
        """Writes reports as they come and the load every second. The only writer of the stream."""
        loop = asyncio.get_running_loop()
        self._load_at_s = 0.0
        while True:
            self._wake.clear()
            while self._reports:
                await call.write(report_message(self._reports.popleft()))
            if loop.time() >= self._load_at_s:
                await call.write(controller_service_pb2.AttachRequest(load=self._load()))
                self._load_at_s = loop.time() + REPORT_INTERVAL_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._load_at_s):
                    await self._wake.wait()

    def _obey(self, response: controller_service_pb2.AttachResponse, handshake: RevisionHandshake) -> None:
        match response.WhichOneof("command"):
            case "prepare":
                spec = revision_spec(response.prepare.manifest)
                if response.prepare.stage_only:
                    handshake.stage(spec)
                else:
                    handshake.prepare(spec)
            case "activate":
                handshake.activate(response.activate.revision, response.activate.epoch)
            case "prove":
                handshake.prove(response.prove.revision)
            case "retire":
                handshake.retire(response.retire.revision)
            case "abort":
                handshake.abort(response.abort.revision)
            case "drain":
                self._on_drain()

    def _hello(self) -> controller_service_pb2.AttachRequest:
        member = self._membership
        hello = controller_service_pb2.Hello(
            kind=controller_service_pb2.MEMBER_KIND_WORKER,
            id=member.worker_id,
            incarnation=member.incarnation,
            address=member.address,
            slots=member.slots,
            devices=[
                worker_pb2.Device(kind=kind, name=name, memory_bytes=memory)
                for kind, name, memory in member.devices
            ],
            revisions=resident_revisions(self._residency),
            epoch=self._residency.epoch,
            fence=self._residency.fence,
        )
        return controller_service_pb2.AttachRequest(hello=hello)

    def _load(self) -> worker_pb2.WorkerLoad:
        slots = 0 if self._residency.draining else self._membership.slots
        return worker_load(self._pulse(), slots)


def _silence_s(lease: controller_service_pb2.Lease) -> float | None:
    """How long the controller may be silent; None: it does not say."""
    return lease.ttl.ToTimedelta().total_seconds() or None
