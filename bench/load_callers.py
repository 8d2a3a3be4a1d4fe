"""Clients of a mesh. Owns: asking by gRPC, and what of an answer goes into a trace."""

from __future__ import annotations

import time
from typing import Protocol

import grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2

from bench.load_plan import Ask
from bench.load_trace import Fate, Trace

GENERATE = "/interlock.v1.GatewayService/Generate"
_PRIORITIES = {
    "batch": generation_pb2.PRIORITY_BATCH,
    "interactive": generation_pb2.PRIORITY_INTERACTIVE,
    "system": generation_pb2.PRIORITY_SYSTEM,
}
_FATES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Fate.REFUSED,
    grpc.StatusCode.UNAVAILABLE: Fate.REFUSED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Fate.MISSED,
}


class Caller(Protocol):
    """Asks, by whatever way."""

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """Reads an answer to its end and notes everything in the trace; never raises for a refusal."""


class GrpcCaller:
    """Asks by `Generate`.

    Args:
        channel: To a gateway or to the mesh's proxy.
        tokens: Bearer tokens by tenant.
    """

    def __init__(self, channel: grpc.aio.Channel, tokens: dict[str, str]) -> None:
        self._stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        self._tokens = tokens

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        metadata = [("authorization", f"Bearer {self._tokens[ask.tenant.name]}")]
        if ask.deadline_s is not None:
            metadata.append(("x-interlock-deadline", f"{ask.deadline_s:g}"))
        try:
            async for event in self._stub.Generate(request_of(ask), metadata=tuple(metadata)):
                note(event, trace)
        except grpc.aio.AioRpcError as error:
            now_s = time.monotonic()
            trace.end(now_s, fate_of(_FATES.get(error.code(), Fate.FAILED), trace), retry_after_s(error))
        else:
            trace.end(time.monotonic(), Fate.FINISHED)


def request_of(ask: Ask) -> pb.GenerateRequest:
    """The request as a gateway is asked."""
    return pb.GenerateRequest(
        tokens=pb_tokens(ask.prompt_ids),
        max_tokens=ask.answer_tokens,
        priority=_PRIORITIES[ask.tenant.priority],
    )


def pb_tokens(ids: tuple[int, ...]) -> generation_pb2.TokenInput:
    """A prompt of token ids."""
    return generation_pb2.TokenInput(ids=ids)


def note(event: pb.GenerateResponse, trace: Trace) -> None:
    """Notes one event."""
    now_s = time.monotonic()
    match event.WhichOneof("event"):
        case "queued" if event.queued.HasField("estimated_wait"):
            trace.wait_told(now_s, event.queued.estimated_wait.ToTimedelta().total_seconds())
        case "started":
            trace.started_s = trace.started_s or now_s
        case "chunk" if event.chunk.token_ids:
            trace.arrivals.append((now_s, len(event.chunk.token_ids)))


def fate_of(fate: Fate, trace: Trace) -> Fate:
    """What is turned away after it has started was not refused but failed."""
    return Fate.FAILED if fate is Fate.REFUSED and trace.started_s is not None else fate


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """When an error says to come back, in seconds from now; None: it does not say."""
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after-ms" and isinstance(value, str) and value.isdigit():
            return int(value) / 1_000
    return None
