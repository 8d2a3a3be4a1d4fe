"""What `bench.edge` compares: the same work in two ways, one after the other, on a scripted worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from interlock.v1 import worker_service_pb2

from bench.edge import EDGE, WORKER, Bench, Plan, Round, Unanswered, lines_of, report
from bench.load_direct import open_direct
from bench.load_http import HttpCaller
from bench.load_plan import Load, Tenant
from bench.load_world import tokens_of
from tests.fakes.scripted_worker import MESH_TOKEN, Script
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import MODEL, SECRET, GatewayWorld, open_gateway

LOAD = Load(tenants=(Tenant("edge"),), prompt_tokens=4, answer_tokens=8)
PLAN = Plan(LOAD, rounds=2, streams=3, idle_requests=2)


async def measured(gateway: GatewayWorld, directory: Path, plan: Plan) -> list[Round]:
    """All rounds through a real Envoy, and at the worker."""
    worker = gateway.workers["w1"]
    async with (
        envoy_before(directory, gateway.address) as url,
        open_direct(worker.address, MESH_TOKEN, MODEL) as direct,
    ):
        edge = HttpCaller(url.removeprefix("http://"), tokens_of(plan.load, SECRET))
        return await Bench({WORKER: direct, EDGE: edge}, plan).measure(lambda: None)


async def test_both_ways_do_the_same_work(tmp_path: Path) -> None:
    """As many tokens, of the same prompts, each of them once in each way in each of three rounds."""
    async with open_gateway() as gateway:
        worker = await gateway.add_worker("w1", Script(answer="01234567", interval_s=0.001), slots=8)
        rounds = await measured(gateway, tmp_path, PLAN)
        prompts = [tuple(order.prompt_ids) for order in worker.starts]
    assert [one.tokens for one in rounds] == [{WORKER: 24, EDGE: 24}, {EDGE: 24, WORKER: 24}]
    # Three prompts, two of which are asked alone as well; one round more than is told.
    assert sorted(prompts.count(one) for one in set(prompts)) == [6, 12, 12]
    assert all(
        len(one.first_s[way]) == 2 and min(one.first_s[way]) > 0 for one in rounds for way in (WORKER, EDGE)
    )


async def test_fresh_prompts_are_asked_once(tmp_path: Path) -> None:
    """No prefix is found in a cache, in neither way."""
    async with open_gateway() as gateway:
        worker = await gateway.add_worker("w1", Script(answer="01234567"), slots=8)
        await measured(gateway, tmp_path, Plan(LOAD, rounds=1, streams=2, idle_requests=1, fresh=True))
        prompts = [tuple(order.prompt_ids) for order in worker.starts]
    assert len(prompts) == len(set(prompts)) == 12


async def test_a_worker_that_refuses_ends_it(tmp_path: Path) -> None:
    """Nothing is compared with an answer that was not given, and the message says what to change."""
    busy = [worker_service_pb2.REFUSAL_REASON_BUSY]
    async with open_gateway() as gateway:
        await gateway.add_worker("w1", Script(answer="01234567", refusals=busy), slots=8)
        with pytest.raises(Unanswered, match="--streams"):
            await measured(gateway, tmp_path, PLAN)


def test_the_report_has_medians_and_the_rounds_own_ratios() -> None:
    """Of three rounds, the middle one; the ratio is of what was measured in the same round."""
    rounds = [
        Round({WORKER: [0.010], EDGE: [0.010 + rise]}, {WORKER: 100, EDGE: 100}, {WORKER: 1.0, EDGE: wall_s})
        for rise, wall_s in ((0.002, 1.25), (0.004, 1.0), (0.010, 2.0))
    ]
    found = report(Plan(LOAD, rounds=3), rounds)
    assert found["ttft_ms"] == {WORKER: 10.0, EDGE: 14.0, "rise": 4.0, "ratio": 1.4}
    assert found["tokens_per_s"] == {WORKER: 100.0, EDGE: 80.0, "ratio": 0.8, "ratios": [0.8, 1.0, 0.5]}
    assert found["tokens"] == {WORKER: 300, EDGE: 300}
    assert "cores" in found["machine"]
    assert "80.0%" in lines_of(found)[-1]
