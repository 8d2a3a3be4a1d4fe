"""The controller is away for long: nothing that serves needs it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress

import psutil
import pytest
import redis

from services.common.queue_keys import ModelKeys
from services.controller.coordinator import RECORD_TTL_S
from tests.fixtures.mesh import MODEL, Mesh
from tests.fixtures.redis_server import advance_clock
from tests.fixtures.rollout_sight import until

SOAKS = "INTERLOCK_SOAK_FACTOR" in os.environ
# Longer than members' leases. The records of workers in Redis lapse by its own clock, which a short absence
# turns on; in the long run they lapse ten times over by themselves.
ABSENCE_S = 300 if SOAKS else 6
CLIENTS = 4
# Some answers of each client on a busy machine.
PATIENCE_S = 60.0

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(ABSENCE_S + 900)]


@contextmanager
def stopped(mesh: Mesh, controller: int) -> Iterator[None]:
    """It stands still, so that nobody starts another."""
    os.kill(controller, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(controller, signal.SIGCONT)
    assert int(mesh.refresh()["controllers"][0]["pid"]) == controller


@contextmanager
def killed(mesh: Mesh, controller: int) -> Iterator[None]:
    """It is dead, and so is each that is started in its place, before it can lead."""
    over = threading.Event()

    def keep_killing() -> None:
        while not over.wait(0.05):
            for child in psutil.Process(mesh.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    if "services.controller" in child.cmdline():
                        child.kill()

    os.kill(controller, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(keep_killing)
        try:
            yield
        finally:
            over.set()
    killing.result()
    deadline = time.monotonic() + 60
    while int(mesh.refresh()["controllers"][0]["pid"]) == controller:
        assert time.monotonic() < deadline, "nobody starts another"
        time.sleep(0.1)


@pytest.mark.parametrize("away", [stopped, killed])
def test_no_request_fails_while_the_controller_is_away_and_it_comes_back(
    mesh: Mesh, away: Callable[[Mesh, int], AbstractContextManager[None]]
) -> None:
    """Clients ask all the while, also when every lease in the store has lapsed: none is turned away."""
    mesh.await_answer(60)
    controller = int(mesh.refresh()["controllers"][0]["pid"])
    until_s = time.monotonic() + ABSENCE_S
    lapsed, enough = threading.Event(), threading.Event()
    # Whether the leases had lapsed when each was asked that was answered.
    answered: list[bool] = []

    def ask(number: int) -> None:
        while not enough.is_set():
            late = lapsed.is_set()
            reply = mesh.post("/v1/generate", {"text": f"Count from {number}.", "max_tokens": 8})
            assert reply.status == 200, reply.body
            answered.append(late)

    with redis.Redis.from_url(mesh.state["redis"]["address"], decode_responses=True) as store:
        with away(mesh, controller), ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask, number) for number in range(CLIENTS)]
            try:
                time.sleep(RECORD_TTL_S + 10 if SOAKS else 1)
                if not SOAKS:
                    advance_clock(store, MODEL, RECORD_TTL_S + 1)
                assert last_lease_s(store) < 0
                lapsed.set()
                time.sleep(max(0.0, until_s - time.monotonic()))
                until(lambda: sum(answered) > CLIENTS or any(one.done() for one in asking), PATIENCE_S)
            finally:
                enough.set()
            for client in asking:
                client.result()
            assert last_lease_s(store) < 0
        # It leads again, and its worker is listed for as long as before.
        deadline = time.monotonic() + 30
        while mesh.run("workers", "list", "--json").returncode != 0 or last_lease_s(store) < 0:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert mesh.ask("Hi", max_tokens=1)


def last_lease_s(store: redis.Redis) -> float:
    """How long the last of all workers' records holds yet, by the store's clock; below 0: all have lapsed."""
    keys = ModelKeys(MODEL)
    expiry = store.zrange(keys.prefix + "expiry", 0, -1, withscores=True)
    ends_ms = [float(entry[1]) for entry in expiry]
    assert ends_ms
    return (max(ends_ms) - float(store.hget(keys.clock, "logical") or 0)) / 1000
