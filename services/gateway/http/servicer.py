"""The HTTP face. Owns: the translation between `google.api.HttpBody` and the reception; it decides nothing.

Envoy passes bodies as they are. What a reply is, and how a failure is told: `reply`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2 as pb
from interlock.http.v1 import http_service_pb2_grpc

from services.common import logs
from services.common.errors import NoWorker
from services.common.grpc_types import Context
from services.gateway.core.events import Event
from services.gateway.core.readiness import Readiness
from services.gateway.dispatcher.reception import GENERATE_SCOPE, Metadata, Reception
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.http import anthropic_calls, console, native, openai_calls, openapi, responses_calls
from services.gateway.http.bodies import read_body, written
from services.gateway.http.reply import Reply, streamed, whole_answer

LAST_EVENT_KEY = "last-event-id"


class GatewayHttpServicer(http_service_pb2_grpc.GatewayHttpServiceServicer):
    """`interlock.http.v1.GatewayHttpService` over a reception."""

    def __init__(self, reception: Reception, readiness: Readiness) -> None:
        self._reception = reception
        self._readiness = readiness

    async def Generate(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The native API: one result, or server-sent events."""
        reply = Reply(context, native)
        try:
            asked, generation = await self._open(request, context, reply)
            async with aclosing(generation):
                bodies = _stream(generation, reply) if asked.stream else _whole(generation, reply)
                async with aclosing(bodies):
                    async for body in bodies:
                        yield body
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            yield await reply.failed(error)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[HttpBody]:
        """The events of a resumable request behind the cursor that `last-event-id` names."""
        reply = Reply(context, native)
        try:
            generation = await self._open_again(request, context, reply)
            async with aclosing(generation), aclosing(_stream(generation, reply)) as bodies:
                async for body in bodies:
                    yield body
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            yield await reply.failed(error)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> AsyncIterator[HttpBody]:
        """Ends a request of the caller's own subject."""
        reply = Reply(context, native)
        try:
            principal = self._reception.authenticate(_metadata(context), GENERATE_SCOPE)
            reply.request_id = self._reception.request_id(request.request_id)
            logs.annotate(request_id=reply.request_id, subject=principal.subject)
            cancelled = await self._reception.cancel(principal, reply.request_id)
            yield await reply.whole(native.cancelled_body(reply.request_id, cancelled=cancelled))
        except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
            yield await reply.failed(error)

    async def CreateChatCompletion(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The OpenAI API: one completion of a conversation, or its chunks."""
        calls = openai_calls.create_chat_completion(self._reception, request, context)
        async with aclosing(calls) as bodies:
            async for body in bodies:
                yield body

    async def CreateCompletion(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The OpenAI API: one completion of a text, or its chunks."""
        calls = openai_calls.create_completion(self._reception, request, context)
        async with aclosing(calls) as bodies:
            async for body in bodies:
                yield body

    async def CreateResponse(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """OpenAI's Responses API: one response, or its events."""
        calls = responses_calls.create_response(self._reception, request, context)
        async with aclosing(calls) as bodies:
            async for body in bodies:
                yield body

    async def ListModels(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The models that can be asked, in the shape of the vendor whose client asks."""
        del request
        vendor = anthropic_calls if anthropic_calls.is_asked(context) else openai_calls
        async with aclosing(vendor.list_models(self._reception, context)) as bodies:
            async for body in bodies:
                yield body

    async def GetModel(self, request: pb.OneModel, context: Context) -> AsyncIterator[HttpBody]:
        """One model."""
        vendor = anthropic_calls if anthropic_calls.is_asked(context) else openai_calls
        async with aclosing(vendor.get_model(self._reception, request.model, context)) as bodies:
            async for body in bodies:
                yield body

    async def CreateMessage(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The Anthropic API: one message, or its events."""
        calls = anthropic_calls.create_message(self._reception, request, context)
        async with aclosing(calls) as bodies:
            async for body in bodies:
                yield body

    async def CountMessageTokens(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The Anthropic API: the tokens of a conversation."""
        calls = anthropic_calls.count_tokens(self._reception, request, context)
        async with aclosing(calls) as bodies:
            async for body in bodies:
                yield body

    async def Console(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The console page; it holds nothing that a token would have to protect."""
        del request
        await Reply(context, native).begin(more=console.HEADERS)
        yield HttpBody(content_type=console.TYPE, data=console.PAGE)

    async def OpenApi(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """The description of every path."""
        del request
        yield await Reply(context, native).whole(openapi.BODY)

    async def Healthz(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """Alive."""
        del request
        yield await Reply(context, native).whole(b'{"status":"alive"}')

    async def Readyz(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """Ready, or why not."""
        del request
        obstacle, reply = self._readiness.obstacle(), Reply(context, native)
        if obstacle is None:
            yield await reply.whole(b'{"status":"ready"}')
        else:
            yield await reply.failed(NoWorker(obstacle, retry_after_s=1.0))

    async def _open(
        self, request: HttpBody, context: Context, reply: Reply
    ) -> tuple[native.NativeRequest, AnswerStream]:
        metadata = _metadata(context)
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        asked = await read_body(request, native.read_request)
        reply.request_id = self._reception.request_id(asked.generation.request_id or reply.request_id)
        logs.annotate(request_id=reply.request_id, subject=principal.subject)
        timeout_s = self._reception.timeout_s(metadata, context.time_remaining())
        generation = await self._reception.generate(principal, reply.request_id, asked.generation, timeout_s)
        return asked, generation

    async def _open_again(self, request: pb.ResumeRequest, context: Context, reply: Reply) -> AnswerStream:
        metadata = _metadata(context)
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        reply.request_id = self._reception.request_id(request.request_id)
        last_event_id = next((str(value) for key, value in metadata if key == LAST_EVENT_KEY), None)
        # Browsers send the header; who cannot says `?cursor=`.
        cursor = request.cursor if last_event_id is None else native.read_cursor(last_event_id)
        logs.annotate(request_id=reply.request_id, subject=principal.subject, cursor=cursor)
        return await self._reception.resume(principal, reply.request_id, cursor)


def _metadata(context: Context) -> Metadata:
    return tuple(context.invocation_metadata() or ())


async def _whole(generation: AnswerStream, reply: Reply) -> AsyncGenerator[HttpBody, None]:
    """Waits for the end; the headers wait with it."""
    answer = await whole_answer(generation)
    yield await reply.whole(await written(answer, native.result_body), generation)


async def _stream(generation: AnswerStream, reply: Reply) -> AsyncGenerator[HttpBody, None]:
    """Sends each event as it comes, and a heartbeat where none does."""

    def say(happened: Event) -> Iterable[bytes]:
        return native.event_body(generation.cursor, happened)

    async with aclosing(streamed(generation, reply, say)) as bodies:
        async for body in bodies:
            yield body
