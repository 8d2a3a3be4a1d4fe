"""Metrics. Owns: how a process shows its numbers to Prometheus, and those that every RPC leaves behind.

Must not know: what a service counts; each declares its own beside its adapters. Names begin with `interlock_`
and end with their unit. Labels take few values: never a request, a subject or an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.registry import Collector

RPCS = Counter("interlock_rpc_finished", "RPCs that ended, by method and code.", ("method", "code"))
RPC_SECONDS = Histogram(
    "interlock_rpc_duration_seconds",
    "Time from the call of an RPC to its end, by method.",
    ("method",),
    # From a count of tokens to the longest deadline.
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300),
)


class MetricsPortTaken(Exception):
    """The address for metrics cannot be bound; the message names it and says what to do."""


class _HttpServer(Protocol):
    server_port: int

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Exposition:
    """The numbers of this process at `http://<address>/metrics`.

    Attributes:
        address: `host:port`; empty: nobody asked for it.
    """

    address: str = ""
    server: _HttpServer | None = None
    thread: Thread | None = None

    def close(self) -> None:
        """Stops answering."""
        if self.server is not None and self.thread is not None:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


def expose(address: str, *collectors: Collector) -> Exposition:
    """Answers at `host:port` (port 0: a free one) from a thread of its own; empty: nowhere.

    Shown is what the process counts, and what `collectors` read when somebody asks.

    Raises:
        MetricsPortTaken: Another process listens there, or the host is not of this machine.
    """
    if not address:
        return Exposition()
    # Of its own: several services may live in one process, as they do in tests.
    registry = CollectorRegistry()
    for collector in (REGISTRY, *collectors):
        registry.register(collector)
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host, registry)
    except OSError:
        raise MetricsPortTaken(
            f"Port {port} on {host} is taken or cannot be bound. "
            "Stop what listens there, or choose another address for metrics; an empty one turns them off."
        ) from None
    return Exposition(f"{host}:{server.server_port}", server, thread)
