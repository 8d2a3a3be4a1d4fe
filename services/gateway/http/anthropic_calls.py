"""The Anthropic API's calls. Owns: when which body goes out; what bodies look like is `anthropic`'s."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody

from services.common import logs
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Event, Finished, Started
from services.gateway.dispatcher.reception import GENERATE_SCOPE, Reception
from services.gateway.http import anthropic, anthropic_fields
from services.gateway.http.reply import JSON_TYPE, Reply, event, timely_events, whole_answer

Bodies = AsyncGenerator[HttpBody, None]


async def create_message(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/messages`: one message, or its events."""
    reply = Reply(context, anthropic)
    try:
        metadata = tuple(context.invocation_metadata() or ())
        principal = reception.authenticate(metadata, GENERATE_SCOPE)
        asked = anthropic_fields.read_messages(request.data, request.content_type)
        logs.annotate(request_id=reply.request_id, subject=principal.subject)
        timeout_s = reception.timeout_s(metadata, context.time_remaining())
        prompt_tokens = 0
        if asked.stream:
            # The first event names them; for the others they come with the end.
            count = await reception.count(asked.generation.model, asked.generation.prompt)
            prompt_tokens = count.prompt_tokens
        generation = await reception.generate(principal, reply.request_id, asked.generation, timeout_s)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                await reply.begin(generation)
                started, text = answer.started, answer.text
                data = anthropic.message_body(_message_id(reply), started.model, text, answer.finished)
                yield HttpBody(content_type=JSON_TYPE, data=data)
                return
            async with aclosing(timely_events(generation, reply)) as events:
                async for body in _stream(events, reply, prompt_tokens):
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def count_tokens(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/messages/count_tokens`."""
    reply = Reply(context, anthropic)
    try:
        reception.authenticate(tuple(context.invocation_metadata() or ()), GENERATE_SCOPE)
        model, prompt = anthropic_fields.read_counted(request.data, request.content_type)
        count = await reception.count(model, prompt)
        yield await reply.whole(anthropic.count_body(count.prompt_tokens))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def _stream(events: AsyncGenerator[Event | None, None], reply: Reply, prompt_tokens: int) -> Bodies:
    begun = False
    async for happened in events:
        match happened:
            case None:
                yield event(anthropic.heartbeat_body())
            case Started() if not begun:
                # Said again after a failover, which the vendor's clients know nothing of.
                begun = True
                yield event(anthropic.opening_events(_message_id(reply), happened.model, prompt_tokens))
            case Chunk() if happened.text:
                yield event(anthropic.text_event(happened.text))
            case Finished():
                yield event(anthropic.closing_events(happened))


def _message_id(reply: Reply) -> str:
    return f"msg_{reply.request_id}"
