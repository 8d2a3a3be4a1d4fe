"""Clients that never read, on connections as they come: what a worker does for them, and for how long."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from interlock.v1 import gateway_service_pb2 as pb

from services.gateway.dispatcher.limits import GenerationLimits
from tests.fakes.gateway_ports import FakeTokenizer
from tests.fakes.scripted_worker import Script, ScriptedWorker
from tests.fixtures.gateway_edge import envoy_before, request_bytes
from tests.fixtures.gateway_world import GatewayWorld, bearer, joined, open_gateway

KIB = 1024
# Another stream begins and ends meanwhile, on a busy machine as well.
STALL_S = 4.0
CREDIT_TOKENS = GenerationLimits().credit_tokens
PROMPT_TOKENS = len("user:hi\n")
# The window of a stream that gRPC's own client lets a fast connection have.
GRPC_WINDOW_BYTES = 4 << 20
# Envoy's window towards the gateway and its buffer towards the client; each may take one write too many.
ENVOY_BYTES = 4 * (64 << 10)
# The most that Linux keeps of what a socket was given and its peer has not taken.
SEND_BYTES = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
# What the client's side of a socket takes; Linux doubles what is asked for.
RECEIVE_BYTES = 16 << 10
# More than anybody holds.
ANSWER_TOKENS = 2 * max(GRPC_WINDOW_BYTES, SEND_BYTES) // KIB
OTHER_TOKENS = CREDIT_TOKENS + 44


@asynccontextmanager
async def open_talkative() -> AsyncIterator[tuple[GatewayWorld, ScriptedWorker]]:
    """A gateway with the window that it has by itself, and a worker of two slots whose tokens are 1 KiB."""
    async with open_gateway(
        generation=GenerationLimits(client_stall_s=STALL_S),
        tokenizer=FakeTokenizer(letters=KIB),
        context=2 * ANSWER_TOKENS,
    ) as gateway:
        worker = await gateway.add_worker("w1", Script(answer="x" * ANSWER_TOKENS), slots=2)
        yield gateway, worker


async def until_paused(worker: ScriptedWorker, job: str) -> None:
    """Returns once a job has had no credit for a while."""
    async with asyncio.timeout(20):
        looks, sent = 0, 0
        while looks < 6:
            assert job in worker.running, "nobody held it back"
            looks = looks + 1 if worker.sent[job] == sent and not worker.running[job].credit[0] else 0
            sent = worker.sent[job]
            await asyncio.sleep(0.05)


async def until_cancelled(worker: ScriptedWorker, job: str) -> float:
    """Returns once a job was cancelled; how long after its last token that was."""
    sent, moved_s = 0, time.monotonic()
    async with asyncio.timeout(20):
        while not worker.cancelled:
            if worker.sent[job] != sent:
                sent, moved_s = worker.sent[job], time.monotonic()
            await asyncio.sleep(0.01)
    return time.monotonic() - moved_s


async def check_held_back(gateway: GatewayWorld, worker: ScriptedWorker, on_its_way_bytes: int) -> None:
    """What holds of the one client, which reads nothing and whose connection keeps so much."""
    await worker.wait_until(lambda: worker.sent)
    (job,) = worker.sent
    await until_paused(worker, job)
    # Another stream at the same worker, longer than its credit, has nothing to do with that.
    worker.script.batch = 20
    request = pb.GenerateRequest(text="hi", max_tokens=OTHER_TOKENS)
    other = [event async for event in gateway.call(request, metadata=bearer(subject="bob"))]
    assert len(joined(other)) == OTHER_TOKENS * KIB
    assert worker.cancelled == []
    assert await until_cancelled(worker, job) < STALL_S + 2
    assert worker.cancelled == [job]
    sent = worker.sent[job]
    assert CREDIT_TOKENS <= sent <= CREDIT_TOKENS + on_its_way_bytes // KIB
    await gateway.wait_idle()
    usage = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer())
    assert (usage.running, usage.reserved_tokens) == (0, 0)
    assert 0 <= PROMPT_TOKENS + sent - usage.used_tokens <= worker.script.batch
    # Both slots are there for others.
    worker.script.opening = asyncio.Event()
    calls = [gateway.generate(pb.GenerateRequest(text="hi", max_tokens=8)) for _ in range(2)]
    answers = asyncio.gather(*calls)
    await worker.wait_until(lambda: len(worker.running) == 2)
    worker.script.opening.set()
    assert [len(joined(events)) for events in await answers] == [8 * KIB] * 2


async def test_a_call_that_is_never_read_pauses_its_worker_and_is_given_up() -> None:
    """By gRPC: the worker stops when its credit and gRPC's window are spent, and is told to end it."""
    async with open_talkative() as (gateway, worker):
        call = gateway.call(pb.GenerateRequest(text="hi", max_tokens=ANSWER_TOKENS))
        await check_held_back(gateway, worker, GRPC_WINDOW_BYTES)
        call.cancel()


async def test_a_socket_that_is_never_read_pauses_its_worker_and_is_given_up(tmp_path: Path) -> None:
    """By server-sent events through Envoy, whose socket and buffers hold what the client does not."""
    async with open_talkative() as (gateway, worker), envoy_before(tmp_path, gateway.address) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            client.connect((host, int(port)))
            client.sendall(request_bytes(text="hi", max_tokens=ANSWER_TOKENS, stream=True))
            await check_held_back(gateway, worker, SEND_BYTES + 2 * RECEIVE_BYTES + ENVOY_BYTES)
