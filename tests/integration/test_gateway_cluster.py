"""Gateways as their processes compose them, and a controller's process, over a real Redis Cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from pydantic import SecretStr

from services.common.queue_keys import breakers_of
from services.common.redis_client import RedisStore, connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway import __main__ as gateway_main
from services.gateway.config import GatewayConfig
from tests.fakes.scripted_controller import manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN, scripted_worker
from tests.fixtures.gateway_world import SECRET, bearer, joined
from tests.fixtures.redis_cluster import RedisClusterServer, redis_cluster
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.integration.test_controller_process import logged, process
from tests.integration.test_gateway_process import MODEL, REVISION, script, wait_for

__all__ = ["redis_cluster"]

TIMEOUT_S = 20.0
TEXT = "é" * 40


@pytest.fixture
async def store(redis_cluster: RedisClusterServer) -> AsyncIterator[RedisStore]:
    """The store, for the controller's writes and a look into it."""
    store = connect(redis_cluster.url)
    yield store
    await store.close()


@pytest.fixture
async def stubs(
    tmp_path: Path, redis_cluster: RedisClusterServer, store: RedisStore
) -> AsyncIterator[list[Any]]:
    """Clients of two gateways, which a worker of one slot is written for."""
    directory = write_tokenizer(tmp_path / "model")
    manifest = manifest_of(directory, model=MODEL, revision=REVISION, local_path=str(directory))
    terminate, found = asyncio.Event(), []
    async with AsyncExitStack() as exits, asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as processes:
        worker = await exits.enter_async_context(
            scripted_worker("w1", script(directory, TEXT, interval_s=0.01))
        )
        routes = RedisRouteStore(store)
        record = WorkerRecord(
            "w1", worker.address, "i1", 1, draining=False, ready=frozenset({REVISION}), lease_ttl_s=600.0
        )
        await routes.write_worker(MODEL, record, 1)
        await routes.write_route(MODEL, 1, 1, {REVISION: 1})
        for name in ("g1", "g2"):
            controller, address = await exits.enter_async_context(scripted_controller(manifest, directory))
            settings = GatewayConfig(
                id=name,
                bind="127.0.0.1:0",
                announce_file=tmp_path / f"{name}.json",
                controllers=(address,),
                redis_url=SecretStr(redis_cluster.url),
                cache_dir=tmp_path / "cache",
                mesh_token=SecretStr(MESH_TOKEN),
                jwt_secret=SecretStr(SECRET),
                drain_notice_s=0.0,
                drain_grace_s=1.0,
            )
            processes.create_task(gateway_main.run(settings, wait=wait_for(terminate)))
            await controller.wait_heard("activated")
            told = json.loads((tmp_path / f"{name}.json").read_text())
            channel = await exits.enter_async_context(grpc.aio.insecure_channel(told["address"]))
            found.append(gateway_service_pb2_grpc.GatewayServiceStub(channel))
        yield found
        terminate.set()


async def test_what_one_gateway_generates_another_one_resumes(stubs: list[Any], store: RedisStore) -> None:
    """Queue, log, directory, messages, usage and board: each works, whichever node has its keys."""
    first, second = stubs
    asked = pb.GenerateRequest(request_id="r", text="hi", max_tokens=80, resumable=True)
    running = aiter(first.Generate(asked, metadata=bearer()))
    began = [await anext(running) for _ in range(4)]
    assert not any(event.started.degraded for event in began)
    # The one slot is taken: whoever frees it tells the other gateway by a message.
    waiting = aiter(second.Generate(pb.GenerateRequest(text="hi", max_tokens=4), metadata=bearer()))
    assert (await anext(waiting)).HasField("queued")
    resumed = second.ResumeGeneration(pb.ResumeGenerationRequest(request_id="r"), metadata=bearer())
    events = [event async for event in resumed]
    whole = [*began, *[event async for event in running]]
    assert joined(events) == joined([event for event in whole if event.cursor]) == TEXT
    assert events[-1].HasField("finished")
    assert [event async for event in waiting][-1].HasField("finished")
    usage = await second.GetUsage(pb.GetUsageRequest(), metadata=bearer())
    assert usage.used_tokens > 0
    while "w1" not in await store.fetch("HGETALL", breakers_of("g1")):  # noqa: ASYNC110 - Redis tells nobody
        await asyncio.sleep(0.05)


async def test_a_controller_leads_and_writes_its_route(
    tmp_path: Path, redis_cluster: RedisClusterServer
) -> None:
    """Its lease, its route and its workers lie on the node of the model."""
    async with process(tmp_path, redis_cluster.url) as controller:
        written = await logged(controller, "route.written")
        assert written["model"] == "m"
