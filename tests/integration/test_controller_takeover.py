"""What callers of a controller hear when it loses the lead: operators, watchers and members."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from interlock.v1 import controller_service_pb2 as pb

from services.common.errors import NotLeader
from services.common.status import UNSTARTED_KEY, read_error
from services.controller.adapters.file_rollouts import FileRolloutRecords
from services.controller.core.rollout_record import Spec, create
from tests.fakes.controller_ports import MemoryLead, MemoryRouteStore
from tests.fakes.controller_process import bearer, started

WORKER = pb.MEMBER_KIND_WORKER
ADMIN = bearer("admin")


async def ended(call: Any) -> grpc.aio.AioRpcError:
    """How a stream ended that had begun."""
    try:
        async with asyncio.timeout(10):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("it ended in peace")


async def test_everybody_is_sent_to_the_next_leader(tmp_path: Path) -> None:
    """A member's stream and a watch end with UNAVAILABLE; calls are refused before anything is done."""
    store = MemoryRouteStore()
    async with started(tmp_path, store) as controller, controller.member() as worker:
        await controller.serving()
        activate = await worker.become_active(WORKER, "w", "1")
        spec = Spec(model="m", revision=activate.revision)
        records = FileRolloutRecords(tmp_path / "data" / "rollouts")
        rollout = create("r", spec, activate.revision, 1, activate.revision)
        # A rollout that is on record, as a controller before may have left one.
        controller.stop.set()
    await records.claim("m", 50)
    await records.save(rollout)
    async with started(tmp_path, store) as controller, controller.member() as worker:
        await controller.serving()
        await worker.hello(WORKER, "w", "2")
        await worker.hear("lease")
        watch = controller.stub.WatchRollout(pb.WatchRolloutRequest(rollout_id="r"), metadata=ADMIN)
        first: Any = await watch.read()
        assert first.rollout.id == "r"
        MemoryLead(store, "other").grant()
        assert isinstance(read_error(await ended(watch)), NotLeader)
        error = await worker.end()
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await refused(controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=ADMIN))
        await refused(controller.stub.ListBreakers(pb.ListBreakersRequest(), metadata=ADMIN))
        response = await controller.health.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def refused(call: Any) -> None:
    """It ends with NOT_LEADER, and says that nothing was done for it."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert isinstance(read_error(raised.value), NotLeader)
    assert (UNSTARTED_KEY, "1") in tuple(raised.value.initial_metadata() or ())
