#!/usr/bin/env python3
"""Exits with 0 when the container's process takes calls: `healthy.py PORT`, or `healthy.py --http PORT`.

gRPC health for services, `GET /ready` for Envoy. For container engines that can only run a command; a
kubelet asks by itself.
"""

from __future__ import annotations

import http.client
import socket
import sys
from typing import Any

# Twice stays below the engine's own timeout, so that the answer is ours.
_TIMEOUT_S = 1.0


def http_ready(port: int) -> bool:
    """What Envoy's probe says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def grpc_serving(port: int) -> bool:
    """What the service's health says: on loopback, or where a worker binds, at its container's address."""
    return any(
        _serving(f"{host}:{port}") for host in ("127.0.0.1", socket.gethostbyname(socket.gethostname()))
    )


def _serving(address: str) -> bool:
    # Envoy's image has no gRPC, and asks by HTTP.
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    *kind, text = sys.argv[1:]
    healthy = http_ready(int(text)) if kind == ["--http"] else grpc_serving(int(text))
    sys.exit(0 if healthy else 1)
