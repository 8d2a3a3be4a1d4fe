"""The description at `/openapi.json` holds: generated requests through a real Envoy find no breach of it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import bearer, started
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import MODEL, make_token, open_gateway

# `make soak` asks for 2,000 cases over all operations, other ones each time; `make test` for the same few.
FEW = "INTERLOCK_OPENAPI_CASES" not in os.environ
CASES = int(os.environ.get("INTERLOCK_OPENAPI_CASES", "400"))
# The tests' own time grows with their cases.
SECONDS = 90 + CASES // 4

# Most cases go where something can be wrong: to what takes a body. Health takes nothing and has few.
SHARES = {
    "POST /v1/generate": 0.3,
    "POST /v1/chat/completions": 0.12,
    "POST /v1/completions": 0.08,
    "POST /v1/responses": 0.12,
    "POST /v1/messages": 0.1,
    "POST /v1/messages/count_tokens": 0.05,
    "POST /v1/admin/rollouts": 0.03,
    "GET /healthz": 0.005,
    "GET /readyz": 0.005,
}
OTHERS_SHARE = 0.01

# The model that the mesh in this test serves, and the one that its controller has.
ADMIN_MODEL = "m"
TOKENS_FEW = 16
# Names of so many characters and more stay as they were drawn.
NAMES_KEPT = 6


def bring_home(case: Any, served: str) -> None:
    """Gives most cases the name of a model that is there, few tokens to make, and the user the last word.

    What is drawn is nobody's name, and more than fits; what lies behind the look for them wants cases too.
    """
    for place in (case.body, case.path_parameters, case.query):
        if not isinstance(place, dict):
            continue
        if isinstance(name := place.get("model"), str) and len(name) < NAMES_KEPT:
            place["model"] = served
        for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(number := place.get(field)) is int and number > TOKENS_FEW:
                place[field] = TOKENS_FEW
        if isinstance(turns := place.get("messages"), list) and "messages" in case.operation.label:
            turns.append({"role": "user", "content": "hi"})


class Asker:
    """Sends generated cases, and keeps what was answered.

    Attributes:
        answers: How often each operation answered with each status.
        streams: How many answers were asked for as events, too.
    """

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.streams = 0

    def ask(self, case: Any) -> None:
        """Sends one case; fails where the answer is none that is described."""
        label = case.operation.label
        bring_home(case, ADMIN_MODEL if "/v1/admin/" in label else MODEL)
        token = dict(bearer("admin"))["authorization"] if "/v1/admin/" in label else f"Bearer {make_token()}"
        described = case.operation.definition.raw["responses"]
        answered = self._send(case, token, described)
        # What was answered whole can be streamed as well.
        if answered and isinstance(case.body, dict) and "text/event-stream" in described["200"]["content"]:
            case.body["stream"] = True
            self.streams += self._send(case, token, described)

    def _send(self, case: Any, token: str, described: Any) -> bool:
        """Whether one case was answered, by something that is described."""
        response = case.call(headers={"authorization": token, "x-interlock-deadline": "5"})
        self.answers[case.operation.label, response.status_code] += 1
        # What is described is 503 and 504, and 501 for what is known and not served.
        assert str(response.status_code) in described, (case.as_curl_command(), response.text)
        case.operation.validate_response(response)
        return bool(response.status_code == 200)

    def statuses(self, label: str) -> set[int]:
        """What an operation has answered."""
        return {status for asked, status in self.answers if asked == label}


def operations_of(url: str) -> Iterator[Any]:
    """What is described."""
    described: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    return (found.ok() for found in described.get_all_operations())


def ask_all(url: str, asker: Asker) -> None:
    """Sends generated cases of every operation."""
    for operation in operations_of(url):
        count = max(3, round(CASES * SHARES.get(operation.label, OTHERS_SHARE)))

        # Half of the cases fit the description, half break it in one place.
        kinds = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

        @given(case=st.one_of(kinds))
        @settings(
            max_examples=count,
            database=None,
            derandomize=FEW,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            asker.ask(case)

        ask()


@pytest.mark.timeout(SECONDS + 30)
async def test_generated_requests_find_no_breach(tmp_path: Path) -> None:
    """No status that is not described, and no body of another shape; the gateway is idle afterwards."""
    asker = Asker()
    async with (
        open_gateway() as gateway,
        started(tmp_path, MemoryRouteStore()) as controller,
        envoy_before(tmp_path, gateway.address, controller.address) as url,
    ):
        await controller.serving()
        await gateway.add_worker("w1", Script(answer="fine"), slots=8)
        await gateway.dispatcher.renew()
        await asyncio.wait_for(asyncio.to_thread(ask_all, url, asker), SECONDS)
        await gateway.wait_idle()
    # A pass must not come from refusals alone.
    for label in (label for label in SHARES if label.startswith("POST ") and "/admin/" not in label):
        assert {200, 400} <= asker.statuses(label), (label, asker.answers)
    assert asker.streams
    for path in ("models", "revisions", "rollouts", "workers", "breakers"):
        assert 200 in asker.statuses(f"GET /v1/admin/{path}"), asker.answers
    assert asker.answers.total() >= CASES, asker.answers
