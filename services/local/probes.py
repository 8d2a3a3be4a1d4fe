"""Probes. Owns: how the supervisor finds out that a part of the mesh listens, or can serve."""

from __future__ import annotations

import asyncio
import http
import http.client
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1.controller_service_pb2 import ListWorkersRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from interlock.v1.worker_pb2 import REVISION_PHASE_FAILED

from services.common.channel import connect
from services.local.state import Part

T = TypeVar("T")

# Short against a start, long against the cost of asking.
_INTERVAL_S = 0.05
# A local process that does not answer within this is busy or gone; it is asked again.
_ANSWER_S = 2.0
# Envoy's status line and its list of listeners fit in a hundredth of it.
_HTTP_BYTES_MAX = 64 * 1024

# What a probe raises of a part that is not there yet; everything else is a defect.
_ABSENT = (OSError, EOFError, TimeoutError, ValueError, grpc.RpcError)


async def until(probe: Callable[[], Awaitable[T | None]], *, interval_s: float = _INTERVAL_S) -> T:
    """The first answer of `probe` that is not None. The caller bounds the wait."""
    while True:
        try:
            found = await asyncio.wait_for(probe(), _ANSWER_S)
        except _ABSENT:
            found = None
        if found is not None:
            return found
        await asyncio.sleep(interval_s)


async def announced(path: Path, pid: int | None) -> Part | None:
    """What the process `pid` wrote to its announce file; None before it did."""
    return _read_announcement(path, pid)


def _read_announcement(path: Path, pid: int | None) -> Part | None:
    if pid is None or not path.exists():
        return None
    part = Part(**json.loads(path.read_text()))
    # An older process of the same name may have left its own.
    return part if part.pid == pid else None


async def redis_answers(socket: Path) -> bool | None:
    """True when the store on a Unix socket answers a PING."""
    # One line each way: no reason for the supervisor to know the client library.
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(b"PING\r\n")
        await writer.drain()
        return True if await reader.readline() == b"+PONG\r\n" else None
    finally:
        writer.close()


async def serving(address: str) -> bool | None:
    """True when the server says SERVING for all of itself."""
    async with connect(address) as channel:
        # The types of this package know the blocking stub alone.
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
    return True if reply.status == health_pb2.HealthCheckResponse.SERVING else None


async def worker_failure(controller: str, token: str, worker_id: str) -> str | None:
    """Why the worker could not prepare its revision, as the controller knows; None unless it failed.

    Args:
        controller: `host:port` of the controller.
        token: A bearer token with the scope `admin`.
        worker_id: The worker.
    """
    async with connect(controller) as channel:
        stub = ControllerServiceStub(channel)
        metadata = (("authorization", f"Bearer {token}"),)
        reply = await stub.ListWorkers(ListWorkersRequest(), metadata=metadata, timeout=_ANSWER_S)
    revisions = [
        revision for worker in reply.workers if worker.id == worker_id for revision in worker.revisions
    ]
    failed = [revision.failure for revision in revisions if revision.phase == REVISION_PHASE_FAILED]
    return (failed[0] or "no reason was given") if failed else None


async def http_ok(address: str, path: str, *, bytes_max: int = _HTTP_BYTES_MAX) -> bytes | None:
    """The body of `GET path` when the server at `host:port` or `unix://PATH` answers it with 200.

    No proxy is asked, whatever the environment says; what is longer than `bytes_max` is cut.
    """
    # The standard client blocks; a thread of its own is cheap against a start.
    return await asyncio.to_thread(_get, address, path, bytes_max)


def _get(address: str, path: str, bytes_max: int) -> bytes | None:
    scheme, _, place = address.rpartition("://")
    connection = http.client.HTTPConnection("localhost" if scheme else place, timeout=_ANSWER_S)
    try:
        if scheme == "unix":
            # The connection uses the socket that it has.
            connection.sock = _unix_socket(place)
        connection.request("GET", path)
        reply = connection.getresponse()
        body = reply.read(bytes_max)
    except http.client.HTTPException as error:
        raise OSError("not HTTP") from error
    finally:
        connection.close()
    return body if reply.status == http.HTTPStatus.OK else None


def _unix_socket(path: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(_ANSWER_S)
        found.connect(path)
    except OSError:
        found.close()
        raise
    return found
