"""Parts die, and the mesh goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2

from tests.fixtures.mesh import ROOT, Mesh
from tests.fixtures.rollout_sight import held, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# Streams that meet the death of their worker, and how many of them are seeded; the others are greedy.
STREAMS, SEEDED = 8, 2
TOKENS, MIDWAY = 64, 8
# Restarts on a busy machine.
PATIENCE_S = 90.0


@pytest.fixture(autouse=True)
def healed(mesh: Mesh) -> Iterator[None]:
    """The mesh is as before when a test ends: others share it."""
    yield
    until(lambda: is_whole(mesh), PATIENCE_S)


def is_whole(mesh: Mesh) -> bool:
    """Whether the controller lists the worker, and the store lends its slots."""
    try:
        if len(held(mesh)) != 1:
            return False
        with grpc.insecure_channel(mesh.address) as channel:
            stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
            return not hear(mesh, stub, 0, threading.Semaphore(), 1).degraded
    except (OSError, grpc.RpcError):
        return False


def kill(mesh: Mesh, part: str) -> int:
    """Kills a part of the mesh the hard way and returns the process id that it had."""
    state = mesh.refresh()[part]
    pid = int((state[0] if isinstance(state, list) else state)["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid


def await_new_pid(mesh: Mesh, part: str, old: int) -> None:
    """Waits until the supervisor has put another process in its place."""
    deadline = time.monotonic() + 60
    while True:
        state = mesh.refresh()[part]
        pid = int((state[0] if isinstance(state, list) else state)["pid"])
        if pid != old and psutil.pid_exists(pid):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("part", ["workers", "redis", "gateways", "controllers", "envoy"])
def test_a_killed_part_is_restarted_and_the_mesh_answers_again(mesh: Mesh, part: str) -> None:
    """SIGKILL of any part, the only one of its kind: the supervisor brings it back."""
    old = kill(mesh, part)
    await_new_pid(mesh, part, old)
    deadline = time.monotonic() + 60
    while True:
        try:
            assert "Paris" in mesh.await_answer(60)
        except OSError:
            # Envoy itself was killed: until it listens again the connection is refused.
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


@dataclass
class Heard:
    """What one client heard."""

    text: str = ""
    attempts: list[int] = field(default_factory=list)
    degraded: bool = False


def hear_all(mesh: Mesh, fault: Callable[[], object] = lambda: None) -> list[Heard]:
    """Greedy and seeded streams at once; `fault` happens when all are midway."""
    midway = threading.Semaphore(0)
    with ThreadPoolExecutor(STREAMS) as pool, grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        running = [pool.submit(hear, mesh, stub, number, midway) for number in range(STREAMS)]
        for _ in running:
            assert midway.acquire(timeout=60)
        fault()
        return [one.result(timeout=120) for one in running]


def hear(mesh: Mesh, stub: Any, number: int, midway: threading.Semaphore, max_tokens: int = TOKENS) -> Heard:
    """One stream, whose indices are contiguous."""
    sampling = generation_pb2.SamplingParams()
    if number < SEEDED:
        sampling = generation_pb2.SamplingParams(temperature=0.9, seed=number)
    text = f"Tell me a long story about {number} foxes."
    request = pb.GenerateRequest(text=text, max_tokens=max_tokens, sampling=sampling)
    heard, position = Heard(), 0
    for event in stub.Generate(request, metadata=(("authorization", f"Bearer {mesh.token}"),)):
        if event.HasField("started"):
            heard.attempts.append(event.started.attempt)
            heard.degraded |= event.started.degraded
        if event.HasField("chunk"):
            assert event.chunk.index == position
            if position < MIDWAY <= position + len(event.chunk.token_ids):
                midway.release()
            position += len(event.chunk.token_ids)
            heard.text += event.chunk.text
    return heard


def test_streams_survive_the_death_of_the_only_worker(mesh: Mesh) -> None:
    """They wait for its restart and go on at the next index; each text is that of a quiet run."""
    while True:
        quiet = hear_all(mesh)
        # A gateway whose Redis was just killed counts by an older epoch for a second, and is refused.
        if not any(heard.degraded for heard in quiet):
            break
    killed: list[int] = []
    streams = hear_all(mesh, lambda: killed.append(kill(mesh, "workers")))
    assert [heard.attempts for heard in streams] == [[1, 2]] * STREAMS
    assert [heard.text for heard in streams] == [heard.text for heard in quiet]
    await_new_pid(mesh, "workers", killed[0])


def test_running_streams_do_not_notice_the_death_of_redis(mesh: Mesh) -> None:
    """Tokens do not pass through the store, so its death ends no stream."""
    midway = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool, grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        running = pool.submit(hear, mesh, stub, STREAMS, midway, 150)
        assert midway.acquire(timeout=60)
        old = kill(mesh, "redis")
        heard = running.result(timeout=120)
    assert heard.attempts == [1]
    assert len(heard.text) > 100
    await_new_pid(mesh, "redis", old)
    mesh.await_answer(60)


def test_a_taken_port_is_named(mesh: Mesh, model_path: Path) -> None:
    """`up` on the port of another mesh says which port is taken and ends with 1; that mesh is unharmed."""
    port = mesh.refresh()["http"].rstrip("/").rpartition(":")[2]
    home = mesh.home / "second"
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "up", "--port", port, "--model", str(model_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"INTERLOCK_HOME": str(home)},
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert port in done.stdout + done.stderr
    assert mesh.await_answer(30)
