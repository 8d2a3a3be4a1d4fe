"""The OpenAI API's calls. Owns: when which body goes out; what bodies look like is `openai`'s."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from services.common import logs
from services.common.errors import InternalError
from services.common.grpc_types import Context
from services.gateway.core.events import Chunk, Event, Finished, Started, Usage
from services.gateway.core.ports import Tokenizer
from services.gateway.dispatcher.reception import GENERATE_SCOPE, MODELS_SCOPE, Reception
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.http import openai, openai_fields, tool_calls
from services.gateway.http.bodies import read_body, written
from services.gateway.http.offsets import TextOffsets
from services.gateway.http.openai import Head
from services.gateway.http.openai_fields import OpenAiRequest
from services.gateway.http.reply import Reply, streamed, whole_answer
from services.gateway.http.whole import Answer, Said

Bodies = AsyncGenerator[HttpBody, None]
Read = Callable[[bytes, str], OpenAiRequest]

# Nobody tells a gateway since when a model is there; it shall not look new at each call.
_STARTED_S = int(time.time())


async def create_chat_completion(reception: Reception, request: HttpBody, context: Context) -> Bodies:
    """`POST /v1/chat/completions`: one completion, or its chunks."""
    reply = Reply(context, openai)
    try:
        asked, generation = await _open(reception, request, context, reply, openai_fields.read_chat)
        async with aclosing(generation):
            if not asked.stream:
                answer = await whole_answer(generation)
                data = await written(answer, partial(_chat_body, reception, reply, asked))
                yield await reply.whole(data, generation)
                return
            say = _ChatStream(reception, reply, asked).said
            async with aclosing(streamed(generation, reply, say)) as bodies:
                async for body in bodies:
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
                data = await written(answer, partial(_completion_body, reception, reply, asked))
                yield await reply.whole(data, generation)
                return
            say = _CompletionStream(reception, reply, asked).said
            async with aclosing(streamed(generation, reply, say)) as bodies:
                async for body in bodies:
                    yield body
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def list_models(reception: Reception, context: Context) -> Bodies:
    """`GET /v1/models`."""
    reply = Reply(context, openai)
    try:
        reception.authenticate(_metadata(context), MODELS_SCOPE, GENERATE_SCOPE)
        names = [entry.model for entry in reception.models()]
        yield await reply.whole(openai.models_body(names, _STARTED_S))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def get_model(reception: Reception, name: str, context: Context) -> Bodies:
    """`GET /v1/models/{model}`."""
    reply = Reply(context, openai)
    try:
        reception.authenticate(_metadata(context), MODELS_SCOPE, GENERATE_SCOPE)
        entry = reception.model(name)
        yield await reply.whole(openai.model_body(entry.model, _STARTED_S))
    except Exception as error:  # noqa: BLE001 - an HTTP client cannot read a gRPC status
        yield await reply.failed(error)


async def _open(
    reception: Reception, request: HttpBody, context: Context, reply: Reply, read: Read
) -> tuple[OpenAiRequest, AnswerStream]:
    metadata = _metadata(context)
    principal = reception.authenticate(metadata, GENERATE_SCOPE)
    asked = await read_body(request, read)
    reply.names = asked.names
    logs.annotate(request_id=reply.request_id, subject=principal.subject)
    timeout_s = reception.timeout_s(metadata, context.time_remaining())
    generation = await reception.generate(principal, reply.request_id, asked.generation, timeout_s)
    return asked, generation


def _chat_body(reception: Reception, reply: Reply, asked: OpenAiRequest, answer: Answer) -> Iterable[bytes]:
    head = _head(reply, "chatcmpl-", answer.started)
    choices = [_chat_choice(reception, head, asked, said) for said in answer.sequences]
    return openai.chat_body(head, choices, answer.usage)


def _chat_choice(reception: Reception, head: Head, asked: OpenAiRequest, said: Said) -> dict[str, Any]:
    ids = _call_ids(head, said.finished.sequence)
    text, calls = tool_calls.read_calls(said.text, asked.tools, ids, bare=asked.bare, single=asked.single)
    scores = None
    if asked.generation.logprobs is not None:
        scores = openai.chat_logprobs(said.chunks, _tokenizer(reception, head).piece)
    return openai.chat_choice(text, calls, said.finished, scores)


class _ChatStream:
    """The chunks of a conversation's completion."""

    def __init__(self, reception: Reception, reply: Reply, asked: OpenAiRequest) -> None:
        self._reception = reception
        self._reply = reply
        self._asked = asked
        self._choices: list[_ChatChoice] = []
        self._used = Usage()

    def said(self, happened: Event) -> Iterator[bytes]:
        """The chunks that follow from an event."""
        asked = self._asked
        match happened:
            case Started() if not self._choices:
                # Said again after a failover, which the vendor's clients know nothing of.
                head = _head(self._reply, "chatcmpl-", happened)
                for index in range(asked.choices):
                    self._choices.append(_ChatChoice(head, index, asked, self._reception))
                    yield openai.chat_opening(head, index, usage=asked.usage)
            case Chunk():
                yield from self._choices[happened.sequence].said(happened)
            case Finished():
                yield from self._choices[happened.sequence].said(happened)
                self._used += happened.usage
                if happened.is_last:
                    yield openai.chat_closing(self._choices[0].head, self._used if asked.usage else None)


