"""The controller is away for long: nothing that serves needs it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fixtures.mesh import Mesh

SOAKS = "INTERLOCK_SOAK_FACTOR" in os.environ
# In the long run the leases of the workers in Redis lapse ten times over.
ABSENCE_S = 300 if SOAKS else 6
CLIENTS = 4

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(ABSENCE_S + 300)]


def test_no_request_fails_while_the_controller_is_away_and_it_comes_back(mesh: Mesh) -> None:
    """It is stopped, so that nobody starts another; clients ask all the while, and none is turned away."""
    mesh.await_answer(60)
    controller = int(mesh.refresh()["controllers"][0]["pid"])
    until_s = time.monotonic() + ABSENCE_S

    def ask(number: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        while time.monotonic() < until_s:
            reply = mesh.post("/v1/generate", {"text": f"Count from {number}.", "max_tokens": 8})
            statuses[reply.status] += 1
        return statuses

    os.kill(controller, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = sum(pool.map(ask, range(CLIENTS)), Counter())
    finally:
        os.kill(controller, signal.SIGCONT)
    assert set(answers) == {200}, answers
    assert answers[200] > CLIENTS
    assert mesh.run("workers", "list", "--json").returncode == 0
    assert int(mesh.refresh()["controllers"][0]["pid"]) == controller
    assert mesh.ask("Hi", max_tokens=1)
