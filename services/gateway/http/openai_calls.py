"""The OpenAI API's calls. Owns: when which body goes out; what bodies look like is `openai`'s."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from services.common import logs
from services.common.errors import InternalError
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Event, Finished, Started
from services.gateway.core.params import Decode
from services.gateway.dispatcher.reception import GENERATE_SCOPE, MODELS_SCOPE, Reception
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.http import openai, openai_fields, tool_calls
from services.gateway.http.openai import Head
from services.gateway.http.openai_fields import OpenAiRequest
from services.gateway.http.reply import JSON_TYPE, Answer, Reply, event, timely_events, whole_answer
from services.gateway.http.tool_calls import ToolCall

Bodies = AsyncGenerator[HttpBody, None]
Read = Callable[[bytes, str], OpenAiRequest]


async def create_chat_completion(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/chat/completions`: one completion, or its chunks."""
    reply = Reply(context, openai)
    try:
        asked, generation = await _open(reception, request, context, reply, openai_fields.read_chat)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                await reply.begin(generation)
                yield _json(_chat_body(reception, reply, asked, answer))
                return
            async with aclosing(timely_events(generation, reply)) as events:
                async for body in _chat_stream(reception, reply, asked, events):
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def create_completion(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/completions`: one completion, or its chunks."""
    reply = Reply(context, openai)
    try:
        asked, generation = await _open(reception, request, context, reply, openai_fields.read_completion)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                await reply.begin(generation)
                head = _head(reply, "cmpl-", answer.started)
                scores = _completion_scores(reception, asked, head, answer.chunks, len(asked.echo))
                text = asked.echo + answer.text
                yield _json(openai.completion_body(head, text, answer.finished, scores))
                return
            async with aclosing(timely_events(generation, reply)) as events:
                async for body in _completion_stream(reception, reply, asked, events):
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def list_models(reception: Reception, context: Context) -> Bodies:
    """`GET /v1/models`."""
    reply = Reply(context, openai)
    try:
        reception.authenticate(_metadata(context), MODELS_SCOPE, GENERATE_SCOPE)
        names = [entry.model for entry in reception.models()]
        yield await reply.whole(openai.models_body(names, _now_s()))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def get_model(reception: Reception, name: str, context: Context) -> Bodies:
    """`GET /v1/models/{model}`."""
    reply = Reply(context, openai)
    try:
        reception.authenticate(_metadata(context), MODELS_SCOPE, GENERATE_SCOPE)
        entry = reception.model(name)
        yield await reply.whole(openai.model_body(entry.model, _now_s()))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def _open(
    reception: Reception, request: HttpBody, context: Context, reply: Reply, read: Read
) -> tuple[OpenAiRequest, AnswerStream]:
    metadata = _metadata(context)
    principal = reception.authenticate(metadata, GENERATE_SCOPE)
    asked = read(request.data, request.content_type)
    logs.annotate(request_id=reply.request_id, subject=principal.subject)
    timeout_s = reception.timeout_s(metadata, context.time_remaining())
    generation = await reception.generate(principal, reply.request_id, asked.generation, timeout_s)
    return asked, generation


def _chat_body(reception: Reception, reply: Reply, asked: OpenAiRequest, answer: Answer) -> bytes:
    head = _head(reply, "chatcmpl-", answer.started)
    text, calls = answer.text, list[ToolCall]()
    if asked.tools:
        call_id = f"call_{reply.request_id}_"
        text, calls = tool_calls.read_calls(text, asked.tools, call_id, forced=asked.forced)
    scores = None
    if asked.generation.logprobs is not None:
        scores = openai.chat_logprobs(answer.chunks, _decode(reception, head))
    return openai.chat_body(head, text, calls, answer.finished, scores)


async def _chat_stream(
    reception: Reception, reply: Reply, asked: OpenAiRequest, events: AsyncGenerator[Event | None, None]
) -> Bodies:
    stream: _ChatStream | None = None
    async for happened in events:
        match happened:
            case None:
                yield event(openai.heartbeat_body())
            case Started() if stream is None:
                # Said again after a failover, which the vendor's clients know nothing of.
                stream = _ChatStream(_head(reply, "chatcmpl-", happened), asked, reception)
                yield event(openai.chat_opening(stream.head, usage=asked.usage))
            case Chunk() | Finished():
                assert stream is not None
                for data in stream.said(happened):
                    yield event(data)


class _ChatStream:
    """The chunks of one conversation's completion."""

    def __init__(self, head: Head, asked: OpenAiRequest, reception: Reception) -> None:
        self.head = head
        self._asked = asked
        self._reception = reception
        ids = head.id.replace("chatcmpl-", "call_")
        self._text = tool_calls.HeldText(asked.tools, f"{ids}_", forced=asked.forced)

    def said(self, happened: Chunk | Finished) -> Iterator[bytes]:
        """The chunks that follow from an event."""
        if isinstance(happened, Finished):
            yield from self._end(happened)
            return
        text = self._text.add(happened.text)
        if text is None:
            return
        scores = None
        if self._asked.generation.logprobs is not None:
            scores = openai.chat_logprobs([happened], _decode(self._reception, self.head))
        if text or scores:
            yield openai.chat_text(self.head, text, scores, usage=self._asked.usage)

    def _end(self, finished: Finished) -> Iterator[bytes]:
        asked, head = self._asked, self.head
        text, calls = self._text.end()
        if text:
            yield openai.chat_text(head, text, None, usage=asked.usage)
        if calls:
            yield openai.chat_calls(head, calls, usage=asked.usage)
        yield openai.chat_closing(head, finished, calls=bool(calls), usage=asked.usage)


async def _completion_stream(
    reception: Reception, reply: Reply, asked: OpenAiRequest, events: AsyncGenerator[Event | None, None]
) -> Bodies:
    head: Head | None = None
    said = 0
    async for happened in events:
        match happened:
            case None:
                yield event(openai.heartbeat_body())
            case Started() if head is None:
                head = _head(reply, "cmpl-", happened)
                if asked.echo:
                    said = len(asked.echo)
                    yield event(openai.completion_text(head, asked.echo, None, usage=asked.usage))
            case Chunk():
                assert head is not None
                scores = _completion_scores(reception, asked, head, (happened,), said)
                said += len(happened.text)
                if happened.text or scores:
                    yield event(openai.completion_text(head, happened.text, scores, usage=asked.usage))
            case Finished():
                assert head is not None
                yield event(openai.completion_closing(head, happened, usage=asked.usage))


def _completion_scores(
    reception: Reception, asked: OpenAiRequest, head: Head, chunks: tuple[Chunk, ...], offset: int
) -> dict[str, Any] | None:
    if asked.generation.logprobs is None:
        return None
    return openai.completion_logprobs(chunks, _decode(reception, head), offset)


def _decode(reception: Reception, head: Head) -> Decode:
    decode = reception.decoder(head.model)
    if decode is None:
        raise InternalError("The model was replaced while it answered.")
    return decode


def _head(reply: Reply, prefix: str, started: Started) -> Head:
    return Head(prefix + reply.request_id, _now_s(), started.model, started.revision)


def _now_s() -> int:
    return int(time.time())


def _metadata(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    return tuple(context.invocation_metadata() or ())


def _json(data: bytes) -> HttpBody:
    return HttpBody(content_type=JSON_TYPE, data=data)
