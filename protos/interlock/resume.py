"""Streams that survive. Owns: going on with a generation after a lost connection, at any gateway of a mesh.

Needs grpcio and protobuf alone. The request is made resumable and gets an id; when the connection breaks, the
next gateway is asked to go on behind the last event that was seen. No token is yielded twice, none is missed.

    for event in resume.generate(channel, GenerateRequest(text="Hello"), metadata=metadata):
        print(event.chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc

from interlock.v1.gateway_service_pb2 import GenerateRequest, GenerateResponse, ResumeGenerationRequest
from interlock.v1.gateway_service_pb2_grpc import GatewayServiceStub

Metadata = Sequence[tuple[str, str]]

# A gateway that died is replaced by another one within about eight seconds; the waits add up to twice that.
ATTEMPTS: Final = 10
BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 3.0
# The contract's default deadline.
TIMEOUT_S: Final = 240.0

# How a broken connection looks; an error that a gateway told carries its reason and is final.
_BROKEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)
# Gateways that leave, or have lost their store for a moment, say so: another one may go on. One that did not
# wait for this client any longer has kept what it left unread.
_PASSING = frozenset(
    {"ERROR_REASON_DRAINING", "ERROR_REASON_STORE_UNAVAILABLE", "ERROR_REASON_CLIENT_STALLED"}
)
# What a gateway says at its door that has just begun, or has its hands full, with the time to come back: once
# a call was broken, the request may live on.
_LATER = frozenset({"ERROR_REASON_NO_WORKER", "ERROR_REASON_QUEUE_FULL"})


class StreamBroken(Exception):
    """The events that a gateway sent do not continue those before: nothing more can be trusted."""


@dataclass
class _Progress:
    """What was seen of one generation, and what to ask next."""

    request: GenerateRequest
    attempts: int
    backoff_s: float
    deadline_s: float
    cursor: int = 0
    failures: int = 0
    calls: int = 0
    begun: bool = False
    indices: dict[int, int] = field(default_factory=dict)

    def begin(self, stubs: Sequence[Any], metadata: Metadata) -> Any:
        """Calls the next gateway in turn."""
        stub = stubs[self.calls % len(stubs)]
        self.calls += 1
        timeout = max(0.001, self.deadline_s - time.monotonic())
        if self.cursor == 0:
            # Nothing of the log was seen: asking again joins what runs already, under the same id.
            return stub.Generate(self.request, metadata=metadata, timeout=timeout)
        again = ResumeGenerationRequest(request_id=self.request.request_id, cursor=self.cursor)
        return stub.ResumeGeneration(again, metadata=metadata, timeout=timeout)

    def take(self, message: Any) -> GenerateResponse | None:
        """Returns an event that is new; None for one that was seen."""
        event = _as_event(message)
        self.begun = True
        if event.HasField("queued"):
            return event
        if event.cursor <= self.cursor:
            return None
        if event.HasField("chunk"):
            expected = self.indices.get(event.chunk.sequence, 0)
            if event.chunk.index != expected:
                raise StreamBroken(f"token {event.chunk.index} came where {expected} was next")
            self.indices[event.chunk.sequence] = expected + len(event.chunk.token_ids)
        self.cursor, self.failures = event.cursor, 0
        return event

    def pause_s(self, error: grpc.RpcError) -> float:
        """Returns how long to wait before the next attempt, or raises `error` where none can help."""
        self.failures += 1
        delay_s = self._delay_s(error)
        if delay_s is None or self.failures >= self.attempts:
            raise error
        pause = max(delay_s, float(min(BACKOFF_MAX_S, self.backoff_s * 2 ** (self.failures - 1))))
        if time.monotonic() + pause >= self.deadline_s:
            raise error
        return pause

    def _delay_s(self, error: Any) -> float | None:
        """How long whoever told `error` wants to be left alone; None: it is final."""
        metadata = dict(error.trailing_metadata() or ())
        reason = metadata.get("interlock-reason")
        if error.code() in _BROKEN if reason is None else reason in _PASSING:
            # A gateway that leaves and has said nothing else has taken nothing in.
            self.begun = self.begun or reason != "ERROR_REASON_DRAINING"
            return 0.0
        if not self.begun or reason not in _LATER:
            return None
        if self.cursor and reason == "ERROR_REASON_NO_WORKER":
            # Whoever goes on behind a cursor asks for no worker: so the request itself has ended.
            return None
        delay_ms = str(metadata.get("retry-after-ms", ""))
        # What takes longer than a moment is final: a full queue, for example, has not taken the request in.
        passes = delay_ms.isdigit() and int(delay_ms) <= 1000 * BACKOFF_MAX_S
        return int(delay_ms) / 1000 if passes else None


def generate(
    targets: grpc.Channel | Sequence[grpc.Channel],
    request: GenerateRequest,
    *,
    metadata: Metadata = (),
    attempts: int = ATTEMPTS,
    backoff_s: float = BACKOFF_S,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[GenerateResponse]:
    """Yields the events of a generation, across lost connections.

    Args:
        targets: Channels to one or more gateways of a mesh; taken in turn after a failure.
        request: What to generate. It is copied, made resumable, and given an id unless it has one.
        metadata: Sent with every call: the `authorization`.
        attempts: Failures in a row after which the last error is raised.
        backoff_s: The first pause between two attempts; it doubles up to 3 s.
        timeout_s: Time for the whole generation.

    Raises:
        grpc.RpcError: The generation failed, or no gateway could go on with it.
        StreamBroken: A gateway sent events that do not continue those before.
    """
    channels = [targets] if isinstance(targets, grpc.Channel) else list(targets)
    # The generated stub serves both kinds of channels, and its types name one alone.
    stubs = [GatewayServiceStub(cast("Any", channel)) for channel in channels]
    progress = _begin(request, attempts, backoff_s, timeout_s)
    while True:
        call = progress.begin(stubs, metadata)
        try:
            for message in call:
                if (event := progress.take(message)) is not None:
                    yield event
        except grpc.RpcError as error:
            time.sleep(progress.pause_s(error))
        else:
            return
        finally:
            call.cancel()


async def generate_async(
    targets: grpc.aio.Channel | Sequence[grpc.aio.Channel],
    request: GenerateRequest,
    *,
    metadata: Metadata = (),
    attempts: int = ATTEMPTS,
    backoff_s: float = BACKOFF_S,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[GenerateResponse]:
    """`generate` for asyncio."""
    channels = [targets] if isinstance(targets, grpc.aio.Channel) else list(targets)
    stubs: list[Any] = [GatewayServiceStub(channel) for channel in channels]
    progress = _begin(request, attempts, backoff_s, timeout_s)
    while True:
        call = progress.begin(stubs, metadata)
        try:
            async for message in call:
                if (event := progress.take(message)) is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            await asyncio.sleep(progress.pause_s(error))
        else:
            return
        finally:
            call.cancel()


def _begin(request: GenerateRequest, attempts: int, backoff_s: float, timeout_s: float) -> _Progress:
    asked = GenerateRequest()
    asked.CopyFrom(request)
    asked.resumable = True
    if not asked.HasField("request_id"):
        asked.request_id = uuid.uuid4().hex
    return _Progress(asked, attempts, backoff_s, time.monotonic() + timeout_s)


def _as_event(message: Any) -> GenerateResponse:
    """The two responses have the same fields, by the contract."""
    if isinstance(message, GenerateResponse):
        return message
    return GenerateResponse.FromString(message.SerializeToString())
