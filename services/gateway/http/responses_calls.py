"""The Responses API's call. Owns: when which body goes out; what bodies look like is `responses`'s."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody

from services.common import logs
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Event, Finished, Started
from services.gateway.dispatcher.reception import GENERATE_SCOPE, Reception
from services.gateway.http import responses, responses_fields, tool_calls
from services.gateway.http.bodies import read_body
from services.gateway.http.reply import Reply, streamed, whole_answer
from services.gateway.http.responses_fields import ResponsesRequest

Bodies = AsyncGenerator[HttpBody, None]


async def create_response(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/responses`: one response, or its events."""
    reply = Reply(context, responses)
    try:
        metadata = tuple(context.invocation_metadata() or ())
        principal = reception.authenticate(metadata, GENERATE_SCOPE)
        asked = await read_body(request, responses_fields.read_responses)
        reply.names = asked.names
        logs.annotate(request_id=reply.request_id, subject=principal.subject)
        timeout_s = reception.timeout_s(metadata, context.time_remaining())
        generation = await reception.generate(principal, reply.request_id, asked.generation, timeout_s)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                head = _head(reply, asked, answer.started)
                text, calls = tool_calls.read_calls(
                    answer.text, asked.tools, _call_ids(reply), bare=asked.bare, single=asked.single
                )
                data = responses.response_body(head, text, calls, answer.finished)
                yield await reply.whole(data, generation)
                return
            say = _ResponseStream(reply, asked).said
            async with aclosing(streamed(generation, reply, say)) as bodies:
                async for body in bodies:
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


class _ResponseStream:
    """The events of one response."""

    def __init__(self, reply: Reply, asked: ResponsesRequest) -> None:
        self._reply = reply
        self._asked = asked
        self._events: responses.Events | None = None
        self._held = tool_calls.HeldText(asked.tools, _call_ids(reply), bare=asked.bare, single=asked.single)

    def said(self, happened: Event) -> Iterator[bytes]:
        """The events that follow from one of ours."""
        events = self._events
        match happened:
            case Started() if events is None:
                # Said again after a failover, which the vendor's clients know nothing of.
                self._events = events = responses.Events(_head(self._reply, self._asked, happened))
                yield events.opening()
            case Chunk():
                assert events is not None
                if text := self._held.add(happened.text):
                    yield events.delta(text)
            case Finished():
                assert events is not None
                text, calls = self._held.end()
                if text:
                    yield events.delta(text)
                yield events.closing(happened, calls)


def _call_ids(reply: Reply) -> str:
    return f"{responses.CALL_PREFIX}{reply.request_id}_"


def _head(reply: Reply, asked: ResponsesRequest, started: Started) -> responses.Head:
    return responses.Head(reply.request_id, int(time.time()), started.model, asked.told)
