"""A load on a real gateway with scripted workers: every figure agrees with what the workers did."""

from __future__ import annotations

import asyncio
from random import Random

from interlock.v1 import worker_service_pb2

from bench.load_direct import open_direct
from bench.load_figures import figures
from bench.load_plan import Load, Tenant
from bench.load_steps import Crowd, Step
from bench.load_trace import Fate
from bench.load_world import open_caller, tokens_of
from services.gateway.core.queue_limits import QueueLimits
from tests.fakes.scripted_worker import MESH_TOKEN, Script, scripted_worker
from tests.fixtures.gateway_world import MODEL, SECRET, GatewayWorld, open_gateway

ANSWER = Script(answer="0123456789", interval_s=0.002)
TENANTS = (Tenant("small", 1), Tenant("large", 3))
CHANCE = Random(1)  # noqa: S311 - it draws prompts and arrivals
LOAD = Load(tenants=TENANTS, prompt_tokens=4, answer_tokens=10, duration_s=2.0, warmup_s=0.0)


async def loaded(world: GatewayWorld, load: Load, clients: int) -> Step:
    """A closed loop by gRPC."""
    tokens = tokens_of(load, SECRET)
    async with open_caller(world.address, tokens, transport="grpc", clients=clients) as caller:
        step = await Crowd(caller, load, CHANCE).closed_loop(clients, lambda _: None)
    await world.wait_idle()
    return step


async def test_what_clients_count_is_what_the_worker_sent() -> None:
    """Every finished answer has all its tokens, no client counts more than was sent, weights are kept."""
    async with open_gateway() as world:
        worker = await world.add_worker("w1", ANSWER, slots=2)
        step = await loaded(world, LOAD, 12)
    finished = [trace for trace in step.traces if trace.fate is Fate.FINISHED]
    assert len(finished) > 10
    assert {trace.tokens for trace in finished} == {10}
    counted, sent = sum(trace.tokens for trace in step.traces), sum(worker.sent.values())
    assert counted <= sent <= counted + 2 * 10
    found = figures(step.traces, LOAD.weights, step.window_s)
    # What comes while the window closes counts for the client, and for no window: a token of each slot.
    assert counted - 2 <= sum(found.tenant_tokens.values()) <= counted
    assert found.tenant_tokens["large"] > 1.5 * found.tenant_tokens["small"]
    assert found.wait_error_s.count > 0
    assert {found.requests[name] for name in ("refused", "missed", "failed")} == {0}


async def test_refusals_and_missed_deadlines_are_counted() -> None:
    """One place to wait: the others are refused with a delay. What the worker is too slow for misses."""
    async with open_gateway(queue_limits=QueueLimits(waiting_jobs_max=1)) as world:
        await world.add_worker("w1", Script(answer="x" * 10, interval_s=0.2), slots=1)
        load = Load(answer_tokens=10, deadline_s=0.3, duration_s=0.6, warmup_s=0.0)
        step = await loaded(world, load, 6)
    found = figures(step.traces, load.weights, step.window_s)
    assert found.requests["refused"] >= 4
    assert found.refusals_with_retry_after == 1.0
    assert found.refusal_ms.count == found.requests["refused"]
    assert found.missed_deadlines >= 1
    assert found.goodput_tokens_per_s * 0.6 <= 10


async def test_without_the_queue_refused_clients_try_again_at_once() -> None:
    """The worker refuses thrice; the clients' fourth attempts finish, and the wish is as old as the first."""
    script = Script(answer="0123456789", refusals=[worker_service_pb2.REFUSAL_REASON_BUSY] * 3)
    load = Load(answer_tokens=10, duration_s=0.3, warmup_s=0.0)
    async with (
        scripted_worker("w1", script) as worker,
        asyncio.timeout(10),
        open_direct(worker.address, MESH_TOKEN, MODEL) as caller,
    ):
        step = await Crowd(caller, load, CHANCE).closed_loop(1, lambda _: None)
    fates = [trace.fate for trace in step.traces[:4]]
    assert fates == [Fate.REFUSED] * 3 + [Fate.FINISHED]
    assert step.traces[3].wished_s == step.traces[0].wished_s
    assert step.traces[3].tokens == 10
    assert len(worker.starts) >= 4
    assert {trace.fate for trace in step.traces[3:]} <= {Fate.FINISHED, Fate.CUT}
