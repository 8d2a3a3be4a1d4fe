"""A server's outside: errors as statuses, the log line, the credential, health, ports."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import worker_service_pb2 as pb
from interlock.v1 import worker_service_pb2_grpc
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from services.common import channel, end_signals, logs, server
from services.common.credential import mesh_metadata
from services.common.errors import ArgumentInvalid, InterlockError, MeshCredentialInvalid, NoWorker, QueueFull
from services.common.interceptors import MeshOnly
from services.common.status import read_error
from services.common.system_clock import SystemClock

SERVICE = "interlock.v1.WorkerService"
MESH_TOKEN = "m" * 32


class Echo(worker_service_pb2_grpc.WorkerServiceServicer):
    """Raises what it is told to, or answers."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.ended = asyncio.Event()

    async def GetState(self, request: Any, context: Any) -> pb.GetStateResponse:
        """Fails or answers, and annotates its log line."""
        del request, context
        seen = structlog.contextvars.get_contextvars().get("request_id", "none before")
        logs.annotate(request_id="request-1")
        if self.failure:
            raise self.failure
        return pb.GetStateResponse(worker_id=str(seen))

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        """Answers once, then fails or waits for ever."""
        del request_iterator, context
        try:
            yield pb.SessionResponse()
            if self.failure:
                raise self.failure
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@asynccontextmanager
async def running(servicer: Echo, *, mesh_only: bool = False) -> AsyncIterator[tuple[Any, Any]]:
    """A real server on loopback: a stub that calls it, and the connection."""
    guards = [MeshOnly(MESH_TOKEN, (f"/{SERVICE}/",))] if mesh_only else []
    made = server.create([SERVICE], SystemClock(), interceptors=guards)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, made.grpc_server)
    address = made.bind("127.0.0.1:0")
    await made.start()
    async with channel.connect(address) as connection:
        yield worker_service_pb2_grpc.WorkerServiceStub(connection), (made, connection)
    await made.grpc_server.stop(None)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_error_reaches_the_client_with_reason_and_delay_in_both_forms() -> None:
    """Plain metadata for lean clients, google.rpc.Status for rich ones, and our own reader."""
    async with running(Echo(QueueFull("The queue is full.", retry_after_s=1.5))) as (stub, _):
        error = await failure_of(stub.GetState(pb.GetStateRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "The queue is full."
    metadata = dict(error.trailing_metadata() or ())
    assert metadata["interlock-reason"] == "ERROR_REASON_QUEUE_FULL"
    assert metadata["retry-after-ms"] == "1500"
    rich = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert rich.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("ERROR_REASON_QUEUE_FULL", "interlock")
    assert retry.retry_delay.ToMilliseconds() == 1500
    read = read_error(error)
    assert isinstance(read, QueueFull)
    assert read.retry_after_s == 1.5


def finished_rpcs(code: str) -> float:
    """How many calls of GetState have ended with a code in this process."""
    labels = {"method": f"/{SERVICE}/GetState", "code": code}
    return REGISTRY.get_sample_value("interlock_rpc_finished_total", labels) or 0.0


async def test_every_call_is_counted_by_its_code() -> None:
    """A success and an error each leave one behind, under the name that the client saw."""
    ok, invalid = finished_rpcs("OK"), finished_rpcs("INVALID_ARGUMENT")
    async with running(Echo()) as (stub, _):
        await stub.GetState(pb.GetStateRequest())
    async with running(Echo(ArgumentInvalid("No."))) as (stub, _):
        await failure_of(stub.GetState(pb.GetStateRequest()))
    assert (finished_rpcs("OK"), finished_rpcs("INVALID_ARGUMENT")) == (ok + 1, invalid + 1)


async def test_a_defect_reaches_the_client_without_detail_and_the_log_with_it() -> None:
    """The exception's text may hold anything, so only the log has it."""
    with capture_logs() as lines:
        async with running(Echo(ValueError("secret path /etc/x"))) as (stub, _):
            error = await failure_of(stub.GetState(pb.GetStateRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert [line["event"] for line in lines] == ["rpc.crashed", "rpc.finished"]
    assert "secret" in str(lines[0]["exc_info"])


async def test_each_rpc_logs_one_line_with_what_its_handler_added() -> None:
    """The canonical line names method, code and duration; one call's fields reach no other call."""
    structlog.reset_defaults()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with running(Echo()) as (stub, _):
            first = await stub.GetState(pb.GetStateRequest())
            second = await stub.GetState(pb.GetStateRequest())
    assert (first.worker_id, second.worker_id) == ("none before", "none before")
    assert [line["event"] for line in lines] == ["rpc.finished"] * 2
    assert lines[0]["method"] == f"/{SERVICE}/GetState"
    assert lines[0]["code"] == "OK"
    assert lines[0]["request_id"] == "request-1"
    assert lines[0]["duration_ms"] >= 0


async def test_a_stream_that_fails_ends_with_its_error_after_what_it_sent() -> None:
    """Streams are translated like single answers."""
    async with running(Echo(NoWorker("Nobody is there."))) as (stub, _):
        call = stub.Session()
        assert await call.read() == pb.SessionResponse()
        error = await failure_of(call.read())
    assert isinstance(read_error(error), NoWorker)


async def test_a_client_that_leaves_ends_the_handler() -> None:
    """The handler's `finally` runs when the client cancels, and the line says so."""
    servicer = Echo()
    with capture_logs() as lines:
        async with running(servicer) as (stub, _):
            call = stub.Session()
            await call.read()
            call.cancel()
            async with asyncio.timeout(5):
                await servicer.ended.wait()
    assert [line["code"] for line in lines] == ["CANCELLED"]


async def test_the_last_call_can_be_waited_for() -> None:
    """Also in vain; probes, whose watches have no end, do not count."""
    async with running(Echo()) as (stub, (made, connection)):
        watch: Any = health_pb2_grpc.HealthStub(connection)
        watching = watch.Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        call = stub.Session()
        await call.read()
        waiting = asyncio.create_task(made.calls.wait_none(30))
        await made.calls.wait_none(0.05)
        assert not waiting.done()
        call.cancel()
        async with asyncio.timeout(5):
            await waiting
        await stub.GetState(pb.GetStateRequest())
        async with asyncio.timeout(5):
            await made.calls.wait_none(30)
        watching.cancel()


async def test_private_services_refuse_callers_without_the_mesh_credential() -> None:
    """Single answers and streams alike; the right token passes."""
    async with running(Echo(), mesh_only=True) as (stub, _):
        for metadata in (None, mesh_metadata("n" * 32), (("x-interlock-mesh-token", ""),)):
            error = await failure_of(stub.GetState(pb.GetStateRequest(), metadata=metadata))
            assert isinstance(read_error(error), MeshCredentialInvalid)
            error = await failure_of(stub.Session(metadata=metadata).read())
            assert isinstance(read_error(error), MeshCredentialInvalid)
        await stub.GetState(pb.GetStateRequest(), metadata=mesh_metadata(MESH_TOKEN))


async def test_health_tells_when_calls_are_welcome() -> None:
    """NOT_SERVING until the service says otherwise, for the server and for each of its services."""
    async with running(Echo()) as (_, (made, connection)):
        health: Any = health_pb2_grpc.HealthStub(connection)
        for serving in (False, True, False):
            await made.set_serving(serving)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert (answer.status == server.SERVING) is serving


async def test_a_taken_port_is_named() -> None:
    """`so_reuseport` would hide it: two servers would share the port and halve the calls."""
    first = server.create([SERVICE], SystemClock())
    address = first.bind("127.0.0.1:0")
    await first.start()
    second = server.create([SERVICE], SystemClock())
    with pytest.raises(server.PortTaken, match=address.rpartition(":")[2]):
        second.bind(address)
    for made in (first, second):
        await made.grpc_server.stop(None)


async def test_a_signal_drains_and_a_second_one_hurries() -> None:
    """The first SIGTERM starts the drain, another signal stops the wait for it."""
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()
        await asyncio.Event().wait()

    waiting = asyncio.ensure_future(server.run_until_signal(drain))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await drained.wait()
    assert not waiting.done()
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(5):
        await waiting


@pytest.mark.parametrize(
    ("again", "repeat_s", "hurries"),
    [(signal.SIGTERM, 60.0, False), (signal.SIGTERM, 0.0, True), (signal.SIGINT, 60.0, True)],
    ids=["told twice", "sent again", "another one"],
)
async def test_what_is_told_twice_is_one_signal(
    again: signal.Signals, repeat_s: float, *, hurries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` tells a command, and then its whole group: nobody has asked a second time."""
    monkeypatch.setattr(end_signals, "REPEAT_S", repeat_s)
    stop, hurry = asyncio.Event(), asyncio.Event()
    heard = end_signals.end_signals(stop, hurry)
    heard(signal.SIGTERM)
    assert (stop.is_set(), hurry.is_set()) == (True, False)
    heard(again)
    assert hurry.is_set() is hurries


def test_a_status_of_a_stranger_keeps_its_code() -> None:
    """A proxy's UNAVAILABLE carries no reason of ours; the code and the words survive."""
    foreign = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="no route"
    )
    read = read_error(foreign)
    assert isinstance(read, InterlockError)
    assert (read.code.value, read.reason, read.message, read.retryable) == (
        "UNAVAILABLE",
        "UNSPECIFIED",
        "no route",
        True,
    )


async def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    """The library alone would answer UNKNOWN with the name of a Python class."""
    async with running(Echo()) as (_, (_, connection)):
        raw = connection.unary_unary(f"/{SERVICE}/GetState")
        error = await failure_of(raw(b"\xff\xff"))
    assert isinstance(read_error(error), ArgumentInvalid)


async def test_metadata_as_large_as_envoy_passes_is_accepted() -> None:
    """gRPC's own soft limit of 8 KiB would refuse calls with long tokens now and then."""
    async with running(Echo()) as (stub, _):
        for _ in range(20):
            await stub.GetState(pb.GetStateRequest(), metadata=(("authorization", "x" * 15_000),))
