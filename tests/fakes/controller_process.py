"""A controller as a test starts it: its own `run`, in the test's process, on a free port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import controller_service_pb2_grpc
from pydantic import SecretStr

from services.common import channel
from services.common.ids import new_incarnation
from services.common.redis_client import RedisStore
from services.common.tokens import mint
from services.controller.__main__ import run
from services.controller.adapters.redis_lead import RedisLead
from services.controller.config import ControllerConfig
from services.controller.core.ports import BreakerFleet, Lead, RouteStore
from tests.fakes import scripted_worker
from tests.fakes.controller_ports import LEAD_TTL_S, TIMEOUT_S, FakeMember, MemoryLead, MemoryRouteStore

MESH_TOKEN = scripted_worker.MESH_TOKEN
JWT_SECRET = "j" * 32
# Longer than a test: members that shall not be lost need not speak.
LEASE_TTL_S = 30.0
# More than two chunks of a download, and no multiple of one.
WEIGHTS = bytes(range(256)) * 10_000


@dataclass
class Controller:
    """A running controller, and the callers' side of it."""

    address: str
    store: RouteStore
    stub: controller_service_pb2_grpc.ControllerServiceStub
    health: Any
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def member(self, mesh_token: str = MESH_TOKEN) -> FakeMember:
        """A member that has not spoken yet."""
        return FakeMember(self.address, mesh_token)

    async def serving(self) -> None:
        """Returns when health says SERVING."""
        async with asyncio.timeout(TIMEOUT_S):
            watch = self.health.Watch(health_pb2.HealthCheckRequest())
            async for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            watch.cancel()


def write_model(directory: Path) -> Path:
    """A directory with the shape of a model, for a context of 64 tokens."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@asynccontextmanager
async def started(
    tmp_path: Path,
    store: RouteStore,
    *,
    context_tokens: int = 0,
    lease_ttl_s: float = LEASE_TTL_S,
    lead: Lead | None = None,
    breakers: BreakerFleet | None = None,
    artifacts_url: str = "",
    model: Path | None = None,
) -> AsyncIterator[Controller]:
    """A controller process's `run`, in this process, with a model of no use unless one is given."""
    model = model or write_model(tmp_path / "model")
    announced, stop, drained = tmp_path / "announce.json", asyncio.Event(), asyncio.Event()
    settings = ControllerConfig(
        bind="127.0.0.1:0",
        announce_file=announced,
        mesh_token=SecretStr(MESH_TOKEN),
        jwt_secret=SecretStr(JWT_SECRET),
        model_path=model,
        model_name="m",
        data_dir=tmp_path / "data",
        context_tokens=context_tokens,
        lease_ttl_s=lease_ttl_s,
        artifacts_url=SecretStr(artifacts_url),
    )
    bound = asyncio.Event()
    if isinstance(store, MemoryRouteStore):
        lead = MemoryLead(store)

    async def wait(drain: Callable[[], Awaitable[None]]) -> None:
        bound.set()
        await stop.wait()
        await drain()
        drained.set()

    running = asyncio.create_task(run(settings, store=store, lead=lead, breakers=breakers, wait=wait))
    watching = asyncio.create_task(bound.wait())
    await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
    watching.cancel()
    if running.done():
        running.result()
    address = json.loads(announced.read_text())["address"]
    async with channel.connect(address) as connection:
        stub = controller_service_pb2_grpc.ControllerServiceStub(connection)
        try:
            yield Controller(address, store, stub, health_pb2_grpc.HealthStub(connection), stop)
        finally:
            stop.set()
            await asyncio.wait_for(running, TIMEOUT_S)
            assert drained.is_set()
    announced.unlink()


def lead_in(store: RedisStore, controller_id: str = "c") -> RedisLead:
    """The lead of the model `m` in Redis, for one process."""
    return RedisLead(store, "m", controller_id, new_incarnation(), ttl_s=LEAD_TTL_S)


def bearer(*scopes: str) -> tuple[tuple[str, str], ...]:
    """The metadata of an operator or user."""
    return (("authorization", f"Bearer {mint(JWT_SECRET, subject='s', scopes=scopes, ttl_s=3_600)}"),)
