"""The admin paths as Envoy calls them: JSON out, errors as JSON, the status in the metadata."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2 as pb

from services.common import channel
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import Controller, bearer, started


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    """A controller that leads."""
    async with started(tmp_path, MemoryRouteStore()) as controller:
        await controller.serving()
        yield controller


async def get(controller: Controller, method: str, metadata: Any = ()) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    async with channel.connect(controller.address) as connection:
        stub = http_service_pb2_grpc.AdminHttpServiceStub(connection)
        call = getattr(stub, method)(HttpBody(), metadata=metadata)
        bodies = [body async for body in call]
        initial = dict(await call.initial_metadata())
    assert initial["x-request-id"]
    assert [body.content_type for body in bodies] == ["application/json"]
    return int(initial.get("x-interlock-status", 200)), json.loads(bodies[0].data)


async def test_models(controller: Controller) -> None:
    """Fields bear the protos' names, and those without a value are there too."""
    status, body = await get(controller, "ListModels", bearer("models:read"))
    assert status == 200
    (model,) = body["models"]
    assert model == {
        "name": "m",
        "revision": "",
        "context_tokens": 64,
        "quantization": "QUANTIZATION_UNSPECIFIED",
        "ready_workers": 0,
        "is_default": True,
    }


async def test_workers(controller: Controller) -> None:
    """A worker is listed with where it is on its way."""
    assert await get(controller, "ListWorkers", bearer("admin")) == (200, {"workers": []})
    async with controller.member() as worker:
        await worker.hello(pb.MEMBER_KIND_WORKER, "w", "1")
        await worker.hear("lease")
        _, body = await get(controller, "ListWorkers", bearer("admin"))
        (listed,) = body["workers"]
        assert (listed["id"], listed["state"]) == ("w", "WORKER_STATE_PREPARING")
        assert listed["load"]["running"] == 0


@pytest.mark.parametrize(
    ("metadata", "status", "reason"),
    [
        ((), 401, "TOKEN_MISSING"),
        ((("authorization", "Bearer nonsense"),), 401, "TOKEN_INVALID"),
        (bearer("generate"), 403, "SCOPE_MISSING"),
    ],
)
async def test_refusals(controller: Controller, metadata: Any, status: int, reason: str) -> None:
    """An error is JSON with code, reason and message, under its HTTP status."""
    found, body = await get(controller, "ListWorkers", metadata)
    assert found == status
    assert body["error"]["reason"] == f"ERROR_REASON_{reason}"
    assert body["error"]["code"]
    assert body["error"]["message"]
