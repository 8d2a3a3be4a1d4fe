"""The gateway's process, as `python -m services.gateway` composes it, between a controller and a worker."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2, gateway_service_pb2_grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1.worker_service_pb2 import REFUSAL_REASON_INVALID
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from tokenizers import Tokenizer

from services.common.system_clock import SystemClock
from services.gateway import __main__ as gateway_main
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.config import GatewayConfig
from services.gateway.core.queue_line import QueueWorker
from tests.fakes.gateway_logs import FakeLogs
from tests.fakes.scripted_controller import ScriptedController, manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN, Script, ScriptedWorker, scripted_worker
from tests.fixtures.gateway_world import SECRET, bearer, joined, reason_of
from tests.fixtures.plain_http2 import DATA, GOAWAY, connected
from tests.fixtures.tiny_tokenizer import BEGIN, END, write_tokenizer

MODEL, REVISION = "tiny", "r1"
NOTICE_S = 0.1
# What a watch of a server's health says.
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse(status=status).SerializeToString()
    for status in (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)
)


@dataclass
class Process:
    """A gateway's process inside this one."""

    controller: ScriptedController
    worker: ScriptedWorker
    channel: grpc.aio.Channel
    address: str
    task: asyncio.Task[None]
    terminate: asyncio.Event
    directory: Path
    metrics: str

    def generate(self, **fields: Any) -> Any:
        """Begins a call."""
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(self.channel)
        return stub.Generate(pb.GenerateRequest(**fields), metadata=bearer())

    async def watch_health(self, status: int) -> None:
        """Returns when the server's health is `status`."""
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(10):
            async for response in watch:
                if response.status == status:
                    watch.cancel()
                    return


def script(directory: Path, text: str, **fields: Any) -> Script:
    """A worker that answers `text` in the ids of the tokenizer in `directory`."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Script(answer="".join(map(chr, tokenizer.encode(text).ids)), **fields)


def wait_for(terminate: asyncio.Event) -> Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]:
    """Stands in for SIGTERM."""

    async def wait(drain: Callable[[], Awaitable[None]]) -> None:
        await terminate.wait()
        await drain()

    return wait


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    """A gateway that was taken in and serves a tiny model; its files are downloaded."""
    directory = write_tokenizer(tmp_path / "model")
    manifest = manifest_of(directory, model=MODEL, revision=REVISION, local_path=str(tmp_path / "elsewhere"))
    announce, terminate = tmp_path / "announce.json", asyncio.Event()
    logs = FakeLogs()
    queue = MemoryJobQueue(SystemClock(), write_tail=logs.write_tail)
    queue.set_route(MODEL, 1, {REVISION: 1})
    async with AsyncExitStack() as exits:
        controller, address = await exits.enter_async_context(scripted_controller(manifest, directory))
        worker = await exits.enter_async_context(scripted_worker("w1", script(directory, "hello")))
        queue.set_worker(MODEL, QueueWorker("w1", worker.address, 2, frozenset({REVISION})))
        settings = GatewayConfig(
            bind="127.0.0.1:0",
            announce_file=announce,
            # The first one is nobody: the list is walked.
            controllers=("127.0.0.1:1", address),
            cache_dir=tmp_path / "cache",
            mesh_token=SecretStr(MESH_TOKEN),
            jwt_secret=SecretStr(SECRET),
            drain_grace_s=5.0,
            drain_notice_s=NOTICE_S,
            metrics_bind="127.0.0.1:0",
        )
        task = asyncio.create_task(
            gateway_main.run(settings, queue=queue, logs_of=(logs, logs), wait=wait_for(terminate))
        )
        await controller.wait_heard("activated")
        told = json.loads(announce.read_text())
        assert told["id"] == settings.id
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(told["address"]))
        yield Process(
            controller, worker, channel, told["address"], task, terminate, directory, told["metrics"]
        )
        terminate.set()
        await task


async def test_it_attaches_downloads_the_tokenizer_and_answers(process: Process) -> None:
    """Hello, Ready, Activated; then text goes in and out through the downloaded tokenizer."""
    hello = (await process.controller.wait_heard("hello")).hello
    assert hello.kind == controller_service_pb2.MEMBER_KIND_GATEWAY
    assert set(process.controller.downloads) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    events = [event async for event in process.generate(text="hello<|end|>")]
    assert joined(events) == "hello"
    (order,) = process.worker.starts
    assert (list(order.prompt_ids).count(BEGIN), list(order.prompt_ids).count(END)) == (2, 1)


async def test_whoever_has_no_token_is_not_read(process: Process) -> None:
    """Bytes that are no message are told so to those alone who may send one."""
    for metadata, reason in (((), "TOKEN_MISSING"), (bearer(), "ARGUMENT_INVALID")):
        call: Any = process.channel.unary_stream("/interlock.v1.GatewayService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            _ = [event async for event in call(b"\xff", metadata=metadata)]
        assert reason_of(refused.value) == reason


async def test_its_numbers_can_be_scraped(process: Process) -> None:
    """After a request: its end, its attempt, its first token, who is live, and the breaker of each target."""
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    assert joined([event async for event in process.generate(text="hi")]) == "hello"
    page = await asyncio.to_thread(scrape, process.metrics)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    # The counters are the process's, which other tests share.
    assert samples["interlock_gateway_requests_total", "finished", MODEL] >= 1
    assert samples["interlock_gateway_attempts_total", "finished"] >= 1
    assert samples["interlock_gateway_ttft_seconds_count", MODEL] >= 1
    assert samples["interlock_gateway_tokens_total", "completion", MODEL] >= 1
    assert samples["interlock_gateway_prompts_waiting",] == 0
    assert samples["interlock_gateway_store_up",] == 1
    assert samples["interlock_gateway_breaker", "closed", "w1"] == 1
    assert samples["interlock_gateway_breaker", "open", "w1"] == 0


async def test_it_reports_what_becomes_of_the_workers_work(process: Process) -> None:
    """An answer and its first token; then what the worker gave up, and nothing for what it refused."""
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    assert joined([event async for event in process.generate(text="hi")]) == "hello"
    counted = await process.controller.wait_counted(finished=1, failed=0)
    assert (counted.model, counted.revision, sum(counted.ttft_counts)) == (MODEL, REVISION, 1)
    process.worker.script = script(process.directory, "hello", failing=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in process.generate(text="hi")]
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    await process.controller.wait_counted(finished=1, failed=2)
    process.worker.script = script(process.directory, "", refusals=[REFUSAL_REASON_INVALID])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in process.generate(text="hi")]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    process.worker.script = script(process.directory, "hello")
    assert joined([event async for event in process.generate(text="hi")]) == "hello"
    counted = await process.controller.wait_counted(finished=2, failed=2)
    assert sum(counted.ttft_counts) == 2


def scrape(address: str) -> str:
    """The page that Prometheus reads."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


