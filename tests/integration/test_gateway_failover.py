"""Workers refuse, die, hang and speak too late; the client's stream goes on, or ends with a clear error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import worker_service_pb2

from services.gateway.core.queue_jobs import LiveJobs
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, GatewayWorld, fail, joined, open_gateway, read_rest

ANSWER = "The quick brown fox jumps over the lazy dog."
REQUEST = pb.GenerateRequest(text="hi", max_tokens=100)


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway that suspects a worker only shortly, and waits half a second for another one."""
    limits = GenerationLimits(failover_wait_s=0.5)
    queue_limits = QueueLimits(suspect_s=0.05, failover_wait_s=0.5)
    async with open_gateway(
        generation=limits, queue_limits=queue_limits, silence_s=0.6, stall_s=1.2
    ) as world:
        yield world


def attempts(events: list[pb.GenerateResponse]) -> list[tuple[str, int]]:
    """The workers and attempts that the client heard of."""
    return [(event.started.worker_id, event.started.attempt) for event in events if event.HasField("started")]


@pytest.mark.parametrize("die_at", [0, 1, 17])
async def test_another_worker_goes_on_where_the_first_one_died(gateway: GatewayWorld, die_at: int) -> None:
    """The text is that of a quiet run, indices contiguous; the second worker gets what was emitted."""
    first = await gateway.add_worker("w1", Script(answer=ANSWER, die_at=die_at))
    gateway.queue.remove_worker(MODEL, "w1")
    second = await gateway.add_worker("w2", Script(answer=ANSWER))
    gateway.queue.remove_worker(MODEL, "w2")
    gateway.announce(first)
    call = gateway.call(REQUEST)
    await first.wait_until(lambda: first.starts)
    gateway.announce(second)
    gateway.queue.remove_worker(MODEL, "w1")
    events = [event async for event in call]
    assert joined(events) == ANSWER
    assert attempts(events) == [("w1", 1), ("w2", 2)]
    (order,) = second.starts
    emitted = [token_id for part in order.emitted for token_id in part.token_ids]
    assert "".join(map(chr, emitted)) == ANSWER[:die_at]
    await gateway.wait_idle()


async def test_the_only_worker_comes_back_in_time(gateway: GatewayWorld) -> None:
    """Its session breaks mid-stream; the same worker takes the request again and it goes on."""
    worker = await gateway.add_worker("w1", Script(answer=ANSWER, die_at=10))
    events = await gateway.generate(REQUEST)
    assert joined(events) == ANSWER
    assert attempts(events) == [("w1", 1), ("w1", 2)]
    assert [order.attempt for order in worker.starts] == [1, 2]


