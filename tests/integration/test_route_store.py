"""The controller's fenced writes."""

from __future__ import annotations

import pytest

from services.common.queue_keys import (
    WORKER_ADDRESS,
    WORKER_DRAINING,
    WORKER_INCARNATION,
    WORKER_LEASE_END_MS,
    WORKER_READY_PREFIX,
    WORKER_SLOTS,
)
from services.controller.core.ports import FenceStale
from services.controller.core.records import Route, WorkerRecord
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld

RECORD = WorkerRecord("w1", "host:1", "i1", 4, draining=True, ready=frozenset({"r1", "r2"}), lease_ttl_s=5.0)


async def test_a_route_is_read_as_it_was_written(empty_world: QueueWorld) -> None:
    """Nothing is there at first; a write replaces all weights and keeps epochs exact."""
    routes = empty_world.routes
    assert await routes.read_route(MODEL) is None
    await routes.write_route(MODEL, 7, 1, {"r1": 100})
    await routes.write_route(MODEL, 1_795_416_462_360, 2, {"r2": 90, "r3": 10})
    assert await routes.read_route(MODEL) == Route(1_795_416_462_360, 2, {"r2": 90, "r3": 10})


async def test_a_worker_is_written_in_the_fields_that_gateways_read(empty_world: QueueWorld) -> None:
    """A later record replaces it whole: what is not ready any more is gone."""
    await empty_world.routes.write_worker(MODEL, RECORD, 1)
    fields = empty_world.client.hgetall(KEYS.worker("w1"))
    lease_end_ms = int(fields.pop(WORKER_LEASE_END_MS))
    now_ms = int(empty_world.client.hget(KEYS.clock, "logical") or 0)
    assert lease_end_ms == now_ms + 5_000
    assert fields == {
        WORKER_ADDRESS: "host:1",
        WORKER_INCARNATION: "i1",
        WORKER_SLOTS: "4",
        WORKER_DRAINING: "1",
        WORKER_READY_PREFIX + "r1": "1",
        WORKER_READY_PREFIX + "r2": "1",
    }
    await empty_world.add_worker(ready=("r2",))
    assert WORKER_READY_PREFIX + "r1" not in empty_world.client.hgetall(KEYS.worker("w1"))
    assert empty_world.client.smembers(KEYS.workers) == {"w1"}


async def test_a_removed_worker_leaves_nothing(empty_world: QueueWorld) -> None:
    """Neither record nor name; removing it again does no harm."""
    await empty_world.routes.write_worker(MODEL, RECORD, 1)
    await empty_world.routes.remove_worker(MODEL, "w1", 1)
    await empty_world.routes.remove_worker(MODEL, "w1", 1)
    assert not empty_world.client.exists(KEYS.worker("w1"), KEYS.workers)


async def test_a_stale_controller_changes_nothing(empty_world: QueueWorld) -> None:
    """Every write below the highest fence is refused, whichever write brought that fence."""
    routes = empty_world.routes
    await routes.write_route(MODEL, 5, 1, {"r1": 100})
    await routes.write_worker(MODEL, RECORD, 2)
    before = empty_world.client.hgetall(KEYS.worker("w1"))
    with pytest.raises(FenceStale):
        await routes.write_route(MODEL, 6, 1, {"r2": 100})
    with pytest.raises(FenceStale):
        await routes.write_worker(MODEL, RECORD, 1)
    with pytest.raises(FenceStale):
        await routes.remove_worker(MODEL, "w1", 1)
    assert await routes.read_route(MODEL) == Route(5, 2, {"r1": 100})
    assert empty_world.client.hgetall(KEYS.worker("w1")) == before


async def test_workers_alone_make_no_route(empty_world: QueueWorld) -> None:
    """After Redis was emptied, a worker's lease is renewed first; the route is still seen as missing."""
    await empty_world.routes.write_worker(MODEL, RECORD, 3)
    assert await empty_world.routes.read_route(MODEL) is None


async def test_scripts_survive_a_restart_of_redis(empty_world: QueueWorld) -> None:
    """A server that has forgotten the scripts is told them again."""
    await empty_world.routes.write_route(MODEL, 1, 1, {"r1": 100})
    empty_world.client.script_flush()
    await empty_world.routes.write_route(MODEL, 2, 1, {"r1": 100})
    assert (await empty_world.routes.read_route(MODEL)) == Route(2, 1, {"r1": 100})


async def test_a_revision_is_taken_from_a_worker_once_nobody_needs_it(world: QueueWorld) -> None:
    """Not while the route serves it, nor while a request runs with it there; the other one stays."""
    routes = world.routes
    await world.add_worker(ready=("r1", "r2"), slots=2)
    running = await world.grant("a")
    assert not await routes.unready(MODEL, "w1", "r1", 1)
    await world.set_route(epoch=2, r2=100)
    assert not await routes.unready(MODEL, "w1", "r1", 1)
    await world.finish(running)
    assert await routes.unready(MODEL, "w1", "r1", 1)
    assert await routes.unready(MODEL, "w1", "r1", 1)
    assert WORKER_READY_PREFIX + "r1" not in world.client.hgetall(KEYS.worker("w1"))
    assert (await world.grant("b")).revision == "r2"
    await world.set_route(epoch=3, r1=100)
    await world.wait("c")


async def test_a_revision_that_a_request_must_go_on_with_stays_while_no_other_worker_has_it(
    world: QueueWorld,
) -> None:
    """Its text began there; another worker that holds the revision lifts the ban."""
    grant = await world.grant("a")
    assert await world.routes.read_awaited(MODEL) == frozenset()
    await world.gateway().requeue(MODEL, "a", grant.nonce, pin=grant.revision)
    assert await world.routes.read_awaited(MODEL) == {"r1"}
    await world.set_route(epoch=2, r2=100)
    assert not await world.routes.unready(MODEL, "w1", "r1", 1)
    await world.add_worker("w2", ready=("r1",), draining=True)
    assert await world.routes.unready(MODEL, "w1", "r1", 1)
    with pytest.raises(FenceStale):
        await world.routes.unready(MODEL, "w2", "r1", 0)
