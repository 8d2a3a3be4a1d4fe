"""Servers. Owns: how a gRPC server is built, bound, watched and drained, the same for all services."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.common import logs
from services.common.channel import MESSAGE_BYTES_MAX
from services.common.clock import Clock
from services.common.end_signals import end_signals
from services.common.grpc_types import Interceptor
from services.common.interceptors import CallLog, HttpParts
from services.common.open_calls import OpenCalls

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # Otherwise a second server binds a taken port silently and gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Envoy pings every 5 s, the mesh's own channels every 10 s; much more often is abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Envoy keeps about one connection a thread, and 400 clients may share it.
    ("grpc.max_concurrent_streams", 4_096),
    # Envoy passes headers of up to 16 KiB; gRPC's own soft limit would refuse some of them by chance.
    ("grpc.max_metadata_size", 32 * 1024),
    ("grpc.absolute_max_metadata_size", 64 * 1024),
    # One chunk is about 100 bytes: 64 KiB hold what a slow reader may be behind.
    ("grpc.http2.max_frame_size", 65_536),
)

# For servers at which a call holds something as long as it is open. A client that says nothing for so long is
# pinged, and its calls end unless it answers in time: a process that was stopped, or a host that is gone,
# sends no FIN. The answer comes from gRPC's own threads, however busy Python is, and four seconds are more
# than any short stall. Only the third option makes the library keep to the second.
KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


# Returns when a process shall end, after it has run what drains it: `run_until_signal`, or a test's own.
Wait = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]


class PortTaken(Exception):
    """The address cannot be bound; the message names it and says what to do."""


@dataclass(slots=True)
class Server:
    """A gRPC server with health and reflection.

    Attributes:
        grpc_server: The server; add servicers to it before `bind`.
        health: `grpc.health.v1`; NOT_SERVING for every service from `start` until `set_serving`.
        services: Full names of the services, as health and reflection list them.
        calls: The calls under way, but for those of health and reflection.
    """

    grpc_server: grpc.aio.Server
    health: health_aio.HealthServicer
    services: tuple[str, ...]
    calls: OpenCalls

    async def set_serving(self, serving: bool) -> None:  # noqa: FBT001 - a switch has two positions
        """Tells health checks whether calls are welcome."""
        for name in ("", *self.services):
            await self.health.set(name, SERVING if serving else NOT_SERVING)

    async def start(self) -> None:
        """Starts to answer: health with NOT_SERVING, until `set_serving` says otherwise."""
        await self.set_serving(False)
        await self.grpc_server.start()

    def bind(self, address: str) -> str:
        """Binds `host:port` (port 0: a free one) and returns the address with the actual port.

        Raises:
            PortTaken: Another process listens there, or the host is not of this machine.
        """
        host, _, port = address.rpartition(":")
        try:
            bound = self.grpc_server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise PortTaken(
                f"Port {port} on {host} is taken or cannot be bound. "
                "Stop what listens there, choose another port, or give port 0 for a free one."
            )
        return f"{host}:{bound}"


def create(
    services: Sequence[str],
    clock: Clock,
    *,
    interceptors: Sequence[Interceptor] = (),
    pings: bool = False,
) -> Server:
    """Builds a server for the named services.

    Args:
        services: Their full names.
        clock: Measures calls.
        interceptors: They run inside the call log.
        pings: Whether clients that do not answer in time lose their calls. Not for a server that sends large
            files: on a slow line they hold up the answers.
    """
    options = [*OPTIONS, *(KEEPALIVE if pings else ())]
    call_log = CallLog(clock)
    grpc_server = grpc.aio.server(interceptors=[call_log, HttpParts(), *interceptors], options=options)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, grpc_server)
    if os.environ.get("INTERLOCK_REFLECTION", "on") != "off":
        names = (*services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, grpc_server)
    return Server(grpc_server, health, tuple(services), call_log.calls)


async def run_until_signal(drain: Callable[[], Awaitable[None]]) -> None:
    """Waits for SIGTERM or SIGINT, then runs `drain`; a second signal ends the wait for it."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    heard = end_signals(stop, hurry)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard, number)
    await stop.wait()
    logs.get_logger().info("process.draining")
    draining = asyncio.ensure_future(drain())
    hurrying = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurrying):
        task.cancel()
    results = await asyncio.gather(draining, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    logs.get_logger().info("process.stopped")
