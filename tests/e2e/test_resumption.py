"""A gateway dies under its clients, then the store under its gateways: every client ends with its text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock import resume
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2

from tests.fixtures.mesh import ROOT, Mesh, started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STREAMS = 16
TOKENS = 48
# Half of the streams begin at the gateway that dies; on a busy machine some of them have ended by then.
RESUMED_MIN = 4
# What runs while the store dies.
LOADING = 8
# What the design promises: how long after the store's return the last trace of its death is gone.
HEALED_S = 10.0
# A restart, or good answers in a row, on a busy machine.
PATIENCE_S = 60.0
# Both gateways are asked in turns: so many good answers one after the other are no luck.
NORMAL_IN_A_ROW = 6


@pytest.fixture(scope="module")
def pair(model_path: Path) -> Iterator[Mesh]:
    """Two gateways before one worker that has slots for all streams.

    It computes in fp32, where a continued text does not depend on who else is in the batch.
    """
    with started(model_path, "--gateways", "2", "--dtype", "fp32", INTERLOCK_WORKER_SLOTS="24") as mesh:
        yield mesh


def request(number: int, max_tokens: int = TOKENS, *, resumable: bool = False) -> pb.GenerateRequest:
    """Every other one is seeded, the rest are greedy."""
    sampling = generation_pb2.SamplingParams()
    if number % 2:
        sampling = generation_pb2.SamplingParams(temperature=0.9, seed=number)
    text = f"Tell me a long story about the number {number}."
    return pb.GenerateRequest(text=text, max_tokens=max_tokens, sampling=sampling, resumable=resumable)


def bearer(mesh: Mesh) -> tuple[tuple[str, str], ...]:
    """The call's metadata."""
    return (("authorization", f"Bearer {mesh.token}"),)


@dataclass
class Followed:
    """What one client saw: text and ids, and which gateway it called for what, in order."""

    text: str
    token_ids: tuple[int, ...]
    calls: list[tuple[str, str]]


