"""The whole worker, over a fake model or a tiny one, with a controller that follows a script."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import (
    controller_service_pb2,
    controller_service_pb2_grpc,
    generation_pb2,
    model_pb2,
    worker_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from services.common import server
from services.common.channel import connect
from services.common.credential import mesh_metadata
from services.common.system_clock import SystemClock
from services.worker.__main__ import Compute, run, torch_compute
from services.worker.config import WorkerConfig
from services.worker.core.revision import LoadStage
from tests.fakes import tiny_models
from tests.fakes.worker_ports import FACTS, FakeLoader, continuation

TOKEN = "t" * 32
PROMPT = (3, 1, 4, 1, 5)


class ScriptedController(controller_service_pb2_grpc.ControllerServiceServicer):
    """Grants leases, records what members say, and sends what a test tells it to."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[controller_service_pb2.AttachRequest] = asyncio.Queue()
        self.commands: asyncio.Queue[controller_service_pb2.AttachResponse | None] = asyncio.Queue()
        self.fence = 3
        self.ttl_s = 5
        self.renews = True
        self.files: Path | None = None

    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002
        """One member; `None` among the commands ends the stream."""
        await self.heard.put(await anext(request_iterator))
        ttl = duration_pb2.Duration(seconds=self.ttl_s)
        lease = controller_service_pb2.AttachResponse(
            lease=controller_service_pb2.Lease(ttl=ttl, fence=self.fence)
        )
        yield lease

        async def listen() -> None:
            async for request in request_iterator:
                await self.heard.put(request)
                if self.renews and request.HasField("load"):
                    await self.commands.put(lease)

        listening = asyncio.create_task(listen())
        try:
            while (command := await self.commands.get()) is not None:
                yield command
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def DownloadRevision(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002
        """A file of `files`, from the offset on."""
        assert self.files is not None
        data = (self.files / request.path).read_bytes()[request.offset :]
        for begin in range(0, len(data), 50_000):
            yield controller_service_pb2.DownloadRevisionResponse(data=data[begin : begin + 50_000])

    async def hear(self, event: str) -> Any:
        """The next report of a kind; others are passed over."""
        async with asyncio.timeout(20):
            while True:
                request = await self.heard.get()
                if request.WhichOneof("event") == event:
                    return getattr(request, event)

    async def prepare(self, manifest: model_pb2.Manifest) -> None:
        """Sends Prepare."""
        prepare = controller_service_pb2.Prepare(manifest=manifest)
        await self.commands.put(controller_service_pb2.AttachResponse(prepare=prepare))

    async def stage(self, manifest: model_pb2.Manifest) -> None:
        """Sends Prepare for the files alone."""
        prepare = controller_service_pb2.Prepare(manifest=manifest, stage_only=True)
        await self.commands.put(controller_service_pb2.AttachResponse(prepare=prepare))

    async def activate(self, epoch: int) -> None:
        """Sends Activate for r1 and waits until it is known."""
        activate = controller_service_pb2.Activate(model="m", revision="r1", epoch=epoch)
        await self.commands.put(controller_service_pb2.AttachResponse(activate=activate))
        assert (await self.hear("activated")).epoch == epoch


class Worker:
    """A worker that runs in this process until `stop`."""

    def __init__(self, config: WorkerConfig, make_compute: Callable[[WorkerConfig], Compute]) -> None:
        self._stop = asyncio.Event()
        self.died: list[int] = []
        self._announced = config.announce_file
        self._task = asyncio.create_task(
            run(config, make_compute=make_compute, until_stopped=self._until, die=self.died.append)
        )

    async def address(self) -> str:
        """Where it listens, once announced."""
        assert self._announced is not None
        async with asyncio.timeout(10):
            while not self._announced.exists():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.01)
        return str(json.loads(self._announced.read_text())["address"])

    def begin_drain(self) -> None:
        """What SIGTERM does."""
        self._stop.set()

    async def stop(self) -> None:
        """Ends it and waits for the end."""
        self._stop.set()
        await asyncio.wait_for(self._task, 20)

    async def _until(self, drain: Callable[[], Awaitable[None]]) -> None:
        await self._stop.wait()
        await drain()


@pytest.fixture
async def controller() -> AsyncIterator[tuple[ScriptedController, str]]:
    """The scripted controller and its address."""
    servicer = ScriptedController()  # type: ignore[abstract] # two methods are all that a worker calls
    made = server.create(["interlock.v1.ControllerService"], SystemClock())
    controller_service_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, made.grpc_server)
    address = made.bind("127.0.0.1:0")
    await made.grpc_server.start()
    yield servicer, address
    await made.grpc_server.stop(0)


