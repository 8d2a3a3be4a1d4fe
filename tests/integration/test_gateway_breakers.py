"""Breakers in a gateway with real sessions: a worker whose every job fails is left alone, and tried again."""

from __future__ import annotations

import asyncio
import time

import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import worker_service_pb2

from services.gateway.core.breaker import BreakerLimits, State
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, GatewayWorld, fail, joined, open_gateway

ANSWER = "The quick brown fox jumps over the lazy dog."
REQUEST = pb.GenerateRequest(text="hi", max_tokens=100)
QUEUE = QueueLimits(suspect_s=0.02)


def state_of(gateway: GatewayWorld, worker_id: str) -> State:
    """The state of a worker's breaker."""
    return gateway.breakers.worker(worker_id, MODEL).breaker.state


async def test_it_opens_after_twenty_failures_and_tries_once_after_its_sleep() -> None:
    """Every client is answered by the other worker; the ill one is left alone, then tried, then used."""
    # How long it is by itself is shown in a whole fleet.
    limits = BreakerLimits(sleep_s=1.0)
    async with open_gateway(queue_limits=QUEUE, limits=limits) as gateway:
        ill = await gateway.add_worker("w1", Script(answer=ANSWER, failing=True))
        await gateway.add_worker("w2", Script(answer=ANSWER))
        while state_of(gateway, "w1") is State.CLOSED:
            assert joined(await gateway.generate(REQUEST)) == ANSWER
            await asyncio.sleep(0.025)
        assert len(ill.starts) == 20
        ill.script.failing = False
        ill.script.interval_s = 0.02
        answers: list[str] = []
        while len(ill.starts) == 20:
            answers += map(joined, await asyncio.gather(*(gateway.generate(REQUEST) for _ in range(2))))
        assert ill.starts_s[20] - ill.starts_s[19] >= limits.sleep_s
        assert set(answers) == {ANSWER}
        assert state_of(gateway, "w1") in {State.HALF_OPEN, State.CLOSED}
        await asyncio.gather(*(gateway.generate(REQUEST) for _ in range(4)))
        await gateway.wait_idle()
        assert state_of(gateway, "w1") is State.CLOSED


async def test_twenty_requests_at_half_open_make_one_trial_until_it_speaks() -> None:
    """They wait for the sleep to end; the worker gets one of them, and the others with its first token."""
    async with open_gateway(
        queue_limits=QUEUE, limits=BreakerLimits(calls_min=2, sleep_s=0.5), renew_s=0.02
    ) as gateway:
        worker = await gateway.add_worker("w1", Script(answer=ANSWER, failing=True), slots=20)
        await fail(gateway.call(REQUEST))
        assert state_of(gateway, "w1") is State.OPEN
        worker.script.failing, worker.script.interval_s = False, 0.1
        tasks = [asyncio.create_task(gateway.generate(REQUEST)) for _ in range(20)]
        await worker.wait_until(lambda: len(worker.starts) == 3)
        assert state_of(gateway, "w1") is State.HALF_OPEN
        await worker.wait_until(lambda: len(worker.starts) > 3)
        trial = worker.starts[2].job
        assert 0 < worker.sent[trial] < len(ANSWER) // 2
        assert state_of(gateway, "w1") is State.CLOSED
        await worker.wait_until(lambda: len(worker.starts) == 22)
        worker.script.interval_s = 0.0
        assert {joined(events) for events in await asyncio.gather(*tasks)} == {ANSWER}


@pytest.mark.parametrize("kind", ["cancelled", "refused", "invalid"])
async def test_what_is_not_the_workers_fault_moves_nothing(kind: str) -> None:
    """Clients that leave, a worker that is full, and requests that make no sense leave its window empty."""
    async with open_gateway(queue_limits=QUEUE) as gateway:
        script = Script(answer=ANSWER, interval_s=0.01)
        worker = await gateway.add_worker("w1", script)
        for number in range(3):
            if kind == "cancelled":
                call = gateway.call(REQUEST)
                await worker.wait_until(lambda number=number: len(worker.starts) > number)
                call.cancel()
            elif kind == "refused":
                script.refusals = [worker_service_pb2.REFUSAL_REASON_BUSY] * 5
                await gateway.generate(REQUEST)
            else:
                script.refusals = [worker_service_pb2.REFUSAL_REASON_INVALID]
                await fail(gateway.call(REQUEST))
        await gateway.wait_idle()
        tally = gateway.breakers.worker("w1", MODEL).breaker.tally(time.monotonic())
        assert (tally.calls, tally.failures) == (3 if kind == "refused" else 0, 0)


async def test_an_empty_retry_budget_ends_a_request_in_band() -> None:
    """The worker's death would be made good, but the gateway has paid for too many lately."""
    async with open_gateway(queue_limits=QUEUE) as gateway:
        gateway.budget.tokens = 0.5
        await gateway.add_worker("w1", Script(answer=ANSWER, die_at=10))
        error, events = await fail(gateway.call(REQUEST))
        assert joined(events) == ANSWER[:10]
        assert "too many others" in (error.details() or "")
        await gateway.wait_idle()
