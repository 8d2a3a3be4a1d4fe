"""A gateway that is stopped in a process of its own, and what becomes of what it holds at a real worker."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from pydantic import TypeAdapter

from services.common import server
from services.common.redis_client import RedisStore
from services.common.system_clock import SystemClock
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway.core.vital_signs import ABSENCE_S
from services.worker.__main__ import _Process as WorkerProcess
from services.worker.config import WorkerConfig
from services.worker.core.batch import Batch
from services.worker.core.revision import Phase
from tests.fakes.gateway_process import gateway_process
from tests.fakes.scripted_worker import MESH_TOKEN
from tests.fakes.worker_ports import FakeRunner, continuation
from tests.fixtures.gateway_world import MODEL, REVISION, bearer, fail, reason_of
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.resumption_world import ResumptionWorld, open_resumption_world

SLOTS = 2
TOKENS = 60
ANSWER = continuation(tuple(map(ord, "user:hi\n")), TOKENS)
# From a short stall on: what the worker's server promises, and what a busy machine adds.
GONE_S = 3.0 + 7.0


class SlowRunner(FakeRunner):
    """So slow at first that an answer takes some seconds."""

    step_s = 0.05

    def step(self, batch: Batch) -> Any:
        """See `ModelRunner.step`."""
        time.sleep(self.step_s)
        return super().step(batch)


def died(code: int) -> None:
    """The worker's engine hangs or fails."""
    pytest.fail(f"the worker ended with {code}")


@asynccontextmanager
async def open_worker(tmp_path: Path, store: RedisStore, runner: SlowRunner) -> AsyncIterator[WorkerProcess]:
    """A worker as its process puts it together, listed in the store, with a model that computes nothing."""
    settings = {
        "id": "w1",
        "bind": "127.0.0.1:0",
        "mesh_token": MESH_TOKEN,
        "cache_dir": tmp_path,
        "slots": SLOTS,
        "metrics_bind": "",
    }
    config = TypeAdapter(WorkerConfig).validate_python(settings)
    worker = WorkerProcess(config, SystemClock(), died)
    address = await worker.open()
    worker.engine.host(REVISION, runner)
    worker.residency.begin(MODEL, REVISION)
    for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
        worker.residency.enter(REVISION, phase)
    worker.residency.activate(REVISION, 1)
    record = WorkerRecord("w1", address, "i1", SLOTS, False, frozenset({REVISION}), 1e6)
    await RedisRouteStore(store).write_worker(MODEL, record, 1)
    try:
        yield worker
    finally:
        await worker.close()


def ids_of(events: list[pb.GenerateResponse]) -> list[int]:
    """The tokens of a stream, each once and in order."""
    found: list[int] = []
    for event in events:
        if event.HasField("chunk"):
            assert event.chunk.index == len(found)
            found += event.chunk.token_ids
    return found


def asked(request_id: str, tokens: int = TOKENS, *, resumable: bool = False) -> pb.GenerateRequest:
    """A request."""
    return pb.GenerateRequest(text="hi", max_tokens=tokens, request_id=request_id, resumable=resumable)


async def until_text(call: Any) -> list[pb.GenerateResponse]:
    """The events of a call up to its first tokens."""
    events: list[pb.GenerateResponse] = []
    async for event in call:
        events.append(event)
        if event.HasField("chunk"):
            break
    return events


@dataclass
class Scene:
    """A gateway in a process of its own, a real worker whose slots it holds, and its two clients."""

    world: ResumptionWorld
    worker: WorkerProcess
    runner: SlowRunner
    process: asyncio.subprocess.Process
    stub: Any

    def begin(self, request: pb.GenerateRequest) -> Any:
        """Asks the gateway."""
        return self.stub.Generate(request, metadata=bearer())

    def stop(self) -> None:
        """SIGSTOP. The model is quick from now on: the slots are held by the gateway alone."""
        self.process.send_signal(signal.SIGSTOP)
        self.runner.step_s = 0.0

    def wake(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    @property
    def free_slots(self) -> int:
        """Of the worker, as it sees it."""
        return self.worker.engine.pulse.free_slots


@pytest.fixture
async def scene(redis_process: RedisServer, redis_store: RedisStore, tmp_path: Path) -> AsyncIterator[Scene]:
    """Nobody has asked for anything yet."""
    runner = SlowRunner()
    async with (
        open_resumption_world(redis_process.url, redis_store) as world,
        open_worker(tmp_path, redis_store, runner) as worker,
        gateway_process(redis_process.url, "g1") as (process, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Scene(world, worker, runner, process, gateway_service_pb2_grpc.GatewayServiceStub(channel))


async def test_a_gateway_that_is_stopped_keeps_no_slot_and_another_one_uses_it(scene: Scene) -> None:
    """It goes on with what is resumable; the other's clients hear so when it wakes, and it serves again.

    Nothing tells the worker: the connection of a stopped process stays open.
    """
    plain, kept = scene.begin(asked("q")), scene.begin(asked("r", resumable=True))
    said, heard = await until_text(plain), await until_text(kept)
    scene.stop()
    stopped_s = time.monotonic()
    other = await scene.world.add_gateway("g2")
    # A stop that is shorter breaks nothing.
    await asyncio.sleep(stopped_s + ABSENCE_S - time.monotonic())
    assert scene.free_slots == 0
    kept.cancel()
    stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(other.channel)
    request = pb.ResumeGenerationRequest(request_id="r", cursor=heard[-1].cursor)
    async with asyncio.timeout(GONE_S):
        heard += [event async for event in stub.ResumeGeneration(request, metadata=bearer())]
    assert ids_of(heard) == ANSWER
    assert scene.free_slots == SLOTS
    scene.wake()
    error, rest = await fail(plain)
    assert reason_of(error) == "WORKER_LOST"
    said += rest
    assert ids_of(said) == ANSWER[: len(ids_of(said))]
    assert ids_of([event async for event in scene.begin(asked("s", 8))]) == ANSWER[:8]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that ping sooner, and wait for less long, than they do."""
    quick = {"grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 1_500}
    monkeypatch.setattr(server, "KEEPALIVE", tuple((dict(server.KEEPALIVE) | quick).items()))


@pytest.mark.usefixtures("impatient")
async def test_streams_of_a_gateway_that_wakes_go_on(scene: Scene) -> None:
    """Where nobody has taken its requests meanwhile: behind what was told, as after a lost worker."""
    calls = [scene.begin(asked("q")), scene.begin(asked("r", resumable=True))]
    told = [await until_text(call) for call in calls]
    scene.stop()
    async with asyncio.timeout(GONE_S):
        while scene.free_slots < SLOTS:  # noqa: ASYNC110 - the worker tells nobody
            await asyncio.sleep(0.05)
    scene.wake()
    for call, events in zip(calls, told, strict=True):
        events += [event async for event in call]
        assert ids_of(events) == ANSWER
        assert events[-1].HasField("finished")