class Noted(grpc.UnaryStreamClientInterceptor):
    """Notes the calls of one gateway."""

    def __init__(self, address: str, calls: list[tuple[str, str]]) -> None:
        self._address = address
        self._calls = calls

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Lets it go on."""
        self._calls.append((self._address, client_call_details.method.rpartition("/")[2]))
        return continuation(client_call_details, request)


def follow(mesh: Mesh, number: int, midway: threading.Semaphore) -> Followed:
    """One resumable request, first at the one gateway or at the other.

    The client in use raises where an index is missing or comes twice.
    """
    gateways = [part["address"] for part in mesh.state["gateways"]]
    if number % 4 >= 2:
        gateways.reverse()
    text = ""
    token_ids: list[int] = []
    calls: list[tuple[str, str]] = []
    with ExitStack() as exits:
        channels = [
            grpc.intercept_channel(exits.enter_context(grpc.insecure_channel(address)), Noted(address, calls))
            for address in gateways
        ]
        for event in resume.generate(channels, request(number), metadata=bearer(mesh)):
            if not event.HasField("chunk"):
                continue
            assert event.chunk.index == len(token_ids)
            if len(token_ids) < 8 <= len(token_ids) + len(event.chunk.token_ids):
                midway.release()
            token_ids.extend(event.chunk.token_ids)
            text += event.chunk.text
    return Followed(text, tuple(token_ids), calls)


def run_all(mesh: Mesh, victim: int | None = None) -> list[Followed]:
    """All streams at once; `victim` is the process that is killed when all are midway."""
    midway = threading.Semaphore(0)
    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(follow, mesh, number, midway) for number in range(STREAMS)]
        if victim is not None:
            for _ in running:
                assert midway.acquire(timeout=60)
            os.kill(victim, signal.SIGKILL)
        return [one.result(timeout=120) for one in running]


def test_clients_of_a_killed_gateway_end_with_the_text_of_a_quiet_run(pair: Mesh) -> None:
    """Greedy and seeded, begun at the dead gateway or the other: nothing is missing, doubled or different.

    The supervisor stands still meanwhile: whoever was cut off has the rest from the gateway that is left.
    """
    quiet = run_all(pair)
    assert all(one.token_ids for one in quiet)
    victim, survivor = pair.refresh()["gateways"]
    pair.process.send_signal(signal.SIGSTOP)
    try:
        told = run_all(pair, victim["pid"])
    finally:
        pair.process.send_signal(signal.SIGCONT)
    await_successor(pair, victim["pid"])
    assert [(one.text, one.token_ids) for one in told] == [(one.text, one.token_ids) for one in quiet]
    resumed = [one for one in told if one.calls[-1] == (survivor["address"], "ResumeGeneration")]
    assert len(resumed) >= RESUMED_MIN, [one.calls for one in told]
    assert all(one.calls[0] == (victim["address"], "Generate") for one in resumed)
    # The others were whole when it died, or were the survivor's from the beginning.
    assert all(len(one.calls) == 1 for one in told if one not in resumed)


def test_the_example_prints_a_resumable_answer(pair: Mesh) -> None:
    """It works as README.md shows it."""
    question = "What is the capital of France?"
    done = subprocess.run(
        [sys.executable, "examples/python_resume.py", pair.address, pair.token, question],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=pair.environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_death_of_the_store_under_load_ends_no_stream_and_heals(pair: Mesh) -> None:
    """Running streams end whole, of both kinds, new ones are all served, some degraded, and soon none is."""
    with grpc.insecure_channel(pair.address) as channel, ThreadPoolExecutor(LOADING) as pool:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]

        def begin() -> list[Future[str]]:
            # Two of four go through the store to their clients.
            asked = [request(number, 96, resumable=number % 4 < 2) for number in range(LOADING)]
            calls = [stub.Generate(one, metadata=bearer(pair)) for one in asked]
            begun = threading.Semaphore(0)
            texts = [pool.submit(text_of, call, begun) for call in calls]
            for _ in texts:
                assert begun.acquire(timeout=60)
            return texts

        await_shared(stub, pair, time.monotonic())
        quiet = [text.result(timeout=120) for text in begin()]
        texts = begin()
        old = int(pair.refresh()["redis"]["pid"])
        # It is stopped before it is killed: on a busy machine another one may stand in its place before
        # anybody has asked.
        os.kill(old, signal.SIGSTOP)
        try:
            assert not any(text.done() for text in texts)
            told = [is_served(stub, pair) for _ in range(20)]
        finally:
            os.kill(old, signal.SIGKILL)
        assert set(told) <= {"shared", "degraded"}
        assert "degraded" in told
        await_shared(stub, pair, await_store(pair, old))
        assert [text.result(timeout=120) for text in texts] == quiet


def test_a_gateway_that_leaves_costs_no_call(pair: Mesh) -> None:
    """SIGTERM under calls by HTTP and gRPC: Envoy gives each to the other one, and nobody is told."""
    pair.await_answer(60)
    leaving = int(pair.refresh()["gateways"][0]["pid"])
    gone = threading.Event()

    def by_http(number: int) -> list[str]:
        ends = []
        while not gone.is_set():
            ends.append(str(pair.post("/v1/generate", {"text": f"Name {number}.", "max_tokens": 4}).status))
        return ends

    def by_grpc(number: int) -> list[str]:
        ends = []
        with grpc.insecure_channel(pair.address) as channel:
            stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
            while not gone.is_set():
                events = list(stub.Generate(request(number, 4), metadata=bearer(pair), timeout=60))
                ends.append("200" if events[-1].HasField("finished") else "unfinished")
        return ends

    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(by_http if number % 2 else by_grpc, number) for number in range(8)]
        try:
            os.kill(leaving, signal.SIGTERM)
            await_successor(pair, leaving, 90)
            # Its successor takes its share again.
            time.sleep(1)
        finally:
            gone.set()
        told = [end for future in ends for end in future.result(timeout=120)]
    assert set(told) == {"200"}
    assert len(told) > len(ends)


def text_of(events: Iterable[pb.GenerateResponse], begun: threading.Semaphore) -> str:
    """The text of a stream that ends as it should, with each index once; `begun` is told of its first."""
    text, position, finished = "", 0, False
    for event in events:
        if event.HasField("chunk"):
            if position == 0:
                begun.release()
            assert event.chunk.index == position
            position += len(event.chunk.token_ids)
            text += event.chunk.text
        finished = event.HasField("finished")
    assert finished
    return text


def await_successor(mesh: Mesh, old: int, timeout_s: float = PATIENCE_S) -> None:
    """Returns when another gateway serves in the place of process `old`, the first one's."""
    deadline = time.monotonic() + timeout_s
    while int((part := mesh.refresh()["gateways"][0])["pid"]) == old or not is_serving(part["address"]):
        assert time.monotonic() < deadline, "no other one serves in its place"
        time.sleep(0.1)


def is_serving(address: str) -> bool:
    """What a gateway says of its health."""
    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def await_shared(stub: Any, mesh: Mesh, since_s: float) -> None:
    """Returns when requests are served from the shared queue; soon after `since_s` all of them are."""
    in_a_row, other_s = 0, since_s
    while in_a_row < NORMAL_IN_A_ROW:
        asked_s = time.monotonic()
        assert asked_s - since_s < PATIENCE_S
        if is_served(stub, mesh) == "shared":
            in_a_row += 1
        else:
            in_a_row, other_s = 0, asked_s
        time.sleep(0.05)
    assert other_s - since_s < HEALED_S


def await_store(mesh: Mesh, old: int) -> float:
    """Returns when the supervisor has started another store in the place of process `old`."""
    deadline = time.monotonic() + 60
    while int(mesh.refresh()["redis"]["pid"]) == old:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return time.monotonic()


def is_served(stub: Any, mesh: Mesh) -> str:
    """Asks for one token; returns from which queue its slot came, empty where it was refused."""
    try:
        for event in stub.Generate(request(0, 1), metadata=bearer(mesh), timeout=10):
            if event.HasField("started"):
                return "degraded" if event.started.degraded else "shared"
    except grpc.RpcError:
        return ""
    return ""