async def test_nobody_goes_on_so_the_error_is_in_band(gateway: GatewayWorld) -> None:
    """The only worker is gone for good: UNAVAILABLE after the failover wait, with a delay."""
    worker = await gateway.add_worker("w1", Script(answer=ANSWER, die_at=10))
    call = gateway.call(REQUEST)
    await worker.wait_until(lambda: worker.starts)
    gateway.queue.remove_worker(MODEL, "w1")
    error, events = await fail(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "retry-after-ms" in dict(error.trailing_metadata() or ())
    assert joined(events) == ANSWER[:10]
    await gateway.wait_idle()
    assert await gateway.queue.length(MODEL) == 0


async def test_a_request_that_two_workers_died_of_is_not_tried_on_a_third(gateway: GatewayWorld) -> None:
    """Neither had sent a token for it: it ends with an error that asks nobody to try again."""
    for name in ("w1", "w2", "w3"):
        await gateway.add_worker(name, Script(answer=ANSWER, die_at=0))
    error, events = await fail(gateway.call(REQUEST))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "not tried" in (error.details() or "")
    assert "retry-after-ms" not in dict(error.trailing_metadata() or ())
    assert joined(events) == ""
    assert sum(len(worker.starts) for worker in gateway.workers.values()) == 2
    await gateway.wait_idle()


async def test_three_lost_workers_are_enough(gateway: GatewayWorld) -> None:
    """A request that loses its worker at each attempt ends after the third."""
    worker = await gateway.add_worker("w1", Script(answer=ANSWER, die_at=10))

    async def keep_dying() -> None:
        for index in (20, 30):
            await worker.wait_until(lambda: worker.script.die_at is None)
            worker.script.die_at = index

    dying = asyncio.create_task(keep_dying())
    error, events = await fail(gateway.call(REQUEST))
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert joined(events) == ANSWER[:30]
    assert len(worker.starts) == 3


async def test_a_refused_request_goes_elsewhere_at_no_cost(gateway: GatewayWorld) -> None:
    """Two refusals, then an answer: still attempt 1."""
    busy = worker_service_pb2.REFUSAL_REASON_BUSY
    worker = await gateway.add_worker("w1", Script(answer=ANSWER, refusals=[busy, busy]))
    events = await gateway.generate(REQUEST)
    assert joined(events) == ANSWER
    assert {attempt for _, attempt in attempts(events)} == {1}
    assert [order.attempt for order in worker.starts] == [1, 2, 3]


async def test_an_unreachable_worker_costs_no_attempt(gateway: GatewayWorld) -> None:
    """Nobody listens at its address yet; when somebody does, the request is answered."""
    worker = await gateway.add_worker("w1", Script(answer=ANSWER))
    await worker.stop()
    call = gateway.call(REQUEST)
    assert (await call.read()).HasField("started")
    await worker.start(worker.address)
    gateway.announce(worker)
    text, last = "", None
    while (event := await call.read()) is not grpc.aio.EOF:
        text += event.chunk.text
        last = event
    assert text == ANSWER
    assert last is not None
    assert last.HasField("finished")


async def test_a_silent_worker_is_given_up(gateway: GatewayWorld) -> None:
    """It hangs mid-stream without closing anything: another one goes on."""
    first = await gateway.add_worker("w1", Script(answer=ANSWER, hang_at=10))
    call = gateway.call(REQUEST)
    await first.wait_until(lambda: first.starts)
    gateway.queue.remove_worker(MODEL, "w1")
    await gateway.add_worker("w2", Script(answer=ANSWER))
    events = [event async for event in call]
    assert joined(events) == ANSWER
    assert attempts(events) == [("w1", 1), ("w2", 2)]


async def test_a_worker_whose_steps_stand_still_is_given_up(gateway: GatewayWorld) -> None:
    """It goes on saying that it lives, but makes no step for its one job: another worker goes on."""
    first = await gateway.add_worker("w1", Script(answer=ANSWER, stall_at=10))
    call = gateway.call(REQUEST)
    await first.wait_until(lambda: first.starts)
    gateway.queue.remove_worker(MODEL, "w1")
    await gateway.add_worker("w2", Script(answer=ANSWER))
    events = [event async for event in call]
    assert joined(events) == ANSWER
    assert attempts(events) == [("w1", 1), ("w2", 2)]


async def test_late_tokens_of_a_cancelled_attempt_are_dropped(gateway: GatewayWorld) -> None:
    """A worker that goes on talking after a cancellation disturbs neither that request nor the next one."""
    script = Script(answer="x" * 100, interval_s=0.005, late_tokens=5)
    worker = await gateway.add_worker("w1", script)
    call = gateway.call(REQUEST)
    await call.read()
    await worker.wait_until(lambda: max(worker.sent.values(), default=0) > 3)
    call.cancel()
    await worker.wait_until(lambda: worker.cancelled)
    script.answer, script.interval_s = ANSWER, 0.0
    assert joined(await gateway.generate(REQUEST)) == ANSWER


async def test_a_worker_that_does_not_confirm_holds_a_slot_only_shortly(gateway: GatewayWorld) -> None:
    """A cancellation that is never confirmed still frees the queue's slot."""
    script = Script(answer="x" * 100, interval_s=0.005, deaf=True)
    worker = await gateway.add_worker("w1", script, slots=1)
    call = gateway.call(REQUEST)
    await call.read()
    call.cancel()
    await worker.wait_until(lambda: worker.cancelled)
    script.answer = ANSWER
    assert joined(await gateway.generate(REQUEST)) == ANSWER


async def test_a_queue_that_forgot_everything_is_told_again() -> None:
    """The store comes back empty while one request runs and one waits: both end well."""
    async with open_gateway() as gateway:
        worker = await gateway.add_worker("w1", Script(answer="x" * 60, interval_s=0.01), slots=1)
        running = asyncio.create_task(gateway.generate(REQUEST))
        await worker.wait_until(lambda: worker.running)
        second = gateway.call(REQUEST)
        queued = await second.read()
        assert queued.HasField("queued")
        gateway.queue._lines[MODEL].jobs = LiveJobs()
        assert joined(await running) == "x" * 60
        assert joined([queued, *await read_rest(second)]) == "x" * 60
        await gateway.wait_idle()
