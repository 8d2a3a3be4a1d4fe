"""The queue in a real Redis Cluster of three nodes: each model's keys lie on one of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis.crc import key_slot

from services.common.errors import QuotaExceeded, StoreUnavailable
from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore, connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_simulation import Simulation
from tests.fixtures.queue_world import KEYS, QueueWorld, make_job
from tests.fixtures.redis_cluster import NODES, SLOTS, RedisClusterServer, redis_cluster

__all__ = ["redis_cluster"]

# Their hash tags fall into slots of different nodes; a test says so.
MODELS = tuple(f"model-{number}" for number in range(6))
TIMEOUT_S = 10.0
# Of the random history, before and after its node dies.
STEPS = 200


@pytest.fixture
async def store(
    redis_cluster: RedisClusterServer, request: pytest.FixtureRequest
) -> AsyncIterator[RedisStore]:
    """A store on the cluster, in which every model has one worker of two slots, new for each test."""
    incarnation = str(request.node.name)
    store = connect(redis_cluster.url)
    routes = RedisRouteStore(store)
    for model in MODELS:
        await routes.write_route(model, 1, 1, {"r1": 100})
        record = WorkerRecord(
            "w1", "w1:1", incarnation, 2, draining=False, ready=frozenset({"r1"}), lease_ttl_s=1e6
        )
        await routes.write_worker(model, record, 1)
    yield store
    await store.close()


def job_of(model: str, name: str, *, tenant: str = "tenant") -> QueuedJob:
    """A job of a model."""
    return replace(make_job(f"{model}-{name}", tenant=tenant), model=model)


async def enqueue_granted(queue: RedisJobQueue, job: QueuedJob) -> Grant:
    """Enqueues a job that gets a slot at once."""
    answer = await queue.enqueue(job)
    assert isinstance(answer, Grant)
    return answer


def test_models_lie_on_all_nodes() -> None:
    """Otherwise this file would prove nothing about a cluster."""
    slots = [key_slot(ModelKeys(model).route.encode()) for model in MODELS]
    assert {slot * NODES // SLOTS for slot in slots} == {0, 1, 2}


async def test_every_operation_works_on_every_node(store: RedisStore) -> None:
    """Enqueue, grant, renew, requeue, refuse, cancel, breakers, usage, reap and settle, for each model."""
    queue = RedisJobQueue(store, "g1")
    heard: list[Grant] = []
    queue.on_grant(heard.append)
    for model in MODELS:
        first = await enqueue_granted(queue, job_of(model, "a"))
        second = await enqueue_granted(queue, job_of(model, "b"))
        assert isinstance(await queue.enqueue(job_of(model, "c")), Waiting)
        renewal = await queue.renew(model, {first.job_id: first.nonce}, frozenset({f"{model}-c"}))
        assert renewal.waiting[f"{model}-c"].position == 0
        assert renewal.unknown == {second.job_id}
        await queue.cancel(model, f"{model}-c", f"submission-of-{model}-c")
        assert await queue.refused(model, second.job_id, second.nonce, hold_s=0.0)
        second = heard.pop()
        assert await queue.requeue(model, second.job_id, second.nonce, pin=second.revision)
        await queue.list_open(model, "w1", None)
        await queue.list_closed(model, "w1")
        await queue.reap(model)
        assert (await queue.usage(model, "tenant")).running == 1
        await queue.settle(model, first.job_id, first.nonce, Outcome.FINISHED, 40)
        await queue.cancel(model, second.job_id, f"submission-of-{second.job_id}")
        assert await queue.length(model) == 0
        usage = await queue.usage(model, "tenant")
        assert (usage.used_tokens, usage.reserved_tokens) == (40, 0)
        with pytest.raises(QuotaExceeded):
            await queue.enqueue(replace(job_of(model, "d"), limits=TenantLimits(tokens_per_minute=120)))
    await queue.close()


async def test_grants_reach_the_other_gateway_across_nodes(store: RedisStore) -> None:
    """A message published on a model's node is heard by a subscriber on whichever node."""
    first, second = RedisJobQueue(store, "g1"), RedisJobQueue(store, "g2")
    heard: asyncio.Queue[Grant] = asyncio.Queue()
    second.on_grant(heard.put_nowait)
    async with asyncio.timeout(TIMEOUT_S):
        await second.start()
        await second.wait_subscribed()
        for model in MODELS:
            running = [await enqueue_granted(first, job_of(model, name, tenant="other")) for name in "xy"]
            assert isinstance(await second.enqueue(job_of(model, "z", tenant="other")), Waiting)
            await first.settle(model, running[0].job_id, running[0].nonce, Outcome.FINISHED, 1)
            grant = await heard.get()
            assert grant.job_id == f"{model}-z"
            await second.settle(model, grant.job_id, grant.nonce, Outcome.FINISHED, 1)
            await first.settle(model, running[1].job_id, running[1].nonce, Outcome.FINISHED, 1)
    await first.close()
    await second.close()


async def test_every_job_ends_once_in_a_random_history_whose_node_dies(
    redis_cluster: RedisClusterServer,
) -> None:
    """Gateways vanish, sleep and leave; then the node is killed and comes back empty, and all goes on."""
    store, node = connect(redis_cluster.url), redis_cluster.node_of(KEYS.route)
    with redis_cluster.client(node) as client:
        client.flushall()
        world = QueueWorld(client, store, RedisRouteStore(store))
        simulation = Simulation(world, random.Random(1))  # noqa: S311 - a history to repeat, no secret
        await simulation.begin()
        await simulation.run(STEPS)
        await asyncio.to_thread(redis_cluster.revive, node)
        await until_answered(store)
        await simulation.emptied()
        await simulation.run(STEPS)
        await simulation.end()
        await world.clear()
    await store.close()


async def until_answered(store: RedisStore) -> None:
    """Returns once the store has found its way back to a node that was gone."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await store.fetch("EXISTS", KEYS.route)
            except StoreUnavailable:
                await asyncio.sleep(0.05)
            else:
                return