async def test_it_serves_on_while_the_controller_is_away_and_comes_back_with_what_it_holds(
    process: Process,
) -> None:
    """The stream ends; requests are still answered, and the next hello names the revision and its epoch."""
    await process.controller.commands.put(None)
    events = [event async for event in process.generate(text="hi")]
    assert joined(events) == "hello"
    hello = (await process.controller.wait_heard("hello", 2)).hello
    assert [(held.model, held.revision) for held in hello.revisions] == [(MODEL, REVISION)]
    assert (hello.epoch, hello.fence) == (1, 3)


async def test_a_controller_that_falls_silent_is_left(process: Process) -> None:
    """Its connection stays open, but its lease is not renewed: the list is walked until one leads."""
    lease = controller_service_pb2.AttachResponse(
        lease=controller_service_pb2.Lease(fence=3, ttl=Duration(seconds=1))
    )
    await process.controller.commands.put(lease)
    again = (await process.controller.wait_heard("hello", 2)).hello
    assert again.fence == 3
    await process.controller.wait_heard("activated", 2)


async def test_sigterm_ends_what_runs_and_then_the_process(process: Process) -> None:
    """NOT_SERVING, new calls refused, the running stream whole, and `run` returns."""
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    process.worker.script = script(process.directory, "é" * 20, interval_s=0.01)
    running = process.generate(text="hi", max_tokens=40)
    events = [await running.read()]
    process.terminate.set()
    await process.watch_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    await asyncio.sleep(0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await process.generate(text="hi").read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    while (event := await running.read()) is not grpc.aio.EOF:
        events.append(event)
    assert joined(events) == "é" * 20
    async with asyncio.timeout(10):
        await process.task


async def test_sigterm_cuts_nobody_who_still_reads_an_answer_that_has_ended(process: Process) -> None:
    """Its body does not fit into what is on its way, and its client takes its time: that is of the grace."""
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    process.worker.script = script(process.directory, "é" * 200, batch=8)
    asked = {"text": "hi", "max_tokens": 400, "logprobs": 20}
    narrow = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(process.address, options=narrow) as channel:
        call = http_service_pb2_grpc.GatewayHttpServiceStub(channel).Generate(
            HttpBody(content_type="application/json", data=json.dumps(asked).encode()), metadata=bearer()
        )
        # They come with the body of an answer that is whole.
        await call.initial_metadata()
        process.terminate.set()
        await asyncio.sleep(NOTICE_S + gateway_main.STOP_GRACE_S + 0.5)
        assert not process.task.done()
        answer = json.loads(b"".join([part.data async for part in call]))
    assert (answer["result"], len(answer["logprobs"])) == ("é" * 200, 400)
    async with asyncio.timeout(10):
        await process.task


async def test_sigterm_is_told_to_probes_before_connections_are_to_end(process: Process) -> None:
    """NOT_SERVING at once; GOAWAY when probes have had the time to see it: no proxy learns it from that."""
    await process.watch_health(health_pb2.HealthCheckResponse.SERVING)
    async with asyncio.timeout(10), connected(process.address) as connection:
        connection.call("/grpc.health.v1.Health/Watch", b"", authority=process.address)
        assert (await connection.next(DATA, GOAWAY)).body[5:] == SERVING
        began_s = time.monotonic()
        process.terminate.set()
        told = await connection.next(DATA, GOAWAY)
        assert (told.kind, told.body[5:]) == (DATA, NOT_SERVING)
        assert (await connection.next(DATA, GOAWAY)).kind == GOAWAY
        assert time.monotonic() - began_s >= NOTICE_S


async def test_a_tokenizer_with_the_wrong_digest_fails_the_preparation(process: Process) -> None:
    """The controller is told why; what serves goes on serving."""
    manifest = manifest_of(process.directory, model=MODEL, revision="r2")
    for file in manifest.files:
        file.sha256 = "0" * 64
    prepare = controller_service_pb2.Prepare(manifest=manifest)
    await process.controller.commands.put(controller_service_pb2.AttachResponse(prepare=prepare))
    failed = (await process.controller.wait_heard("failed")).failed
    assert (failed.revision, failed.reason != "") == ("r2", True)
    assert joined([event async for event in process.generate(text="hi")]) == "hello"
