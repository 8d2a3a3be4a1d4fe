"""The HTTP face. Owns: the translation between `google.api.HttpBody` and the reception; it decides nothing.

Envoy passes bodies as they are. A reply whose status is not 200 names it in the initial metadata
`x-interlock-status`, and ends with gRPC's OK: so that every byte of an error is ours. After the first byte
nothing but an event can tell of an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2_grpc

from services.common import http_errors, ids, logs, status
from services.common.errors import InternalError, NoWorker
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Finished
from services.gateway.core.readiness import Readiness
from services.gateway.dispatcher.reception import GENERATE_SCOPE, Reception
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.http import native
from services.gateway.servicer import REQUEST_ID_KEY, note_worker, response_metadata

# Status and headers wait this long for the grant, so that most responses name revision and worker.
GRANT_WAIT_S = 5.0
# Proxies give up on connections that are silent for a minute; some sooner.
HEARTBEAT_S = 10.0


class GatewayHttpServicer(http_service_pb2_grpc.GatewayHttpServiceServicer):
    """`interlock.http.v1.GatewayHttpService` over a reception."""

    def __init__(self, reception: Reception, readiness: Readiness) -> None:
        self._reception = reception
        self._readiness = readiness

    async def Generate(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The native API: one result, or server-sent events."""
        reply = _Reply(context)
        try:
            asked, generation = await self._open(request, context, reply)
            async with aclosing(generation):
                bodies = _stream(generation, reply) if asked.stream else _whole(generation, reply)
                async with aclosing(bodies):
                    async for body in bodies:
                        yield body
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            yield await reply.failed(error)

    async def Healthz(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """Alive."""
        del request
        await _Reply(context).begin(None)
        yield HttpBody(content_type=native.JSON_TYPE, data=b'{"status":"alive"}')

    async def Readyz(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """Ready, or why not."""
        del request
        obstacle, reply = self._readiness.obstacle(), _Reply(context)
        if obstacle is None:
            await reply.begin(None)
            yield HttpBody(content_type=native.JSON_TYPE, data=b'{"status":"ready"}')
        else:
            yield await reply.failed(NoWorker(obstacle, retry_after_s=1.0))

    async def _open(
        self, request: HttpBody, context: Context, reply: _Reply
    ) -> tuple[native.NativeRequest, AnswerStream]:
        metadata = tuple(context.invocation_metadata() or ())
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        asked = native.read_request(request.data, request.content_type)
        reply.request_id = self._reception.request_id(asked.generation.request_id or reply.request_id)
        logs.annotate(request_id=reply.request_id, subject=principal.subject)
        timeout_s = self._reception.timeout_s(metadata, context.time_remaining())
        generation = await self._reception.generate(principal, reply.request_id, asked.generation, timeout_s)
        return asked, generation


class _Reply:
    """One reply on its way: knows whether its headers are gone."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._begun = False
        self.request_id = ids.new_request_id()

    async def begin(self, generation: AnswerStream | None) -> None:
        """Sends status 200 and the headers."""
        self._begun = True
        await self._context.send_initial_metadata(response_metadata(self.request_id, generation))

    async def failed(self, error: Exception) -> HttpBody:
        """Returns the body that tells of `error`, in the way that is still open."""
        told = status.as_interlock_error(error)
        if told is not error:
            logs.get_logger().error("rpc.crashed", request_id=self.request_id, exc_info=error)
        logs.annotate(http_status=http_errors.status_of(told), reason=told.reason)
        if self._begun:
            return HttpBody(
                content_type=native.EVENTS_TYPE, data=native.error_event_body(told, self.request_id)
            )
        self._begun = True
        headers = ((REQUEST_ID_KEY, self.request_id), *http_errors.headers(told))
        await self._context.send_initial_metadata(headers)
        return HttpBody(content_type=native.JSON_TYPE, data=native.error_body(told, self.request_id))


async def _whole(generation: AnswerStream, reply: _Reply) -> AsyncGenerator[HttpBody, None]:
    """Waits for the end; the headers wait with it, so an error still has its status."""
    chunks: list[Chunk] = []
    finished: Finished | None = None
    async for event in generation:
        note_worker(event)
        if isinstance(event, Chunk):
            chunks.append(event)
        elif isinstance(event, Finished):
            finished = event
    started = generation.started
    if started is None or finished is None:
        raise InternalError("The request ended without a result.")
    await reply.begin(generation)
    body = native.result_body(chunks, started, finished)
    yield HttpBody(content_type=native.JSON_TYPE, data=body)


async def _stream(generation: AnswerStream, reply: _Reply) -> AsyncGenerator[HttpBody, None]:
    """Sends each event as it comes, and a heartbeat where none does."""
    started = await generation.first_grant(GRANT_WAIT_S)
    if started is None and generation.error is not None:
        raise generation.error
    await reply.begin(generation)
    while True:
        if not await generation.ready(HEARTBEAT_S):
            yield _event(native.heartbeat_body())
            continue
        event = await anext(generation, None)
        if event is None:
            return
        note_worker(event)
        yield _event(native.event_body(generation.cursor, event))


def _event(data: bytes) -> HttpBody:
    return HttpBody(content_type=native.EVENTS_TYPE, data=data)
