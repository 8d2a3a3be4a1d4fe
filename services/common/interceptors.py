"""What every RPC passes through. Owns: the canonical log line, how errors are told, what is read and sent.

One line per RPC, at its end: method, code, reason, duration and whatever the handler added with
`logs.annotate`. A handler raises `InterlockError`; anything else is a defect, is logged with its
traceback and reaches the caller as INTERNAL without detail.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import DecodeError

from services.common import logs, metrics, status
from services.common.clock import Clock
from services.common.credential import check_mesh_token
from services.common.errors import ArgumentInvalid, MeshCredentialInvalid
from services.common.grpc_types import Context, Handler, Interceptor
from services.common.open_calls import OpenCalls

Details = grpc.HandlerCallDetails
Continuation = Callable[[Details], Awaitable[Handler | None]]
Metadata = Sequence[tuple[str, str | bytes]]

# Probes and tools call these every few seconds; a line for each would drown the rest.
_QUIET = ("/grpc.health.v1.Health/", "/grpc.reflection.")

_HTTP = "/interlock.http."

# Envoy's transcoder ends a reply with a message over 1 MiB, and gRPC sends none over 4 MiB. What is far
# smaller it passes on as it comes.
HTTP_PART_BYTES_MAX = 1 << 18


class _Wrapping(Interceptor):
    """Puts each handler into another one, made once."""

    def __init__(self) -> None:
        # By method: the handler, and what was made of it. Bounded by the methods that are served.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: Details
    ) -> Handler | None:
        """Wraps the handlers that it is for; the others are left as they are."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not self._is_for(method, handler):
            return handler
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = handler, self._wrap(method, handler)
        return known[1]

    @abstractmethod
    def _is_for(self, method: str, handler: Handler) -> bool: ...

    @abstractmethod
    def _wrap(self, method: str, handler: Handler) -> Handler: ...


class CallLog(_Wrapping):
    """Logs each RPC once and turns what its handler raises into a status.

    Attributes:
        calls: The RPCs under way.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.calls = OpenCalls()
        self._clock = clock

    def _is_for(self, method: str, handler: Handler) -> bool:  # noqa: ARG002 - whichever of the four kinds it is
        return not method.startswith(_QUIET)

    def _wrap(self, method: str, handler: Handler) -> Handler:
        wrap = self._streaming if handler.response_streaming else self._unary
        if handler.request_streaming or handler.request_deserializer is None:
            return _rebuilt(handler, wrap(method, _behaviour(handler)), handler.request_deserializer)
        # Decoded inside, where bytes that are no message become an error of ours.
        return _rebuilt(handler, wrap(method, _decoding(handler)), None)

    def _unary(self, method: str, inner: Any) -> Any:
        numbers = _Numbers(method)

        async def handle(request: Any, context: Context) -> Any:
            call = _Call(method, numbers, self._clock)
            with self.calls:
                try:
                    response = await inner(request, context)
                except BaseException as error:  # noqa: BLE001 - translated or raised again by `failed`
                    await call.failed(error, context)
                else:
                    call.log("OK")
                    return response

        return handle

    def _streaming(self, method: str, inner: Any) -> Any:
        numbers = _Numbers(method)

        async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
            call = _Call(method, numbers, self._clock)
            responses = None
            with self.calls:
                try:
                    responses = inner(request, context)
                    async for response in responses:
                        yield response
                except BaseException as error:  # noqa: BLE001 - translated or raised again by `failed`
                    await call.failed(error, context)
                else:
                    call.log("OK")
                finally:
                    # A generator that is left half way cleans up now, not when it is collected.
                    if responses is not None:
                        await responses.aclose()

        return handle


class HttpParts(_Wrapping):
    """Sends large bodies of HTTP methods as messages that pass every limit on their way.

    A client sees the bytes of a body as they are.
    """

    def _is_for(self, method: str, handler: Handler) -> bool:
        return method.startswith(_HTTP) and handler.response_streaming

    def _wrap(self, method: str, handler: Handler) -> Handler:  # noqa: ARG002 - each in the same way
        return _rebuilt(handler, _in_parts(_behaviour(handler)), handler.request_deserializer)


class MeshOnly(Interceptor):
    """Refuses callers without the mesh credential on the named services or methods, their messages unread.

    Args:
        token: The join token of the mesh.
        prefixes: Method paths or their beginnings, such as `/interlock.v1.WorkerService/`.
    """

    def __init__(self, token: str, prefixes: tuple[str, ...]) -> None:
        self._token = token
        self._prefixes = prefixes

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: Details
    ) -> Handler | None:
        """Puts a handler that refuses in the place of the one that was called."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefixes):
            return handler
        try:
            check_mesh_token(tuple(handler_call_details.invocation_metadata or ()), self._token)
        except MeshCredentialInvalid as error:
            return _rebuilt(handler, _refusing(handler, error), None)
        return handler


