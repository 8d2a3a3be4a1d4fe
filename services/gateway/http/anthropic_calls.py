"""The Anthropic API's calls. Owns: when which body goes out; what bodies look like is `anthropic`'s."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody

from services.common import logs
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Event, Finished, Started
from services.gateway.dispatcher.reception import GENERATE_SCOPE, MODELS_SCOPE, Reception
from services.gateway.http import anthropic, anthropic_fields, tool_calls
from services.gateway.http.anthropic_fields import MessagesRequest
from services.gateway.http.bodies import read_body
from services.gateway.http.reply import Reply, streamed, whole_answer

Bodies = AsyncGenerator[HttpBody, None]

# What tells the two vendors apart where they have the same path.
VERSION_KEY = "anthropic-version"


async def create_message(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/messages`: one message, or its events."""
    reply = Reply(context, anthropic)
    try:
        metadata = tuple(context.invocation_metadata() or ())
        principal = reception.authenticate(metadata, GENERATE_SCOPE)
        asked = await read_body(request, anthropic_fields.read_messages)
        reply.names = asked.names
        logs.annotate(request_id=reply.request_id, subject=principal.subject)
        timeout_s = reception.timeout_s(metadata, context.time_remaining())
        generation = await reception.generate(principal, reply.request_id, asked.generation, timeout_s)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                text, calls = tool_calls.read_calls(
                    answer.text, asked.tools, _call_ids(reply), bare=asked.bare, single=asked.single
                )
                data = anthropic.message_body(
                    _message_id(reply), answer.started.model, text, calls, answer.finished
                )
                yield await reply.whole(data, generation)
                return
            say = _MessageStream(asked, reply, generation.prompt_tokens or 0).said
            async with aclosing(streamed(generation, reply, say)) as bodies:
                async for body in bodies:
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def count_tokens(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/messages/count_tokens`."""
    reply = Reply(context, anthropic)
    try:
        metadata = tuple(context.invocation_metadata() or ())
        principal = reception.authenticate(metadata, GENERATE_SCOPE)
        model, prompt = await read_body(request, anthropic_fields.read_counted)
        timeout_s = reception.timeout_s(metadata, context.time_remaining())
        count = await reception.count(principal, model, prompt, timeout_s)
        yield await reply.whole(anthropic.count_body(count.prompt_tokens))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def list_models(reception: Reception, context: Context) -> Bodies:
    """`GET /v1/models`, for the vendor's clients."""
    reply = Reply(context, anthropic)
    try:
        reception.authenticate(tuple(context.invocation_metadata() or ()), MODELS_SCOPE, GENERATE_SCOPE)
        models = [(entry.model, entry.context_tokens) for entry in reception.models()]
        yield await reply.whole(anthropic.models_body(models))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def get_model(reception: Reception, name: str, context: Context) -> Bodies:
    """`GET /v1/models/{model}`, for the vendor's clients."""
    reply = Reply(context, anthropic)
    try:
        reception.authenticate(tuple(context.invocation_metadata() or ()), MODELS_SCOPE, GENERATE_SCOPE)
        entry = reception.model(name)
        yield await reply.whole(anthropic.model_body(entry.model, entry.context_tokens))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


def is_asked(context: Context) -> bool:
    """Whether a caller names the version of this API, as the vendor's clients always do."""
    return any(key == VERSION_KEY for key, _ in context.invocation_metadata() or ())


class _MessageStream:
    """The events of one message."""

    def __init__(self, asked: MessagesRequest, reply: Reply, prompt_tokens: int) -> None:
        self._reply = reply
        self._prompt_tokens = prompt_tokens
        self._held = tool_calls.HeldText(asked.tools, _call_ids(reply), bare=asked.bare, single=asked.single)
        self._begun = False
        self._opened = False

    def said(self, happened: Event) -> Iterator[bytes]:
        """The events that follow from one of ours."""
        match happened:
            case Started() if not self._begun:
                # Said again after a failover, which the vendor's clients know nothing of.
                self._begun = True
                message_id = _message_id(self._reply)
                yield anthropic.opening_events(message_id, happened.model, self._prompt_tokens)
            case Chunk():
                if text := self._held.add(happened.text):
                    yield from self._text(text)
            case Finished():
                yield from self._end(happened)

    def _end(self, finished: Finished) -> Iterator[bytes]:
        text, calls = self._held.end()
        if text or not (calls or self._opened):
            yield from self._text(text)
        if self._opened:
            yield anthropic.text_closing()
        for at, call in enumerate(calls, start=int(self._opened)):
            yield anthropic.call_events(at, call)
        yield anthropic.closing_events(finished, calls=bool(calls))

    def _text(self, text: str) -> Iterator[bytes]:
        if not self._opened:
            self._opened = True
            yield anthropic.text_opening()
        if text:
            yield anthropic.text_event(text)


def _call_ids(reply: Reply) -> str:
    return f"toolu_{reply.request_id}_"


def _message_id(reply: Reply) -> str:
    return f"msg_{reply.request_id}"
