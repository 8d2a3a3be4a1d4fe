"""Stand-ins for what is behind Envoy: one server that answers as gateway or as controller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

Metadata = dict[str, str]

# One for each call that a test holds back at once, at one of them.
_THREADS = 256


def _bytes(message: HttpBody) -> bytes:
    data: bytes = message.SerializeToString()
    return data


@dataclass(slots=True)
class FakeBackend:
    """Answers every method of the contract by saying who was asked for what.

    Attributes:
        name: What it says that it is.
        seen: The metadata of every call, by method.
        requests: The last request of every HTTP method, as it came.
        hold: Keeps gRPC answers back until it is set; None: they come at once.
        begins: Whether the headers of an answer go out before it is held back.
        large: Bytes of the reply by HTTP to a request without a body; 0: it is an echo like the others.
    """

    name: str
    seen: dict[str, Metadata] = field(default_factory=dict)
    requests: dict[str, bytes] = field(default_factory=dict)
    hold: threading.Event | None = None
    begins: bool = False
    large: int = 0
    address: str = ""
    server: grpc.Server | None = None
    health: HealthServicer = field(default_factory=HealthServicer)

    def start(self) -> None:
        """Listens on a free port and says SERVING."""
        server = grpc.server(futures.ThreadPoolExecutor(_THREADS), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        server.add_generic_rpc_handlers((_Everything(self),))
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self.server = server

    def stop(self) -> None:
        """Ends at once."""
        if self.server is not None:
            self.server.stop(None).wait()

    def set_serving(self, *, serving: bool) -> None:
        """Changes what health checks hear."""
        statuses = health_pb2.HealthCheckResponse
        self.health.set("", statuses.SERVING if serving else statuses.NOT_SERVING)


class _Everything(grpc.GenericRpcHandler):
    """Takes whatever method Envoy sends here, but health."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        if method.startswith("/grpc.health."):
            return None
        self._backend.seen[method] = {
            key: str(value) for key, value in handler_call_details.invocation_metadata or ()
        }
        if "HttpService" in method:
            return grpc.unary_stream_rpc_method_handler(
                self._answer_http, self._keeping(method), response_serializer=_bytes
            )
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _keeping(self, method: str) -> Callable[[bytes], HttpBody]:
        """Reads a request as a body, whatever it is, and keeps it."""

        def read(request: bytes) -> HttpBody:
            self._backend.requests[method] = request
            return HttpBody.FromString(request)

        return read

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """The request's own bytes: an echo."""
        hold = self._backend.hold
        if self._backend.begins:
            context.send_initial_metadata(())
        while hold is not None and context.is_active() and not hold.wait(0.05):
            pass
        return request

    def _answer_http(self, request: HttpBody, context: grpc.ServicerContext) -> Iterator[HttpBody]:
        """What the body asks for: a status, an event stream, a slow one, the body's size, or nothing."""
        wanted = request.data.decode(errors="replace")
        if wanted.startswith("status "):
            context.send_initial_metadata((("x-interlock-status", wanted.split()[1]),))
            yield HttpBody(content_type="application/json", data=b'{"error":{}}')
        elif wanted in {"events", "slow events"}:
            for number in range(3):
                time.sleep(0.5 if wanted.startswith("slow") else 0)
                yield HttpBody(
                    content_type="text/event-stream", data=f"id: {number}\ndata: {{}}\n\n".encode()
                )
        elif not wanted and self._backend.large:
            yield HttpBody(content_type="application/json", data=bytes(self._backend.large))
        elif wanted == "abort":
            context.abort(grpc.StatusCode.UNAVAILABLE, "nobody there")
        else:
            text = f"{self._backend.name} {len(request.data)}"
            yield HttpBody(content_type="text/plain", data=text.encode())
