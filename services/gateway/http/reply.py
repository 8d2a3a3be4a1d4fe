"""One HTTP reply on its way. Owns: what may still be said of a failure, and when a stream is written.

The status of a reply that is not 200 travels in the initial metadata `x-interlock-status`, and the call ends
with gRPC's OK: so that every byte of an error is ours. After the first byte nothing but an event can tell of
an error. Must not know: the shape of any API; a `Shape` does.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from google.api.httpbody_pb2 import HttpBody

from services.common import http_errors, ids, logs, status
from services.common.errors import InterlockError, InternalError
from services.common.grpc_types import Context
from services.common.http_types import EVENTS_TYPE, JSON_TYPE
from services.gateway.core.events import Chunk, Event, Finished
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.http.whole import Answer, Said
from services.gateway.servicer import REQUEST_ID_KEY, note_worker, response_metadata

# Status and headers wait this long for the first text: most responses name revision and worker, and what
# only a worker finds out, such as a format that is none, has its status, streamed as well as whole.
BEGIN_WAIT_S = 5.0
# Proxies give up on connections that are silent for a minute; some sooner.
HEARTBEAT_S = 10.0
# A body that has as many bytes is sent before it has more.
BODY_BYTES = 1 << 14
# A comment, in every API.
HEARTBEAT = b": waiting\n\n"
# The status of a stream whose end its client has seen: after one without events a browser would ask again.
_NO_CONTENT = ((http_errors.STATUS_KEY, "204"),)


class Shape(Protocol):
    """How an API tells of errors."""

    def status_of(self, error: InterlockError) -> int:
        """The HTTP status."""
        ...

    def headers(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """What of an API's own every reply has."""
        ...

    def error_body(self, error: InterlockError, request_id: str) -> bytes:
        """The reply of a request that failed before its first byte."""
        ...

    def error_event_body(self, error: InterlockError, request_id: str) -> bytes:
        """The last event of a stream that failed."""
        ...


class Reply:
    """One reply: knows whether its headers are gone.

    Attributes:
        request_id: What the reply is called by; a new one until the request's own is known.
        names: What the caller's API calls fields that are known by others inside, by those.
    """

    def __init__(self, context: Context, shape: Shape) -> None:
        self._context = context
        self._shape = shape
        self._begun = False
        self.request_id = ids.new_request_id()
        self.names: Mapping[str, str] = {}

    async def begin(
        self, generation: AnswerStream | None = None, *, more: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Sends status 200 and the headers, with `more` of them."""
        self._begun = True
        known = response_metadata(self.request_id, generation)
        own = self._shape.headers(self.request_id)
        await self._context.send_initial_metadata((*known, *own, *more))

    async def whole(self, data: bytes, generation: AnswerStream | None = None) -> HttpBody:
        """Sends the headers of a reply whose body is whole, and returns it: what fails has failed before."""
        await self.begin(generation)
        return HttpBody(content_type=JSON_TYPE, data=data)

    async def failed(self, error: Exception) -> HttpBody:
        """Returns the body that tells of `error`, in the way that is still open."""
        told = status.as_interlock_error(error)
        if told is not error:
            logs.get_logger().error("rpc.crashed", request_id=self.request_id, exc_info=error)
        told = _in_words(told, self.names)
        code = self._shape.status_of(told)
        logs.annotate(http_status=code, reason=told.reason)
        if self._begun:
            return event(self._shape.error_event_body(told, self.request_id))
        self._begun = True
        own = ((REQUEST_ID_KEY, self.request_id), *self._shape.headers(self.request_id))
        await self._context.send_initial_metadata((*own, *http_errors.headers(told, code)))
        return HttpBody(content_type=JSON_TYPE, data=self._shape.error_body(told, self.request_id))


def _in_words(error: InterlockError, names: Mapping[str, str]) -> InterlockError:
    """The same error, where its message begins with a field's name, with the caller's name of it."""
    field, colon, rest = error.message.partition(":")
    name = next((one for one in names if field == one or field.startswith((f"{one}.", f"{one}["))), None)
    if name is None or not colon:
        return error
    told = copy.copy(error)
    told.message = f"{names[name]}{field.removeprefix(name)}:{rest}"
    return told


async def whole_answer(generation: AnswerStream) -> Answer:
    """Waits for the end, so that an error still has its status.

    Raises:
        InterlockError: What the request ended with.
    """
    chunks: dict[int, list[Chunk]] = {}
    ends: dict[int, Finished] = {}
    async for happened in generation:
        note_worker(happened)
        if isinstance(happened, Chunk):
            chunks.setdefault(happened.sequence, []).append(happened)
        elif isinstance(happened, Finished):
            ends[happened.sequence] = happened
    if generation.started is None or not ends:
        raise InternalError("The request ended without a result.")
    said = (Said(tuple(chunks.get(sequence, ())), ends[sequence]) for sequence in sorted(ends))
    return Answer(generation.started, tuple(said))


async def streamed(
    generation: AnswerStream, reply: Reply, say: Callable[[Event], Iterable[bytes]]
) -> AsyncGenerator[HttpBody, None]:
    """The bodies of a reply that streams: it begins it, and tells each event as it comes, or a heartbeat.

    A heartbeat is due when nothing was written for a while, whatever has happened meanwhile: there are events
    of which an API says nothing. The first is due at once, for Envoy keeps headers back until a body comes.

    A client that reads nothing for too long is not hung up on, as by gRPC: what its stream held is free, and
    if it reads on it hears so, in an event. Trailers would end its body as if that were whole.

    A client that has seen the end before is told so by the status, 204.

    Args:
        generation: The request.
        reply: Where its events go.
        say: What the API says of an event, in pieces; nothing, if it has no word for it.

    Raises:
        InterlockError: What the request ended with; before the first byte it still has its status.
    """
    follows = await generation.first_output(BEGIN_WAIT_S)
    await reply.begin(generation, more=() if follows else _NO_CONTENT)
    now_s = asyncio.get_running_loop().time
    due_s, unsent = now_s(), b""
    while follows:
        # What is there goes out together: the first text with what comes before it, the last with its end.
        if unsent and not generation.has_news:
            yield event(unsent)
            due_s, unsent = now_s() + HEARTBEAT_S, b""
        if not await generation.ready(due_s - now_s()):
            yield event(HEARTBEAT)
            due_s = now_s() + HEARTBEAT_S
            continue
        whole = len(unsent)
        try:
            if (happened := await anext(generation, None)) is None:
                break
            note_worker(happened)
            for piece in say(happened):
                unsent += piece
                if len(unsent) >= BODY_BYTES:
                    # The next piece takes its time: whoever else waits for the loop gets it first.
                    yield event(unsent)
                    due_s, unsent, whole = now_s() + HEARTBEAT_S, b"", 0
                    generation.took()
        except Exception:
            # What was said before is part of the answer; half an event is none.
            if whole:
                yield event(unsent[:whole])
            raise
    if unsent or not follows:
        # The type of events is said also where none follows: there are clients who look at it first.
        yield event(unsent)


def event(data: bytes) -> HttpBody:
    """Server-sent events as they are sent."""
    return HttpBody(content_type=EVENTS_TYPE, data=data)