def config_for(tmp_path: Path, *controllers: str, **more: Any) -> WorkerConfig:
    """A worker's settings."""
    values: dict[str, Any] = {
        "id": "worker-1",
        "bind": "127.0.0.1:0",
        "announce_file": tmp_path / "announce.json",
        "controllers": controllers or ("127.0.0.1:1",),
        "cache_dir": tmp_path / "cache",
        "mesh_token": TOKEN,
        "device": "cpu",
        "slots": 4,
        "threads": 1,
        "kv_cache_bytes": 1 << 24,
    }
    # Validated as at a real start.
    return TypeAdapter(WorkerConfig).validate_python(values | more)


def manifest_of(directory: Path, *, local: bool) -> model_pb2.Manifest:
    """The manifest of what lies in `directory`."""
    files = [
        model_pb2.ArtifactFile(
            path=path.name,
            size_bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.iterdir())
    ]
    return model_pb2.Manifest(
        model="m",
        revision="r1",
        files=files,
        quantization=model_pb2.QUANTIZATION_NONE,
        compute_dtype=model_pb2.COMPUTE_DTYPE_FP32,
        local_path=str(directory) if local else "",
    )


async def health_of(address: str) -> int:
    """What the health service says."""
    async with connect(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
    return int(answer.status)


async def generate(address: str, prompt: tuple[int, ...], tokens: int, **fields: Any) -> list[int]:
    """The tokens of one job, greedy unless `fields` of its order say otherwise."""
    return [
        token for output in await outputs_of(address, prompt, tokens, **fields) for token in output.token_ids
    ]


async def outputs_of(address: str, prompt: tuple[int, ...], tokens: int, **fields: Any) -> list[Any]:
    """The outputs of one job."""
    async with connect(address) as channel:
        call: Any = worker_service_pb2_grpc.WorkerServiceStub(channel).Session(metadata=mesh_metadata(TOKEN))
        job = worker_service_pb2.StartJob(
            job="a",
            attempt=1,
            model="m",
            revision="r1",
            epoch=9,
            prompt_ids=prompt,
            max_tokens=tokens,
            n=1,
            credit_tokens=1_000,
            **fields,
        )
        await call.write(worker_service_pb2.SessionRequest(start=job))
        found: list[Any] = []
        async with asyncio.timeout(20):
            while True:
                response = await call.read()
                assert not response.HasField("refused"), response
                for output in response.step.outputs:
                    found.append(output)
                    if output.finish:
                        assert output.finish != generation_pb2.FINISH_REASON_ERROR
                        call.cancel()
                        return found


async def test_prepare_ready_activate_and_serve(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """The handshake in its order; health turns SERVING with the activation, and jobs are answered."""
    script, controller_address = controller
    compute = Compute((("cpu", "test", 1_000),), FakeLoader())
    worker = Worker(config_for(tmp_path, controller_address), lambda _: compute)
    address = await worker.address()
    hello = await script.hear("hello")
    assert (hello.kind, hello.id, hello.slots) == (controller_service_pb2.MEMBER_KIND_WORKER, "worker-1", 4)
    assert hello.address == address
    assert await health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    ready = await script.hear("ready")
    assert set(ready.phases) == {"fetch", "verify", "load", "warm"}
    await script.activate(9)
    assert await health_of(address) == health_pb2.HealthCheckResponse.SERVING
    assert await generate(address, PROMPT, 7) == continuation(PROMPT, 7)
    assert (await script.hear("load")).slots == 4
    await worker.stop()


async def test_a_reconnected_worker_tells_what_it_holds(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """After the controller went away the worker serves on, walks its list, and Hello names the revision."""
    script, controller_address = controller
    compute = Compute((), FakeLoader())
    worker = Worker(config_for(tmp_path, "127.0.0.1:1", controller_address), lambda _: compute)
    address = await worker.address()
    await script.hear("hello")
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await script.activate(9)
    await script.commands.put(None)
    assert await generate(address, PROMPT, 3) == continuation(PROMPT, 3)
    hello = await script.hear("hello")
    assert [(one.revision, one.phase) for one in hello.revisions] == [
        ("r1", worker_pb2.REVISION_PHASE_ACTIVE)
    ]
    assert (hello.epoch, hello.fence) == (9, 3)
    await worker.stop()


async def test_a_controller_that_falls_silent_is_left(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """The connection to a process that was stopped stays open; the lease says for how long that counts."""
    script, controller_address = controller
    script.ttl_s = 3
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), FakeLoader()))
    await script.hear("hello")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(4.5):
            await script.hear("hello")
    script.renews = False
    assert (await script.hear("hello")).fence == 3
    await worker.stop()


@pytest.mark.parametrize("broken", ["verify", "load"])
async def test_a_failed_preparation_is_reported_and_may_be_repeated(
    controller: tuple[ScriptedController, str], tmp_path: Path, broken: str
) -> None:
    """Failed names the phase and the reason; the same revision can be prepared again."""
    script, controller_address = controller
    loader = FakeLoader()
    if broken == "verify":
        loader.flaw = "It is not a model."
    else:
        loader.error = RuntimeError("/secret/path")
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    failed = await script.hear("failed")
    assert failed.phase == worker_pb2.RevisionPhase.Value(f"REVISION_PHASE_{broken.upper()}")
    assert "secret" not in failed.reason
    loader.flaw, loader.error = "", None
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await worker.stop()


async def test_a_revision_is_staged_and_loaded_when_told(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """Files first, checked, and nothing is loaded; a Hello says so; what is asked then loads it."""
    script, controller_address = controller
    loader = FakeLoader()
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    manifest = model_pb2.Manifest(model="m", revision="r1")
    await script.stage(manifest)
    assert (await script.hear("staged")).revision == "r1"
    assert not loader.entered.is_set()
    await script.commands.put(None)
    hello = await script.hear("hello")
    while not hello.revisions:
        hello = await script.hear("hello")
    assert hello.revisions[0].phase == worker_pb2.REVISION_PHASE_STAGED
    await script.stage(manifest)
    assert (await script.hear("staged")).revision == "r1"
    await script.prepare(manifest)
    await script.hear("ready")
    await script.activate(9)
    await worker.stop()


async def test_what_was_staged_is_forgotten_when_told(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """An abort is answered, and it can be staged again; a flaw is found before anything is loaded."""
    script, controller_address = controller
    loader = FakeLoader()
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    manifest = model_pb2.Manifest(model="m", revision="r1")
    await script.stage(manifest)
    await script.hear("staged")
    abort = controller_service_pb2.Abort(revision="r1")
    await script.commands.put(controller_service_pb2.AttachResponse(abort=abort))
    assert (await script.hear("retired")).revision == "r1"
    loader.flaw = "It is not a model."
    await script.stage(manifest)
    failed = await script.hear("failed")
    assert (failed.phase, failed.reason) == (worker_pb2.REVISION_PHASE_VERIFY, "It is not a model.")
    assert not loader.entered.is_set()
    await worker.stop()


@pytest.mark.parametrize(
    ("memory_bytes", "least_bytes", "phase", "said"),
    [
        # By what the headers say, before a weight is read.
        (2_500_000, 2_600_000, "VERIFY", "need 3 MB of memory; the worker may use 3 MB. Choose a smaller"),
        (2_500_000, 2_000_000, "VERIFY", "of which other revisions hold 2 MB. Roll it out with the strategy"),
        # By what a load has measured.
        (2_500_000, 0, "LOAD", "of which other revisions hold 2 MB. Roll it out with the strategy swap."),
    ],
)
async def test_a_revision_that_does_not_fit_is_refused_and_the_other_one_serves_on(
    controller: tuple[ScriptedController, str],
    tmp_path: Path,
    memory_bytes: int,
    least_bytes: int,
    phase: str,
    said: str,
) -> None:
    """The reason names memory: what there is, who holds it, and what to do; what serves is not touched."""
    script, controller_address = controller
    loader = FakeLoader(dataclasses.replace(FACTS, weights_bytes=1_500_000))
    compute = Compute((("cpu", "test", memory_bytes),), loader)
    worker = Worker(config_for(tmp_path, controller_address), lambda _: compute)
    address = await worker.address()
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await script.activate(9)
    loader.least_bytes = least_bytes
    await script.prepare(model_pb2.Manifest(model="m", revision="r2"))
    failed = await script.hear("failed")
    assert failed.revision == "r2"
    assert failed.phase == worker_pb2.RevisionPhase.Value(f"REVISION_PHASE_{phase}")
    assert said in failed.reason
    assert await generate(address, PROMPT, 3) == continuation(PROMPT, 3)
    assert [runner.closed for runner in loader.runners] == [False] + [True] * (phase == "LOAD")
    await worker.stop()


async def test_what_fits_alone_is_staged_beside_the_other(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """When it is loaded the other one has gone; what does not fit even then is refused before."""
    script, controller_address = controller
    loader = FakeLoader(dataclasses.replace(FACTS, weights_bytes=1_500_000))
    compute = Compute((("cpu", "test", 2_500_000),), loader)
    worker = Worker(config_for(tmp_path, controller_address), lambda _: compute)
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    loader.least_bytes = 2_000_000
    await script.stage(model_pb2.Manifest(model="m", revision="r2"))
    assert (await script.hear("staged")).revision == "r2"
    loader.least_bytes = 3_000_000
    await script.stage(model_pb2.Manifest(model="m", revision="r3"))
    assert "memory" in (await script.hear("failed")).reason
    await worker.stop()


async def test_drain_ends_running_jobs_and_takes_no_new_ones(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """On SIGTERM health falls, the controller hears of no slots, and a running job is completed."""
    script, controller_address = controller
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), FakeLoader()))
    address = await worker.address()
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await script.activate(9)
    async with connect(address) as channel:
        call: Any = worker_service_pb2_grpc.WorkerServiceStub(channel).Session(metadata=mesh_metadata(TOKEN))
        job = worker_service_pb2.StartJob(
            job="a",
            attempt=1,
            model="m",
            revision="r1",
            epoch=9,
            prompt_ids=PROMPT,
            max_tokens=5,
            n=1,
            credit_tokens=2,
        )
        await call.write(worker_service_pb2.SessionRequest(start=job))
        found: list[int] = []
        while len(found) < 2:
            response = await call.read()
            found += [token for one in response.step.outputs for token in one.token_ids]
        worker.begin_drain()
        async with asyncio.timeout(10):
            while (await script.hear("load")).slots != 0:
                pass
        assert await health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING
        credit = worker_service_pb2.AddCredit(job="a", tokens=10)
        await call.write(worker_service_pb2.SessionRequest(credit=credit))
        async with asyncio.timeout(10):
            while (response := await call.read()) is not grpc.aio.EOF:
                found += [token for one in response.step.outputs for token in one.token_ids]
        assert found == continuation(PROMPT, 5)
    await worker.stop()


@pytest.mark.parametrize("local", [True, False], ids=["in-place", "downloaded"])
async def test_a_real_tiny_model_is_fetched_loaded_and_served(
    controller: tuple[ScriptedController, str], tmp_path: Path, *, local: bool
) -> None:
    """From manifest to tokens with torch, the files used in place or downloaded and checked."""
    script, controller_address = controller
    files = tmp_path / "model"
    tiny_models.save("llama", files)
    script.files = files
    worker = Worker(config_for(tmp_path, controller_address), torch_compute)
    address = await worker.address()
    await script.prepare(manifest_of(files, local=local))
    assert (await script.hear("ready")).weights_bytes > 0
    await script.activate(9)
    assert len(await generate(address, (5, 6, 7), 5)) <= 5
    assert (tmp_path / "cache" / "revisions").exists() is not local
    assert [*(tmp_path / "cache" / "forms").iterdir()]
    await worker.stop()


async def test_a_hung_step_ends_the_process_with_its_code(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """A step that does not end turns health off and ends the process with 70, for its supervisor."""
    script, controller_address = controller
    loader = FakeLoader()
    config = config_for(tmp_path, controller_address, watchdog_s=0.3)
    worker = Worker(config, lambda _: Compute((), loader))
    address = await worker.address()
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await script.activate(9)
    gate = loader.runners[0].gate = threading.Event()
    generating = asyncio.create_task(generate(address, PROMPT, 3))
    async with asyncio.timeout(10):
        while not worker.died:  # noqa: ASYNC110 - what would tell is the end of the process
            await asyncio.sleep(0.02)
    assert worker.died == [70]
    assert await health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING
    gate.set()
    await generating
    await worker.stop()


async def test_a_real_process_ends_with_zero_on_sigterm(tmp_path: Path) -> None:
    """`python -m services.worker` announces itself, and ends cleanly though no controller was ever there."""
    announced = tmp_path / "announce.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        env=environment
        | {
            "INTERLOCK_MESH_TOKEN": TOKEN,
            "INTERLOCK_WORKER_BIND": "127.0.0.1:0",
            "INTERLOCK_WORKER_ANNOUNCE_FILE": str(announced),
            "INTERLOCK_WORKER_CONTROLLERS": '["127.0.0.1:1"]',
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(40):
            while not announced.exists():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    events = [json.loads(line)["event"] for line in errors.decode().splitlines()]
    assert events[0] == "process.started"
    assert events[-1] == "process.stopped"


async def test_a_load_tells_its_stages_and_bytes(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """Progress moves while weights are loaded, and Ready has the time of each stage beside the phases."""
    script, controller_address = controller
    loader = FakeLoader()
    loader.told = [(LoadStage.QUANTIZE, 0, 30), (LoadStage.QUANTIZE, 20, 30), (LoadStage.MAP, 5, 5)]
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    progress = await script.hear("progress")
    while (progress.phase, progress.done_bytes) != (worker_pb2.REVISION_PHASE_LOAD, 5):
        progress = await script.hear("progress")
    ready = await script.hear("ready")
    assert set(ready.phases) == {"fetch", "verify", "load", "warm", "quantize", "map"}
    stages = [ready.phases[name].ToNanoseconds() for name in ("quantize", "map")]
    assert sum(stages) <= ready.phases["load"].ToNanoseconds()
    await worker.stop()


@pytest.mark.parametrize("listens", [True, False], ids=["halts", "is abandoned"])
async def test_a_load_does_not_hold_up_the_end(
    controller: tuple[ScriptedController, str], tmp_path: Path, *, listens: bool
) -> None:
    """A load ends where it next tells how far it is; the process ends without one that does not."""
    script, controller_address = controller
    loader = FakeLoader()
    loader.gate = threading.Event()
    loader.told = [(LoadStage.QUANTIZE, done, 1_000) for done in range(1_000)]
    # Ten seconds in all: it is told to halt long before its end.
    loader.told_every_s = 0.01
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    assert await asyncio.to_thread(loader.entered.wait, 10)
    stopping = asyncio.create_task(worker.stop())
    if listens:
        await asyncio.sleep(0)
        loader.gate.set()
    await stopping
    assert worker.died == ([] if listens else [0])
    assert not loader.runners
    loader.gate.set()


async def test_a_retired_revision_is_closed_and_forgotten(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """Retire frees the revision and says so; health falls with the last active one; it may come again."""
    script, controller_address = controller
    loader = FakeLoader()
    worker = Worker(config_for(tmp_path, controller_address), lambda _: Compute((), loader))
    address = await worker.address()
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    await script.hear("ready")
    await script.activate(9)
    retire = controller_service_pb2.Retire(model="m", revision="r1")
    await script.commands.put(controller_service_pb2.AttachResponse(retire=retire))
    assert (await script.hear("retired")).revision == "r1"
    assert loader.runners[0].closed
    assert await health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING
    await script.prepare(model_pb2.Manifest(model="m", revision="r1"))
    assert (await script.hear("ready")).revision == "r1"
    await worker.stop()


async def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """A second worker on one port ends with PortTaken, which names the port."""
    first = Worker(config_for(tmp_path), lambda _: Compute((), FakeLoader()))
    address = await first.address()

    async def forever(_: Callable[[], Awaitable[None]]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(server.PortTaken, match=address.rpartition(":")[2]):
        await run(
            config_for(tmp_path, bind=address),
            make_compute=lambda _: Compute((), FakeLoader()),
            until_stopped=forever,
        )
    await first.stop()


async def test_a_real_worker_holds_answers_to_a_schema(
    controller: tuple[ScriptedController, str], tmp_path: Path
) -> None:
    """A tiny model of noise answers in JSON with a logprob a token, and goes on where another one stopped."""
    script, controller_address = controller
    files = tmp_path / "model"
    tiny_models.save("llama", files, speaks=True)
    worker = Worker(config_for(tmp_path, controller_address), torch_compute)
    address = await worker.address()
    await script.prepare(manifest_of(files, local=True))
    await script.hear("ready")
    await script.activate(9)
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    order = {
        "format": generation_pb2.OutputFormat(
            json_schema=json.dumps(schema | {"additionalProperties": False})
        ),
        "sampling": generation_pb2.SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.1),
        "logprobs": 3,
    }
    outputs = await outputs_of(address, PROMPT, 200, **order)
    assert outputs[-1].finish == generation_pb2.FINISH_REASON_STOP
    said = [token for output in outputs for token in output.token_ids]
    text = Tokenizer.from_file(str(files / "tokenizer.json")).decode(said)
    assert json.loads(text) in [{"colour": "red"}, {"colour": "green"}]
    scores = [score for output in outputs for score in output.logprobs]
    assert len(scores) == len(said)
    assert all(len(score.alternatives) == 3 and score.logprob <= 0 for score in scores)
    emitted = [worker_service_pb2.EmittedTokens(sequence=0, token_ids=said[:5])]
    assert await generate(address, PROMPT, 200, emitted=emitted, **order) == said[5:]
    await worker.stop()
