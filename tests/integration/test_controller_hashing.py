"""A controller whose model takes long to read: it listens and says so, leads afterwards, ends when asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from interlock.v1 import controller_service_pb2 as pb

from services.common.errors import NotLeader
from services.common.status import read_error
from services.controller.adapters import first_revision
from services.controller.adapters.local_revisions import read_revision
from services.controller.core.catalog import Revision
from tests.fakes.controller_ports import TIMEOUT_S, MemoryRouteStore
from tests.fakes.controller_process import Controller, bearer, started
from tests.fixtures.waiting import until

# An orchestrator's patience is ten times as long.
PROMPT_S = 2.0


class SlowDisk:
    """Lets the reading of a model begin, and end when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self._read = read_revision

    def read_revision(self, directory: Path, **settings: Any) -> Revision:
        """As the real one, once it may."""
        self.begun.set()
        self.may_end.wait()
        return self._read(directory, **settings)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    """What the controller's model lies on; its thread ends with the test."""
    slow = SlowDisk()
    monkeypatch.setattr(first_revision, "read_revision", slow.read_revision)
    yield slow
    slow.may_end.set()


async def health_of(controller: Controller) -> int:
    """What its health says."""
    response = await controller.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return int(response.status)


async def test_it_says_that_it_does_not_lead_yet_and_leads_afterwards(tmp_path: Path, disk: SlowDisk) -> None:
    """Members and operators are told to ask again, or another one: somebody else may lead meanwhile."""
    store = MemoryRouteStore()
    async with started(tmp_path, store) as controller:
        await until(disk.begun.is_set)
        assert await health_of(controller) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with controller.member() as worker:
            await worker.hello(pb.MEMBER_KIND_WORKER, "w", "1")
            error = await worker.end()
        assert error is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=bearer("admin"))
        for refusal in (error, caught.value):
            told = read_error(refusal)
            assert isinstance(told, NotLeader)
            assert "reads its model" in told.message
            assert told.retry_after_s
        assert (store.calls, store.led_with) == (0, 0)
        disk.may_end.set()
        await controller.serving()
        async with controller.member() as worker:
            await worker.become_active(pb.MEMBER_KIND_WORKER, "w", "1")


async def test_it_ends_at_once_when_it_is_asked_to(tmp_path: Path, disk: SlowDisk) -> None:
    """The thread that reads is left behind; the lead was never asked for."""
    store = MemoryRouteStore()
    async with started(tmp_path, store):
        await until(disk.begun.is_set)
        asked_s = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - asked_s < PROMPT_S
    assert not disk.may_end.is_set()
    assert store.led_with == 0
