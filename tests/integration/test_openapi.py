"""The description at `/openapi.json` holds: generated requests through a real Envoy find no breach of it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import make_token, open_gateway

# `make soak` asks for 2,000 cases over all operations.
CASES = int(os.environ.get("INTERLOCK_OPENAPI_CASES", "150"))
# The tests' own time grows with their cases.
SECONDS = 60 + CASES // 4


def ask_all(url: str) -> Counter[int]:
    """Sends generated cases of every operation; returns how often each status was answered."""
    described: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.label for operation in operations} == {
        "POST /v1/generate",
        "GET /v1/generate/{request_id}",
        "DELETE /v1/generate/{request_id}",
        "GET /healthz",
        "GET /readyz",
    }
    statuses: Counter[int] = Counter()
    headers = {"authorization": f"Bearer {make_token()}", "x-interlock-deadline": "5"}
    # Health takes nothing and has few cases, so most cases go where something can be wrong.
    shares = {"POST /v1/generate": 0.85, "GET /healthz": 0.005, "GET /readyz": 0.005}
    for operation in operations:
        count = max(3, round(CASES * shares.get(operation.label, 0.095)))

        # Half of the cases fit the description, half break it in one place.
        kinds = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

        @given(case=st.one_of(kinds))
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call(headers=headers)
            statuses[response.status_code] += 1
            # What is described is 503 and 504, and 501 for what is known and not served.
            assert str(response.status_code) in case.operation.definition.raw["responses"], response.text
            case.operation.validate_response(response)

        ask()
    return statuses


@pytest.mark.timeout(SECONDS + 30)
async def test_generated_requests_find_no_breach(tmp_path: Path) -> None:
    """No status that is not described, and no body of another shape; the gateway is idle afterwards."""
    async with open_gateway() as gateway, envoy_before(tmp_path, gateway.address) as url:
        await gateway.add_worker("w1", Script(answer="fine"), slots=8)
        await gateway.dispatcher.renew()
        statuses = await asyncio.wait_for(asyncio.to_thread(ask_all, url), SECONDS)
        await gateway.wait_idle()
    # A pass must not come from refusals alone.
    assert {200, 400, 404} <= set(statuses), statuses
    assert statuses.total() >= CASES, statuses
