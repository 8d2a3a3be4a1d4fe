"""Breakers in a gateway with real sessions: a worker whose every job fails is left alone, and tried again."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import worker_service_pb2

from services.gateway.core.breaker import BreakerLimits, State, Verdict
from services.gateway.core.queue_errors import RETRY_WHEN_HELD_S
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import (
    MODEL,
    GatewayWorld,
    fail,
    joined,
    open_gateway,
    reason_of,
    settle_board,
)

ANSWER = "The quick brown fox jumps over the lazy dog."
REQUEST = pb.GenerateRequest(text="hi", max_tokens=100)
QUEUE = QueueLimits(suspect_s=0.02)
# Far below what anybody waits for in the queue, on a crowded machine too.
AT_ONCE_S = 2.0


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
    """They waited as it opened, and wait on; the worker gets one, and the others with its first token."""
    async with open_gateway(
        queue_limits=QUEUE, limits=BreakerLimits(calls_min=1, sleep_s=0.5), renew_s=0.02
    ) as gateway:
        worker = await gateway.add_worker("w1", Script(answer=ANSWER, failing=True))
        gateway.queue.remove_worker(MODEL, "w1")
        tasks = [asyncio.create_task(gateway.generate(REQUEST)) for _ in range(20)]
        async with asyncio.timeout(5):
            while await gateway.queue.length(MODEL) < 20:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        gateway.announce(worker, slots=1)
        await until_state(gateway, "w1", State.OPEN)
        worker.script.failing, worker.script.interval_s = False, 0.1
        gateway.announce(worker, slots=20)
        await worker.wait_until(lambda: len(worker.starts) == 2)
        assert state_of(gateway, "w1") is State.HALF_OPEN
        await worker.wait_until(lambda: len(worker.starts) > 2)
        trial = worker.starts[1].job
        assert 0 < worker.sent[trial] < len(ANSWER) // 2
        assert state_of(gateway, "w1") is State.CLOSED
        await worker.wait_until(lambda: len(worker.starts) == 21)
        worker.script.interval_s = 0.0
        assert {joined(events) for events in await asyncio.gather(*tasks)} == {ANSWER}


async def test_who_comes_while_every_breaker_is_open_is_told_at_once_when_to_come_again() -> None:
    """In both APIs; the other worker answers while there is one."""
    async with open_gateway() as gateway:
        for name in ("w1", "w2"):
            await gateway.add_worker(name, Script(answer=ANSWER))
        await gateway.hold_open("w1")
        assert {await answering(gateway) for _ in range(4)} == {"w2"}
        await gateway.hold_open("w1", "w2")
        began_s = time.monotonic()
        error, events = await fail(gateway.call(REQUEST))
        assert time.monotonic() - began_s < AT_ONCE_S
        assert (error.code(), reason_of(error), events) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", [])
        assert retry_after_s(error) == RETRY_WHEN_HELD_S
        reply = await gateway.post({"text": "hi"})
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert reply.json["error"]["reason"] == "ERROR_REASON_NO_WORKER"


async def test_once_the_sleep_is_over_a_new_request_is_the_trial() -> None:
    """Until then it is told what is left of the sleep; its first token closes the breaker."""
    async with open_gateway(limits=BreakerLimits(calls_min=1, sleep_s=1.0)) as gateway:
        worker = await gateway.add_worker("w1", Script(answer=ANSWER))
        await trip(gateway, "w1")
        error, _ = await fail(gateway.call(REQUEST))
        assert 0 < retry_after_s(error) <= 1.1
        assert not worker.starts
        await asyncio.sleep(retry_after_s(error))
        assert await answering(gateway) == "w1"
        assert state_of(gateway, "w1") is State.CLOSED


async def test_beside_a_trial_that_has_not_spoken_new_requests_are_turned_away() -> None:
    """The one call decides; who comes meanwhile is told of the sleep that begins where it fails."""
    async with open_gateway(limits=BreakerLimits(calls_min=1, sleep_s=1.5)) as gateway:
        worker = await gateway.add_worker("w1", Script(answer=ANSWER, stall_at=0))
        await trip(gateway, "w1")
        await asyncio.sleep(1.6)
        trial = gateway.call(REQUEST)
        await worker.wait_until(lambda: len(worker.starts) == 1)
        assert state_of(gateway, "w1") is State.HALF_OPEN
        error, _ = await fail(gateway.call(REQUEST))
        assert reason_of(error) == "NO_WORKER"
        assert len(worker.starts) == 1
        trial.cancel()


async def trip(gateway: GatewayWorld, worker_id: str) -> None:
    """Opens a worker's breaker, as the failure of one call does where one is enough."""
    circuit = gateway.breakers.worker(worker_id, MODEL)
    permit = circuit.admit()
    assert permit is not None
    circuit.settle(permit, Verdict.FAILURE)
    await settle_board()


async def answering(gateway: GatewayWorld) -> str:
    """The worker that answers a request."""
    events = await gateway.generate(REQUEST)
    assert joined(events) == ANSWER
    return next(event.started.worker_id for event in events if event.HasField("started"))


def retry_after_s(error: grpc.aio.AioRpcError) -> float:
    """What a failed call says in its RetryInfo."""
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rich.details)
    return float(retry.retry_delay.ToMilliseconds()) / 1000


async def until_state(gateway: GatewayWorld, worker_id: str, state: State) -> None:
    """Returns once a worker's breaker is in a state."""
    async with asyncio.timeout(5):
        while state_of(gateway, worker_id) is not state:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


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
