"""How orders that come at once travel to a worker, over a real session with a scripted one."""

from __future__ import annotations

import asyncio

import pytest

from services.common.system_clock import SystemClock
from services.gateway.adapters.grpc_worker import GrpcWorkerPool
from services.gateway.core.attempts import Loss, Output, RefusalReason
from services.gateway.core.ports import Attempt
from tests.fakes.gateway_ports import work_order
from tests.fakes.scripted_worker import MESH_TOKEN, Script, ScriptedWorker, scripted_worker

ANSWER = "x" * 20


class Listener:
    """Who hears of an attempt."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended = asyncio.Event()

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        assert output.index == len(self.token_ids)
        self.token_ids += output.token_ids
        if output.finish is not None:
            self.ended.set()

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        pytest.fail(f"{reason}: {message}")

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        pytest.fail(f"{loss}: {cause}")


def start(pool: GrpcWorkerPool, worker: ScriptedWorker, name: str) -> tuple[Attempt, Listener]:
    """A job of one sequence that waits for credit after four tokens."""
    listener = Listener()
    order = work_order(name, max_tokens=100, credit_tokens=4)
    return pool.start(worker.worker_id, worker.address, order, listener), listener


@pytest.mark.parametrize(("commands_max", "messages"), [(64, [1, 20, 23]), (8, [1, 8, 8, 4, 8, 8, 7])])
async def test_orders_that_come_at_once_travel_together(commands_max: int, messages: list[int]) -> None:
    """In their order, each once; credit and cancellations as well."""
    heard = await _serve(Script(answer=ANSWER, commands_max=commands_max))
    assert heard == messages


async def test_a_worker_that_does_not_say_that_it_takes_several_gets_each_alone() -> None:
    """A message that it does not know would be lost with every order in it."""
    heard = await _serve(Script(answer=ANSWER, commands_max=0))
    assert heard == [1] * 44


async def _serve(script: Script) -> list[int]:
    """Serves 21 jobs, two of them until they are cancelled; returns how many requests each message held."""
    pool = GrpcWorkerPool("gateway-1", MESH_TOKEN, SystemClock())
    async with scripted_worker("w1", script) as worker, asyncio.timeout(20):
        jobs = [start(pool, worker, "first")]
        await worker.wait_until(lambda: worker.sent.get("first") == 4)
        # The worker has said by now what it takes: that goes before its first token.
        while len(jobs[0][1].token_ids) < 4:  # noqa: ASYNC110 - the gateway has no event for it
            await asyncio.sleep(0.01)
        names = [f"j{number}" for number in range(20)]
        jobs += [start(pool, worker, name) for name in names]
        await worker.wait_until(lambda: all(worker.sent.get(name) == 4 for name in names))
        for attempt, _ in jobs:
            attempt.add_credit(0, 100)
        for attempt, _ in jobs[1:3]:
            attempt.cancel()
        for _, listener in (jobs[0], *jobs[3:]):
            await listener.ended.wait()
            assert listener.token_ids == [ord(character) for character in ANSWER]
        assert [one.job for one in worker.starts] == ["first", *names]
        assert worker.cancelled == names[:2]
        heard = list(worker.messages)
    await pool.close()
    return heard
