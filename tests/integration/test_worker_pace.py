"""How long workers are asked to hold tokens back, over real sessions with scripted workers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.common.system_clock import SystemClock
from services.gateway.adapters.grpc_worker import GrpcWorkerPool
from services.gateway.core.attempts import Loss, Output, RefusalReason
from services.gateway.core.ports import Attempt
from tests.fakes.gateway_ports import work_order
from tests.fakes.scripted_worker import MESH_TOKEN, Script, ScriptedWorker, scripted_worker

# A stream more is 10 ms more.
EVENTS_PER_S = 100.0


class Deaf:
    """Who hears of an attempt, and does not listen."""

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""


@pytest.fixture
async def pool() -> AsyncIterator[GrpcWorkerPool]:
    """A pool that is closed afterwards."""
    made = GrpcWorkerPool("gateway-1", MESH_TOKEN, SystemClock(), events_per_s=EVENTS_PER_S)
    yield made
    await made.close()


def start(pool: GrpcWorkerPool, worker: ScriptedWorker, name: str, credit_tokens: int = 10_000) -> Attempt:
    """A job of one sequence that goes on for long."""
    order = work_order(name, max_tokens=10_000, credit_tokens=credit_tokens)
    return pool.start(worker.worker_id, worker.address, order, Deaf())


async def test_workers_that_generate_are_asked_and_others_with_their_next_order(pool: GrpcWorkerPool) -> None:
    """As streams come, at once and before the order; and again as they end."""
    script = Script(answer="x" * 10_000, interval_s=0.02)
    async with scripted_worker("w1", script) as first, scripted_worker("w2", script) as second:
        idle = start(pool, second, "idle")
        await second.wait_until(lambda: second.running)
        await idle.cancel()
        attempts = [start(pool, first, f"j{number}") for number in range(8)]
        await first.wait_until(lambda: len(first.running) == 8)
        assert first.holds[-1] >= 60
        assert second.holds == [10]
        start(pool, second, "busy")
        await second.wait_until(lambda: len(second.starts) == 2)
        assert second.holds[1] >= 60
        for attempt in attempts[1:]:
            attempt.cancel()
        await first.wait_until(lambda: first.holds[-1] <= 20)


async def test_streams_that_wait_for_their_clients_make_no_events(pool: GrpcWorkerPool) -> None:
    """Whoever goes on is not held back for them."""
    async with scripted_worker("w1", Script(answer="x" * 10_000, interval_s=0.02)) as worker:
        for number in range(7):
            start(pool, worker, f"j{number}", credit_tokens=1)
        start(pool, worker, "eager")
        await worker.wait_until(lambda: worker.holds and worker.holds[-1] >= 60)
        await worker.wait_until(lambda: worker.holds[-1] == 10)
