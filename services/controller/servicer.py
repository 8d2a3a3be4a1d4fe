"""The ControllerService. Owns: what travels on a member's stream, and who may call what.

Decides nothing: members are the coordinator's, revisions the catalog's. While another controller leads, every
call but RevokeToken ends with NOT_LEADER.
"""

# ruff: noqa: ARG002 - the contract fixes which parameters a method has.

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import controller_service_pb2_grpc, rollout_pb2

from services.common import ids, logs
from services.common.clock import Clock
from services.common.errors import ArgumentInvalid, ClientStalled, InterlockError
from services.common.grpc_types import Context
from services.common.revocation import RevocationList
from services.common.tokens import TokenVerifier, bearer_token
from services.controller.adapters import admin_messages, rollout_messages, upload_messages
from services.controller.adapters.breaker_messages import breaker_messages, check_target, obeyed, read_hold
from services.controller.adapters.member_messages import command_message, read_hello, read_report
from services.controller.adapters.member_outbox import MemberOutbox
from services.controller.adapters.uploads import Uploads
from services.controller.coordinator import Coordinator, Leadership, MemberKey
from services.controller.core.catalog import Catalog
from services.controller.core.member import Kind
from services.controller.core.ports import BreakerFleet, RevisionFiles, RolloutRecords
from services.controller.core.records import BreakerRecord
from services.controller.core.residency import EventIllegal
from services.controller.core.rollout_events import Cancelled, Event, Paused, Promoted, Resumed, TakenBack
from services.controller.core.rollout_record import Rollout

SERVICE = "interlock.v1.ControllerService"

# These carry the mesh credential; everything else carries a token with the scope `admin`.
MESH_METHODS = (f"/{SERVICE}/Attach", f"/{SERVICE}/DownloadRevision")
# Their messages are read for that scope alone. ListModels answers others as well; its message has no field.
ADMIN_METHODS = tuple(
    path
    for method in pb.DESCRIPTOR.services_by_name["ControllerService"].methods
    if (path := f"/{SERVICE}/{method.name}") not in MESH_METHODS
)

# A member speaks at once, and so does who uploads; who connects and says nothing is none.
HELLO_TIMEOUT_S = 10.0
# As long as the gateways' own default; what runs for longer is lost to the drain.
DRAIN_GRACE_S = 30.0
# The cancellation of a broken call follows the end of its requests within a few milliseconds.
GOODBYE_S = 0.1
# Workers' progress is looked at so often while somebody watches.
WATCH_S = 0.25

Requests = AsyncIterator[pb.AttachRequest]


@dataclass(frozen=True, slots=True)
class ControllerTerm:
    """What exists while this controller leads.

    Attributes:
        coordinator: Leads the members.
        catalog: The registered revisions.
        files: Their content.
        uploads: Takes revisions in.
        records: What the coordinator keeps of rollouts.
    """

    coordinator: Coordinator
    catalog: Catalog
    files: RevisionFiles
    uploads: Uploads
    records: RolloutRecords

    def close(self) -> None:
        """See `Term.close`."""
        self.uploads.close()
        self.records.close()