class _ChatChoice:
    """The chunks of one choice of a conversation's completion."""

    def __init__(self, head: Head, index: int, asked: OpenAiRequest, reception: Reception) -> None:
        self.head = head
        self.index = index
        self._asked = asked
        self._reception = reception
        ids = _call_ids(head, index)
        self._text = tool_calls.HeldText(asked.tools, ids, bare=asked.bare, single=asked.single)
        # What no scores were told of yet: those of a text that is held are held with it.
        self._unscored: list[Chunk] = []

    def said(self, happened: Chunk | Finished) -> Iterator[bytes]:
        """The chunks that follow from an event."""
        if isinstance(happened, Finished):
            yield from self._end(happened)
            return
        text = self._text.add(happened.text)
        if self._asked.generation.logprobs is not None:
            self._unscored.append(happened)
        if text is None:
            return
        scores = self._scores()
        if text or scores:
            yield from openai.chat_text(self.head, self.index, text, scores, usage=self._asked.usage)

    def _end(self, finished: Finished) -> Iterator[bytes]:
        asked, head = self._asked, self.head
        text, calls = self._text.end()
        scores = self._scores()
        if text or (scores and not calls):
            yield from openai.chat_text(head, self.index, text, scores, usage=asked.usage)
            scores = None
        if calls:
            yield from openai.chat_calls(head, self.index, calls, scores, usage=asked.usage)
        yield openai.chat_end(head, finished, calls=bool(calls), usage=asked.usage)

    def _scores(self) -> dict[str, Any] | None:
        """Those of the tokens since the last ones; None where there are none, or they were not asked for."""
        chunks, self._unscored = self._unscored, []
        return openai.chat_logprobs(chunks, _tokenizer(self._reception, self.head).piece) if chunks else None


def _completion_body(
    reception: Reception, reply: Reply, asked: OpenAiRequest, answer: Answer
) -> Iterable[bytes]:
    head = _head(reply, "cmpl-", answer.started)
    choices = [
        openai.completion_choice(
            asked.echo + said.text, said.finished, _TextScores(reception, asked, head).of(said.chunks)
        )
        for said in answer.sequences
    ]
    return openai.completion_body(head, choices, answer.usage)


class _CompletionStream:
    """The chunks of a text's completion."""

    def __init__(self, reception: Reception, reply: Reply, asked: OpenAiRequest) -> None:
        self._reception = reception
        self._reply = reply
        self._asked = asked
        self._head: Head | None = None
        self._scores: list[_TextScores] = []
        self._used = Usage()

    def said(self, happened: Event) -> Iterator[bytes]:
        """The chunks that follow from an event."""
        asked, head = self._asked, self._head
        match happened:
            case Started() if head is None:
                self._head = head = _head(self._reply, "cmpl-", happened)
                self._scores = [_TextScores(self._reception, asked, head) for _ in range(asked.choices)]
                for index in range(asked.choices if asked.echo else 0):
                    yield from openai.completion_text(head, index, asked.echo, None, usage=asked.usage)
            case Chunk(text=text, sequence=index):
                assert head is not None
                scores = self._scores[index].of((happened,))
                if text or scores:
                    yield from openai.completion_text(head, index, text, scores, usage=asked.usage)
            case Finished():
                assert head is not None
                self._used += happened.usage
                yield openai.completion_end(head, happened, usage=asked.usage)
                if happened.is_last:
                    yield openai.completion_closing(head, self._used if asked.usage else None)


class _TextScores:
    """The scores of one continuation of a text, as its tokens come."""

    def __init__(self, reception: Reception, asked: OpenAiRequest, head: Head) -> None:
        self._tokenizer = None if asked.generation.logprobs is None else _tokenizer(reception, head)
        self._offsets = None if self._tokenizer is None else TextOffsets(self._tokenizer.decode)

    def of(self, chunks: tuple[Chunk, ...]) -> dict[str, Any] | None:
        """Those of what was said next; None: they were not asked for."""
        if self._tokenizer is None or self._offsets is None:
            return None
        return openai.completion_logprobs(chunks, self._tokenizer.piece, self._offsets.next)


def _tokenizer(reception: Reception, head: Head) -> Tokenizer:
    tokenizer = reception.tokenizer(head.model)
    if tokenizer is None:
        raise InternalError("The model was replaced while it answered.")
    return tokenizer


def _call_ids(head: Head, index: int) -> str:
    """What the ids of a choice's calls begin with."""
    ids = head.id.replace("chatcmpl-", "call_")
    return f"{ids}_{index}_" if index else f"{ids}_"


def _head(reply: Reply, prefix: str, started: Started) -> Head:
    return Head(prefix + reply.request_id, _now_s(), started.model, started.revision)


def _now_s() -> int:
    return int(time.time())


def _metadata(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    return tuple(context.invocation_metadata() or ())
