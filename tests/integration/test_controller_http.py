"""The admin paths as Envoy calls them: JSON out, errors as JSON, the status in the metadata."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2 as http_pb
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import rollout_pb2

from services.common import channel
from services.common.errors import ArgumentInvalid
from services.common.tokens import TokenVerifier
from services.controller import http_servicer
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import JWT_SECRET, Controller, bearer, started


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    """A controller that leads."""
    async with started(tmp_path, MemoryRouteStore()) as controller:
        await controller.serving()
        yield controller


async def get(
    controller: Controller, method: str, metadata: Any = (), request: Any = None
) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    async with channel.connect(controller.address) as connection:
        stub = http_service_pb2_grpc.AdminHttpServiceStub(connection)
        call = getattr(stub, method)(request or HttpBody(), metadata=metadata)
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


def posted(**fields: Any) -> HttpBody:
    """A body as Envoy passes it on."""
    return HttpBody(content_type="application/json", data=json.dumps(fields).encode())


async def test_revisions_by_model_and_by_name(controller: Controller) -> None:
    """The list has the one revision, and under its name is the same; a stranger's is not there."""
    status, body = await get(controller, "ListRevisions", bearer("admin"), http_pb.OfModel(model="m"))
    (listed,) = body["revisions"]
    assert status == 200
    name = listed["manifest"]["revision"]
    wanted = http_pb.OneRevision(model="m", revision=name)
    assert await get(controller, "GetRevision", bearer("admin"), wanted) == (200, {"revision": listed})
    wanted.revision = "none"
    assert (await get(controller, "GetRevision", bearer("admin"), wanted))[0] == 404


async def test_a_worker_is_drained(controller: Controller) -> None:
    """It is shown as draining; one that is not there is 404."""
    async with controller.member() as worker:
        await worker.become_active(pb.MEMBER_KIND_WORKER, "w", "1")
        drain = http_pb.OneWorker(worker_id="w")
        status, body = await get(controller, "DrainWorker", bearer("admin"), drain)
        assert (status, body["worker"]["state"]) == (200, "WORKER_STATE_DRAINING")
        await worker.hear("drain")
        drain.worker_id = "nobody"
        assert (await get(controller, "DrainWorker", bearer("admin"), drain))[0] == 404


@pytest.mark.parametrize(
    ("method", "body", "named"),
    [
        ("CreateRollout", HttpBody(), "empty"),
        ("CreateRollout", posted(model="m", colour="red"), "colour"),
        ("CreateRollout", posted(model=7), "model"),
        ("CreateRollout", posted(model="m", canary_percent="many"), "canary_percent"),
        ("ForceBreaker", posted(target="w", state="AJAR"), "AJAR"),
        ("ForceBreaker", HttpBody(data=b'{"target": "a", "target": "b"}'), "target"),
        ("RevokeToken", HttpBody(data=b"[]"), "object"),
        ("RevokeToken", posted(token_id=""), "token_id"),
    ],
    ids=range(8),
)
async def test_a_bad_body_is_400_and_names_what_is_wrong(
    controller: Controller, method: str, body: HttpBody, named: str
) -> None:
    """For those who may call it; the others hear of their token alone."""
    status, reply = await get(controller, method, bearer("admin"), body)
    assert (status, named in reply["error"]["message"]) == (400, True), reply
    assert "\n" not in reply["error"]["message"]
    assert (await get(controller, method, bearer("generate"), body))[0] == 403


class _Rollouts:
    """A ControllerService that has one rollout, which ends, or is lost on the way."""

    def __init__(self, *, lost: bool = False) -> None:
        self._lost = lost
        self.wanted: Any = None

    async def CreateRollout(self, request: pb.CreateRolloutRequest, context: Any) -> Any:
        """Says back what was asked for."""
        del context
        self.wanted = request
        return pb.CreateRolloutResponse(rollout=rollout_pb2.Rollout(id="r1", spec=request.spec))

    async def WatchRollout(self, request: pb.WatchRolloutRequest, context: Any) -> AsyncIterator[Any]:
        """Two states, the second after a while."""
        del context
        if request.rollout_id != "r1":
            raise ArgumentInvalid("rollout_id: unknown.")
        for state in ("ROLLOUT_STATE_PREPARING", "ROLLOUT_STATE_COMPLETED"):
            yield pb.WatchRolloutResponse(rollout=rollout_pb2.Rollout(id="r1", state=state))  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
            if self._lost:
                raise RuntimeError("a secret of the house")


@asynccontextmanager
async def served(rollouts: _Rollouts) -> AsyncIterator[Any]:
    """A client of an AdminHttpService over them."""
    server = grpc.aio.server()
    http_service_pb2_grpc.add_AdminHttpServiceServicer_to_server(
        http_servicer.AdminHttpServicer(rollouts, TokenVerifier(JWT_SECRET)), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as connection:
        yield http_service_pb2_grpc.AdminHttpServiceStub(connection)
    await server.stop(None)


async def test_a_rollout_is_asked_for_by_its_spec() -> None:
    """Durations and names as JSON has them for protos."""
    rollouts = _Rollouts()
    async with served(rollouts) as stub:
        body = posted(
            model="m", revision="r", strategy="ROLLOUT_STRATEGY_SWAP", bake="90s", canary_percent=10
        )
        (reply,) = [one async for one in stub.CreateRollout(body, metadata=bearer("admin"))]
    spec = rollouts.wanted.spec
    assert (spec.bake.seconds, spec.canary_percent, spec.strategy) == (90, 10, 3)
    assert json.loads(reply.data)["rollout"]["spec"]["bake"] == "90s"


async def test_a_watched_rollout_is_events_with_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is an event; a comment fills the silence between them."""
    monkeypatch.setattr(http_servicer, "HEARTBEAT_S", 0.01)
    async with served(_Rollouts()) as stub:
        call = stub.WatchRollout(http_pb.OneRollout(rollout_id="r1"), metadata=bearer("admin"))
        bodies = [one async for one in call]
    assert {one.content_type for one in bodies} == {"text/event-stream; charset=utf-8"}
    assert b": waiting\n\n" in [one.data for one in bodies]
    events = [one.data.decode() for one in bodies if one.data.startswith(b"event: rollout\ndata: ")]
    states = [json.loads(event.split("data: ")[1])["rollout"]["state"] for event in events]
    assert states == ["ROLLOUT_STATE_PREPARING", "ROLLOUT_STATE_COMPLETED"]


async def test_a_watch_that_fails_says_so() -> None:
    """Before its first event with a status, after it with an event, and nothing internal in it."""
    async with served(_Rollouts(lost=True)) as stub:
        call = stub.WatchRollout(http_pb.OneRollout(rollout_id="no"), metadata=bearer("admin"))
        (refused,) = [one async for one in call]
        assert dict(await call.initial_metadata())["x-interlock-status"] == "400"
        assert json.loads(refused.data)["error"]["message"] == "rollout_id: unknown."
        call = stub.WatchRollout(http_pb.OneRollout(rollout_id="r1"), metadata=bearer("admin"))
        bodies = [one.data async for one in call]
    assert bodies[-1].startswith(b"event: error\ndata: ")
    assert json.loads(bodies[-1].split(b"data: ")[1])["error"]["code"] == "INTERNAL"
    assert b"secret" not in b"".join(bodies)