class ControllerServicer(controller_service_pb2_grpc.ControllerServiceServicer):
    """Serves members by the mesh credential, and operators by their tokens.

    Args:
        leadership: Whether we lead, and what exists while we do.
        verifier: Believes the operators' tokens.
        clock: The time.
        revocations: The tokens that were taken back.
        breakers: The breakers of all gateways.
    """

    def __init__(
        self,
        leadership: Leadership[ControllerTerm],
        verifier: TokenVerifier,
        clock: Clock,
        revocations: RevocationList,
        breakers: BreakerFleet,
    ) -> None:
        self._leadership = leadership
        self._breakers = breakers
        self._verifier = verifier
        self._clock = clock
        self._revocations = revocations

    @property
    def _coordinator(self) -> Coordinator:
        return self._leadership.term.coordinator

    @property
    def _catalog(self) -> Catalog:
        return self._leadership.term.catalog

    async def Attach(self, request_iterator: Requests, context: Context) -> AsyncIterator[pb.AttachResponse]:
        """One member, from its hello to the end of its stream."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = read_hello(await anext(request_iterator))
        except (TimeoutError, StopAsyncIteration):
            raise ArgumentInvalid("A member says hello first, and at once.") from None
        logs.annotate(**{f"{hello.kind}_id": hello.id})
        outbox, term = MemberOutbox(), self._leadership.term
        key = term.coordinator.attach(hello, outbox)
        listening = asyncio.create_task(_listen(term.coordinator, key, request_iterator, outbox))
        try:
            async for command in outbox:
                yield command_message(command, term.catalog)
        finally:
            listening.cancel()
            await asyncio.wait({listening})
            term.coordinator.detach(key, outbox, farewell=False)

    async def DownloadRevision(
        self, request: pb.DownloadRevisionRequest, context: Context
    ) -> AsyncIterator[pb.DownloadRevisionResponse]:
        """A file of a revision, from an offset on."""
        logs.annotate(model=request.model, revision=request.revision)
        async for data in self._leadership.term.files.read(
            request.model, request.revision, request.path, request.offset
        ):
            yield pb.DownloadRevisionResponse(data=data)

    async def ListModels(
        self, request: pb.ControllerServiceListModelsRequest, context: Context
    ) -> pb.ControllerServiceListModelsResponse:
        """The models that are registered."""
        self._require(context, "admin", "models:read")
        workers = self._coordinator.members(Kind.WORKER)
        return admin_messages.models_message(self._catalog, workers, self._coordinator.plan)

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        """The workers of the mesh."""
        self._require(context, "admin")
        workers = self._coordinator.members(Kind.WORKER)
        return admin_messages.workers_message(workers, self._catalog.default_model(), self._clock)

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Context) -> pb.DrainWorkerResponse:
        """Takes a worker out of service until its process is replaced."""
        self._require(context, "admin")
        _check_named(worker_id=request.worker_id)
        worker = self._coordinator.drain(request.worker_id, DRAIN_GRACE_S)
        model = self._catalog.default_model()
        return pb.DrainWorkerResponse(worker=admin_messages.worker_message(worker, model, self._clock))

    async def ListRevisions(
        self, request: pb.ListRevisionsRequest, context: Context
    ) -> pb.ListRevisionsResponse:
        """The revisions of a model."""
        self._require(context, "admin")
        _check_named(model=request.model)
        workers, plan = self._coordinator.members(Kind.WORKER), self._coordinator.plan
        found = self._catalog.revisions(request.model)
        return pb.ListRevisionsResponse(
            revisions=[admin_messages.revision_message(revision, workers, plan) for revision in found]
        )

    async def GetRevision(self, request: pb.GetRevisionRequest, context: Context) -> pb.GetRevisionResponse:
        """One revision."""
        self._require(context, "admin")
        _check_named(model=request.model, revision=request.revision)
        workers, plan = self._coordinator.members(Kind.WORKER), self._coordinator.plan
        found = self._catalog.revision(request.model, request.revision)
        return pb.GetRevisionResponse(revision=admin_messages.revision_message(found, workers, plan))

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.RevokeTokenResponse:
        """Takes a token back before its end."""
        self._require(context, "admin")
        ends_s = await self._revocations.revoke(request.token_id)
        response = pb.RevokeTokenResponse()
        response.forget_time.FromSeconds(int(ends_s))
        return response

    async def PlanUpload(self, request: pb.PlanUploadRequest, context: Context) -> pb.PlanUploadResponse:
        """Which blobs of a manifest are missing, and from which byte on."""
        self._require(context, "admin")
        missing = await self._leadership.term.uploads.plan(upload_messages.read_manifest(request.manifest))
        return pb.PlanUploadResponse(
            missing=[pb.MissingBlob(sha256=sha256, offset=offset) for sha256, offset in missing]
        )

    async def UploadRevision(
        self, request_iterator: AsyncIterator[pb.UploadRevisionRequest], context: Context
    ) -> pb.UploadRevisionResponse:
        """The manifest, then the missing bytes; the revision is registered at the end."""
        self._require(context, "admin")
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(request_iterator, None)
        except DecodeError:
            raise ArgumentInvalid("The first message cannot be read.") from None
        except TimeoutError:
            raise ClientStalled(
                f"No manifest came for {HELLO_TIMEOUT_S:.0f} s; an upload begins with it, and at once."
            ) from None
        if first is None or first.WhichOneof("part") != "manifest":
            raise ArgumentInvalid("An upload begins with its manifest.")
        manifest = upload_messages.read_manifest(first.manifest)
        term = self._leadership.term
        # Envoy lets a request take a minute until it is all there, or until its answer begins.
        await context.send_initial_metadata(())
        revision = await term.uploads.receive(manifest, upload_messages.read_chunks(request_iterator))
        workers, plan = term.coordinator.members(Kind.WORKER), term.coordinator.plan
        return pb.UploadRevisionResponse(revision=admin_messages.revision_message(revision, workers, plan))

    async def DeleteRevision(
        self, request: pb.DeleteRevisionRequest, context: Context
    ) -> pb.DeleteRevisionResponse:
        """Forgets a revision that nothing uses."""
        self._require(context, "admin")
        _check_named(model=request.model, revision=request.revision)
        term = self._leadership.term
        term.coordinator.check_unused(request.model, request.revision)
        await term.uploads.delete(request.model, request.revision, check_unused=term.coordinator.check_unused)
        return pb.DeleteRevisionResponse()

    async def CreateRollout(
        self, request: pb.CreateRolloutRequest, context: Context
    ) -> pb.CreateRolloutResponse:
        """Begins to replace the revision that serves."""
        self._require(context, "admin")
        spec = rollout_messages.read_spec(request.spec)
        made = await self._coordinator.start_rollout(ids.new_request_id(), spec)
        return pb.CreateRolloutResponse(rollout=self._rollout(made))

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.GetRolloutResponse:
        """One rollout."""
        self._require(context, "admin")
        found = self._coordinator.rollouts.find(request.rollout_id)
        return pb.GetRolloutResponse(rollout=self._rollout(found))

    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: Context
    ) -> pb.ListRolloutsResponse:
        """Rollouts, newest first."""
        self._require(context, "admin")
        found = self._coordinator.rollouts.all
        wanted = [one for one in found if request.model in {"", one.spec.model}]
        return pb.ListRolloutsResponse(rollouts=[self._rollout(one) for one in wanted])

    async def WatchRollout(
        self, request: pb.WatchRolloutRequest, context: Context
    ) -> AsyncIterator[pb.WatchRolloutResponse]:
        """One rollout, again at every change of it or of its workers, until its end."""
        self._require(context, "admin")
        told = None
        while True:
            # Another controller may lead by now, and then this one knows nothing any more.
            rollouts = self._coordinator.rollouts
            found = rollouts.find(request.rollout_id)
            message = self._rollout(found)
            if message != told:
                told = message
                yield pb.WatchRolloutResponse(rollout=message)
            if found.ended:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await rollouts.changed()

    async def PromoteRollout(
        self, request: pb.PromoteRolloutRequest, context: Context
    ) -> pb.PromoteRolloutResponse:
        """Ends the judging, or the way back: the new revision stays."""
        after = await self._tell(request.rollout_id, Promoted(), context)
        return pb.PromoteRolloutResponse(rollout=after)

    async def RollBackRollout(
        self, request: pb.RollBackRolloutRequest, context: Context
    ) -> pb.RollBackRolloutResponse:
        """Gives the route back to the old revision."""
        after = await self._tell(request.rollout_id, TakenBack(), context)
        return pb.RollBackRolloutResponse(rollout=after)

    async def CancelRollout(
        self, request: pb.CancelRolloutRequest, context: Context
    ) -> pb.CancelRolloutResponse:
        """Ends a rollout, wherever it is; the old revision serves."""
        after = await self._tell(request.rollout_id, Cancelled(), context)
        return pb.CancelRolloutResponse(rollout=after)

    async def PauseRollout(
        self, request: pb.PauseRolloutRequest, context: Context
    ) -> pb.PauseRolloutResponse:
        """Holds a rollout where it is."""
        return pb.PauseRolloutResponse(rollout=await self._tell(request.rollout_id, Paused(), context))

    async def ResumeRollout(
        self, request: pb.ResumeRolloutRequest, context: Context
    ) -> pb.ResumeRolloutResponse:
        """Lets a rollout that was held go on."""
        return pb.ResumeRolloutResponse(rollout=await self._tell(request.rollout_id, Resumed(), context))

    async def ListBreakers(
        self, request: pb.ListBreakersRequest, context: Context
    ) -> pb.ListBreakersResponse:
        """The breakers of all gateways, as they were within the last second, and held as they shall be."""
        self._require(context, "admin")
        shown = await self._shown_breakers()
        holds = await self._breakers.holds() if shown else {}
        return pb.ListBreakersResponse(breakers=breaker_messages(obeyed(shown, holds)))

    async def ForceBreaker(
        self, request: pb.ForceBreakerRequest, context: Context
    ) -> pb.ForceBreakerResponse:
        """Holds a breaker, or lets it go; gateways obey within a second, and are shown as if they had."""
        self._require(context, "admin")
        target, state = read_hold(request)
        # Whoever stands by says so before anything is held.
        _ = self._leadership.term
        shown, workers = await self._shown_breakers(), self._coordinator.members(Kind.WORKER)
        if self._coordinator.reunion.is_over():
            # Before, one that is not here yet may be the one that is meant.
            check_target(target, shown, (member.id for member in workers), await self._breakers.holds())
        await self._breakers.hold(target, state)
        logs.get_logger().warning("breaker.held", target=target, state=state)
        changed = obeyed((one for one in shown if one.target == target), {target: state})
        return pb.ForceBreakerResponse(breakers=breaker_messages(changed))

    async def _shown_breakers(self) -> tuple[BreakerRecord, ...]:
        gateways = [member.id for member in self._coordinator.members(Kind.GATEWAY)]
        return await self._breakers.list_breakers(gateways)

    async def _tell(self, rollout_id: str, event: Event, context: Context) -> rollout_pb2.Rollout:
        self._require(context, "admin")
        return self._rollout(await self._coordinator.tell_rollout(rollout_id, event))

    def _rollout(self, rollout: Rollout) -> rollout_pb2.Rollout:
        return rollout_messages.rollout_message(rollout, self._coordinator.members(Kind.WORKER))

    def _require(self, context: Context, *scopes: str) -> None:
        """Raises unless the call carries a token with one of `scopes`."""
        token = bearer_token(tuple(context.invocation_metadata() or ()))
        self._verifier.verify(token).require(*scopes)


def _check_named(**names: str) -> None:
    """Raises ArgumentInvalid for a name that was left out."""
    for field, name in names.items():
        if not name:
            raise ArgumentInvalid(f"{field}: missing.")


async def _listen(coordinator: Coordinator, key: MemberKey, requests: Requests, outbox: MemberOutbox) -> None:
    """Takes in what a member says; its half-close is a goodbye."""
    try:
        async for request in requests:
            coordinator.hear(key, outbox, read_report(request))
    except EventIllegal as error:
        outbox.fail(ArgumentInvalid(str(error)))
    except InterlockError as error:
        outbox.fail(error)
    except Exception as error:  # noqa: BLE001 - a defect here must end this stream, not leave it deaf
        logs.get_logger().error("member.unheard", exc_info=error)
        outbox.end("The controller could not take in a message.")
    else:
        # A broken call looks like a half-close for a moment, until its handler is cancelled.
        await asyncio.sleep(GOODBYE_S)
        coordinator.detach(key, outbox, farewell=True)
        outbox.fail(None)
