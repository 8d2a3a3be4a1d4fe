"""The admin paths under HTTP. Owns: how the ControllerService looks as JSON and as server-sent events.

Envoy maps the paths to these methods: names in a path or a query become fields of the request, bodies pass as
they are. A status other than 200 travels in the initial metadata `x-interlock-status`. Decides nothing: each
method is the one of the same name in the ControllerService, which looks at the caller's token as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from google.protobuf.message import Message
from interlock.http.v1 import http_service_pb2 as http_pb
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2 as pb

from services.common import http_errors, ids, logs, status
from services.common.errors import ArgumentInvalid
from services.common.grpc_types import Context
from services.common.http_types import EVENTS_TYPE, JSON_TYPE
from services.common.strict_json import read_object
from services.common.tokens import TokenVerifier, bearer_token

SERVICE = "interlock.http.v1.AdminHttpService"
REQUEST_ID_KEY = "x-request-id"
# Proxies give up on connections that are silent for a minute; some sooner.
HEARTBEAT_S = 10.0
# Of a mistake in a body: enough for its field, too little for what was sent.
_TOLD_MAX = 200

Request = TypeVar("Request", bound=Message)
Bodies = AsyncIterator[HttpBody]


class AdminHttpServicer(http_service_pb2_grpc.AdminHttpServiceServicer):
    """The ControllerService as JSON, field names as in the protos.

    Args:
        controller: The ControllerService: an object with its methods.
        verifier: Believes the operators' tokens.
    """

    def __init__(self, controller: Any, verifier: TokenVerifier) -> None:
        self._controller = controller
        self._verifier = verifier

    async def ListModels(self, request: HttpBody, context: Context) -> Bodies:
        """`GET /v1/admin/models`."""
        del request
        yield await self._answer(
            context, self._controller.ListModels, pb.ControllerServiceListModelsRequest()
        )

    async def ListRevisions(self, request: http_pb.OfModel, context: Context) -> Bodies:
        """`GET /v1/admin/revisions?model=`."""
        wanted = pb.ListRevisionsRequest(model=request.model)
        yield await self._answer(context, self._controller.ListRevisions, wanted)

    async def GetRevision(self, request: http_pb.OneRevision, context: Context) -> Bodies:
        """`GET /v1/admin/revisions/{model}/{revision}`."""
        wanted = pb.GetRevisionRequest(model=request.model, revision=request.revision)
        yield await self._answer(context, self._controller.GetRevision, wanted)

    async def DeleteRevision(self, request: http_pb.OneRevision, context: Context) -> Bodies:
        """`DELETE /v1/admin/revisions/{model}/{revision}`."""
        wanted = pb.DeleteRevisionRequest(model=request.model, revision=request.revision)
        yield await self._answer(context, self._controller.DeleteRevision, wanted)

    async def CreateRollout(self, request: HttpBody, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts` with a RolloutSpec."""

        def read() -> pb.CreateRolloutRequest:
            wanted = pb.CreateRolloutRequest()
            _read(request, wanted.spec)
            # An empty spec is there, too: the controller says what it lacks.
            wanted.spec.SetInParent()
            return wanted

        yield await self._answer(context, self._controller.CreateRollout, read)

    async def ListRollouts(self, request: http_pb.OfModel, context: Context) -> Bodies:
        """`GET /v1/admin/rollouts`, with `?model=` those of one model."""
        wanted = pb.ListRolloutsRequest(model=request.model)
        yield await self._answer(context, self._controller.ListRollouts, wanted)

    async def GetRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`GET /v1/admin/rollouts/{rollout_id}`."""
        wanted = pb.GetRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.GetRollout, wanted)

    async def WatchRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`GET /v1/admin/rollouts/{rollout_id}/events`: an event `rollout` at every change, until its end."""
        begun = False
        request_id = ids.new_request_id()
        try:
            wanted = pb.WatchRolloutRequest(rollout_id=request.rollout_id)
            watching = self._controller.WatchRollout(wanted, context)
            async with aclosing(_timely(watching)) as responses:
                async for response in responses:
                    if not begun:
                        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
                        begun = True
                    yield _events(b": waiting\n\n" if response is None else _event("rollout", response))
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            if not begun:
                yield await _refusal(context, error, request_id)
            else:
                yield _events(b"event: error\ndata: %s\n\n" % _told(error, request_id))

    async def PromoteRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts/{rollout_id}/promote`."""
        wanted = pb.PromoteRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.PromoteRollout, wanted)

    async def RollBackRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts/{rollout_id}/rollback`."""
        wanted = pb.RollBackRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.RollBackRollout, wanted)

    async def CancelRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts/{rollout_id}/cancel`."""
        wanted = pb.CancelRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.CancelRollout, wanted)

    async def PauseRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts/{rollout_id}/pause`."""
        wanted = pb.PauseRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.PauseRollout, wanted)

    async def ResumeRollout(self, request: http_pb.OneRollout, context: Context) -> Bodies:
        """`POST /v1/admin/rollouts/{rollout_id}/resume`."""
        wanted = pb.ResumeRolloutRequest(rollout_id=request.rollout_id)
        yield await self._answer(context, self._controller.ResumeRollout, wanted)

    async def ListWorkers(self, request: HttpBody, context: Context) -> Bodies:
        """`GET /v1/admin/workers`."""
        del request
        yield await self._answer(context, self._controller.ListWorkers, pb.ListWorkersRequest())

    async def DrainWorker(self, request: http_pb.OneWorker, context: Context) -> Bodies:
        """`POST /v1/admin/workers/{worker_id}/drain`."""
        wanted = pb.DrainWorkerRequest(worker_id=request.worker_id)
        yield await self._answer(context, self._controller.DrainWorker, wanted)

    async def ListBreakers(self, request: HttpBody, context: Context) -> Bodies:
        """`GET /v1/admin/breakers`."""
        del request
        yield await self._answer(context, self._controller.ListBreakers, pb.ListBreakersRequest())

    async def ForceBreaker(self, request: HttpBody, context: Context) -> Bodies:
        """`POST /v1/admin/breakers` with a ForceBreakerRequest."""
        yield await self._answer(
            context, self._controller.ForceBreaker, lambda: _read(request, pb.ForceBreakerRequest())
        )

    async def RevokeToken(self, request: HttpBody, context: Context) -> Bodies:
        """`POST /v1/admin/tokens/revoke` with a RevokeTokenRequest."""
        yield await self._answer(
            context, self._controller.RevokeToken, lambda: _read(request, pb.RevokeTokenRequest())
        )

    async def _answer(
        self,
        context: Context,
        method: Callable[[Any, Context], Awaitable[Message]],
        request: Message | Callable[[], Message],
    ) -> HttpBody:
        """The JSON of one call; whatever it raises becomes a body as well."""
        request_id = ids.new_request_id()
        try:
            if callable(request):
                # Who may not call it learns that before a body is read.
                token = bearer_token(tuple(context.invocation_metadata() or ()))
                self._verifier.verify(token).require("admin")
                request = request()
            response = await method(request, context)
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            return await _refusal(context, error, request_id)
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        return HttpBody(content_type=JSON_TYPE, data=_json(response))


async def _refusal(context: Context, error: Exception, request_id: str) -> HttpBody:
    """The body of a failed call; its status goes ahead in the metadata."""
    data = _told(error, request_id)
    metadata = (*http_errors.headers(status.as_interlock_error(error)), (REQUEST_ID_KEY, request_id))
    await context.send_initial_metadata(metadata)
    return HttpBody(content_type=JSON_TYPE, data=data)


def _told(error: Exception, request_id: str) -> bytes:
    told = status.as_interlock_error(error)
    if told is not error:
        logs.get_logger().error("rpc.crashed", request_id=request_id, exc_info=error)
    logs.annotate(request_id=request_id, http_status=http_errors.status_of(told), reason=told.reason)
    return json.dumps({"error": http_errors.fields(told, request_id)}).encode()


async def _timely(responses: AsyncIterator[Message]) -> AsyncGenerator[Message | None, None]:
    """Each response as it comes, and None where none does for a while."""
    coming: asyncio.Task[Message | None] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(anext(responses, None))
            done, _ = await asyncio.wait({coming}, timeout=HEARTBEAT_S)
            if not done:
                yield None
                continue
            response, coming = coming.result(), None
            if response is None:
                return
            yield response
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})


def _read(body: HttpBody, message: Request) -> Request:
    """Reads a body into `message`: exactly one JSON object, every field known."""
    fields = read_object(body.data)
    try:
        json_format.ParseDict(fields, message)
    except json_format.ParseError as error:
        # The first line names the field; the rest would list what the message has.
        told = ascii(str(error).partition("\n")[0][:_TOLD_MAX])[1:-1]
        raise ArgumentInvalid(f"The body does not fit: {told}") from None
    return message


def _json(message: Message) -> bytes:
    text = json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
    )
    return text.encode()


def _event(name: str, message: Message) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _json(message))


def _events(data: bytes) -> HttpBody:
    return HttpBody(content_type=EVENTS_TYPE, data=data)