class TokenFirst(_Wrapping):
    """Reads no message of a caller whose token is not believed: reading may take longer than all the rest.

    Their handler is given an empty one. It refuses them before it looks at it, in the words of its API.

    Args:
        believes: Whether the metadata of a call has a token that is good enough: `TokenVerifier.believes`.
        prefixes: Method paths or their beginnings, of handlers that ask who calls before anything else, or
            nothing of the message at all.
    """

    def __init__(self, believes: Callable[[Metadata], bool], prefixes: tuple[str, ...]) -> None:
        super().__init__()
        self._believes = believes
        self._prefixes = prefixes

    def _is_for(self, method: str, handler: Handler) -> bool:
        return method.startswith(self._prefixes) and not handler.request_streaming

    def _wrap(self, method: str, handler: Handler) -> Handler:  # noqa: ARG002 - each in the same way
        inner = _decoding(handler)

        def handle(data: bytes, context: Context) -> Any:
            believed = self._believes(tuple(context.invocation_metadata() or ()))
            return inner(data if believed else b"", context)

        return _rebuilt(handler, handle, None)


class _Numbers:
    """A method's own counters: looking one up by its labels takes longer than counting."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._seconds = metrics.RPC_SECONDS.labels(method)
        # Bounded by the codes of gRPC.
        self._ended: dict[str, Any] = {}

    def count(self, code: str, duration_s: float) -> None:
        if (ended := self._ended.get(code)) is None:
            ended = self._ended[code] = metrics.RPCS.labels(self._method, code)
        ended.inc()
        self._seconds.observe(duration_s)


class _Call:
    """One RPC on its way to its log line."""

    def __init__(self, method: str, numbers: _Numbers, clock: Clock) -> None:
        self._method = method
        self._numbers = numbers
        self._clock = clock
        self._started_s = clock.monotonic()

    def log(self, code: str, **fields: object) -> None:
        duration_s = self._clock.monotonic() - self._started_s
        self._numbers.count(code, duration_s)
        duration_ms = round(duration_s * 1000, 3)
        logger = logs.get_logger()
        emit = logger.warning if code == "INTERNAL" else logger.info
        emit("rpc.finished", method=self._method, code=code, duration_ms=duration_ms, **fields)

    async def failed(self, error: BaseException, context: Context) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.log("CANCELLED")
            raise error
        if isinstance(error, grpc.aio.AbortError):
            self.log("ABORTED")
            raise error
        told = status.as_interlock_error(error)
        if told is not error:
            logs.get_logger().error("rpc.crashed", method=self._method, exc_info=error)
        self.log(told.code.value, reason=told.reason)
        await status.abort(context, told)


def _behaviour(handler: Handler) -> Any:
    """The function inside a handler, whichever of the four kinds it is."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(function for function in kinds if function is not None)


def _decoding(handler: Handler) -> Any:
    """The handler's function, given the bytes of its request."""
    inner = _behaviour(handler)
    decode: Any = handler.request_deserializer

    def handle(data: bytes, context: Context) -> Any:
        try:
            request = decode(data)
        except DecodeError:
            raise ArgumentInvalid("The request is not a message of this method.") from None
        return inner(request, context)

    return handle


def _rebuilt(handler: Handler, behaviour: Any, deserializer: Any) -> Handler:
    """A handler of the same kind around another function."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    rebuilt: Handler = make(behaviour, deserializer, handler.response_serializer)
    return rebuilt


def _in_parts(inner: Any) -> Any:
    """A function like `inner`, whose messages are short."""

    async def handle(request: Any, context: Context) -> AsyncIterator[HttpBody]:
        async with aclosing(inner(request, context)) as bodies:
            async for body in bodies:
                data = body.data
                if len(data) <= HTTP_PART_BYTES_MAX:
                    yield body
                    continue
                for at in range(0, len(data), HTTP_PART_BYTES_MAX):
                    part = data[at : at + HTTP_PART_BYTES_MAX]
                    yield HttpBody(content_type=body.content_type, data=part)

    return handle


def _refusing(handler: Handler, error: MeshCredentialInvalid) -> Any:
    """A function of the handler's kind that raises `error`."""

    async def unary(*_: Any) -> Any:
        raise error

    async def streaming(*_: Any) -> AsyncIterator[Any]:
        raise error
        yield  # makes this a generator

    return streaming if handler.response_streaming else unary
