"""Measures the queue's scripts against a Redis: latency of enqueue with grant and of settle, as JSON.

    python -m bench.queue_latency REDIS_URL [--rounds N] [--waiting N] [--workers N]

Use an empty Redis; the model's name is its own, and its keys are deleted at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore, connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob
from services.gateway.core.queue_limits import QueueLimits

MODEL = "bench-queue"
# The first calls open connections and load scripts.
WARM_UP_ROUNDS = 50


def make_job(name: str) -> QueuedJob:
    """A job of one of ten tenants."""
    return QueuedJob(name, MODEL, f"tenant-{hash(name) % 10}", Band.INTERACTIVE, 100, 3_600.0, name)


async def prepare(store: RedisStore, workers: int, slots: int) -> None:
    """Writes a route and some workers."""
    routes = RedisRouteStore(store)
    await routes.write_route(MODEL, 1, 1, {"r1": 100})
    for number in range(workers):
        record = WorkerRecord(
            f"w{number}", "host:1", "i", slots, draining=False, ready=frozenset({"r1"}), lease_ttl_s=1e6
        )
        await routes.write_worker(MODEL, record, 1)


async def timed(call: Callable[[], Awaitable[object]], into: list[float]) -> object:
    """Awaits a call and notes its microseconds."""
    began = time.perf_counter()
    answer = await call()
    into.append((time.perf_counter() - began) * 1e6)
    return answer


async def measure_free(queue: RedisJobQueue, rounds: int) -> dict[str, list[float]]:
    """Enqueue with a slot free, then settle with nobody waiting."""
    took: dict[str, list[float]] = {"enqueue_and_grant": [], "settle": []}
    for number in range(rounds):
        job = make_job(f"free-{number}")
        grant = await timed(lambda job=job: queue.enqueue(job), took["enqueue_and_grant"])  # type: ignore[misc]
        assert isinstance(grant, Grant)
        await timed(
            lambda grant=grant: queue.settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, 1),  # type: ignore[misc]
            took["settle"],
        )
    return {name: values[WARM_UP_ROUNDS:] for name, values in took.items()}


async def measure_busy(
    queue: RedisJobQueue, rounds: int, waiting: int, workers: int
) -> dict[str, list[float]]:
    """Enqueue behind many, and settle that grants the next of them."""
    granted: list[Grant] = []
    queue.on_grant(granted.append)
    for number in range(waiting + workers):
        answer = await queue.enqueue(make_job(f"busy-{number}"))
        if isinstance(answer, Grant):
            granted.append(answer)
    took: dict[str, list[float]] = {"enqueue_behind_many": [], "settle_and_grant": []}
    for number in range(rounds):
        job = make_job(f"more-{number}")
        await timed(lambda job=job: queue.enqueue(job), took["enqueue_behind_many"])  # type: ignore[misc]
        grant = granted.pop(0)
        await timed(
            lambda grant=grant: queue.settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, 1),  # type: ignore[misc]
            took["settle_and_grant"],
        )
    return took


def summary(values: list[float]) -> dict[str, int]:
    """The median and the 99th percentile, in microseconds."""
    percentiles = statistics.quantiles(values, n=100)
    return {"p50_us": round(percentiles[49]), "p99_us": round(percentiles[98]), "calls": len(values)}


async def run(url: str, rounds: int, waiting: int, workers: int) -> dict[str, dict[str, int]]:
    """Measures all and cleans up."""
    store = connect(url)
    bound = 10 * (waiting + workers) + rounds
    limits = QueueLimits(waiting_jobs_max=bound, tenant_waiting_jobs_max=bound, aging_s=3_600.0)
    queue = RedisJobQueue(store, "bench", limits)
    try:
        await prepare(store, workers, slots=8)
        found = await measure_free(queue, rounds + WARM_UP_ROUNDS)
        await prepare(store, workers, slots=1)
        found |= await measure_busy(queue, rounds, waiting, workers)
    finally:
        keys = await store.fetch("KEYS", f"{ModelKeys(MODEL).prefix}*")
        for start in range(0, len(keys), 1_000):
            await store.fetch("UNLINK", *keys[start : start + 1_000])
        await store.close()
    return {name: summary(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and prints JSON."""
    parser = argparse.ArgumentParser(
        prog="interlock bench queue_latency",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("url", help="redis:// or unix:// URL")
    parser.add_argument("--rounds", type=int, default=2_000, help="calls of each kind")
    parser.add_argument("--waiting", type=int, default=1_000, help="jobs that wait meanwhile")
    parser.add_argument("--workers", type=int, default=4, help="workers of the model")
    arguments = parser.parse_args(argv)
    found = asyncio.run(run(arguments.url, arguments.rounds, arguments.waiting, arguments.workers))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
