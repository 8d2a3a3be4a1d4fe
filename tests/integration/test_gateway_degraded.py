"""Redis dies, sleeps, fills up or may only be read: streams go on, new work is served, and all heals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from pydantic import SecretStr

from services.common.queue_keys import BREAKER_HOLDS, ModelKeys, breakers_of
from services.common.redis_client import connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from services.gateway import __main__ as gateway_main
from services.gateway.config import GatewayConfig
from tests.fakes.scripted_controller import manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN, ScriptedWorker, scripted_worker
from tests.fixtures.gateway_world import SECRET, bearer, fail, joined, reason_of
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.integration.test_gateway_process import MODEL, REVISION, script, wait_for

WORD = "é"
# Health is asked every few milliseconds; a loop that blocks answers late. One answer in a hundred may be late
# on a machine that others use; a call that blocked the loop would take a second and more.
HEALTH_USUAL_S = 0.1
HEALTH_LIMIT_S = 0.6
HEAL_LIMIT_S = 10.0
# A call to a store that does not answer takes a second or two.
NAMED_LIMIT_S = 0.7
# Tokens of the streams that are begun before Redis fails, and meanwhile.
BEFORE, ACROSS = 300, 400


@dataclass
class World:
    """A gateway's process over a real Redis, with one scripted worker."""

    redis: RedisServer
    worker: ScriptedWorker
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        """A client of the gateway."""
        return gateway_service_pb2_grpc.GatewayServiceStub(self.channel)

    def generate(self, tokens: int = 60, **fields: Any) -> Any:
        """Begins a call that takes `tokens` / 100 seconds."""
        request = pb.GenerateRequest(text="hi", max_tokens=tokens, **fields)
        return self.stub.Generate(request, metadata=bearer())

    async def ask(self, tokens: int = 4, **fields: Any) -> list[pb.GenerateResponse]:
        """All events of a short call."""
        return [event async for event in self.generate(tokens, **fields)]

    async def follow(self, request_id: str) -> list[Any]:
        """What the log of a resumable request holds."""
        request = pb.ResumeGenerationRequest(request_id=request_id)
        return [event async for event in self.stub.ResumeGeneration(request, metadata=bearer())]

    async def refused_resumption(self) -> str:
        """Why a request by the id `r` cannot be resumed."""
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(self.channel)
        asked = pb.ResumeGenerationRequest(request_id="r", cursor=1)
        error, _ = await fail(stub.ResumeGeneration(asked, metadata=bearer()))
        return reason_of(error)

    async def write_records(self) -> None:
        """Writes route and worker as a controller does each second."""
        store = connect(self.redis.url)
        routes = RedisRouteStore(store)
        epoch = time.time_ns() // 1_000_000
        record = WorkerRecord(
            "w1", self.worker.address, "i1", 8, draining=False, ready=frozenset({REVISION}), lease_ttl_s=600.0
        )
        await routes.write_worker(MODEL, record, 1)
        await routes.write_route(MODEL, epoch, 1, {REVISION: 1})
        await store.close()

    async def until_normal(self) -> float:
        """Asks until an answer is not degraded; returns how long that took."""
        began_s = time.monotonic()
        async with asyncio.timeout(HEAL_LIMIT_S):
            while degraded(await self.ask()):  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(0.1)
        return time.monotonic() - began_s

    async def watch_health(self, delays: list[float]) -> None:
        """Notes how long each look at the health takes, until it is cancelled."""
        health: Any = health_pb2_grpc.HealthStub(self.channel)
        while True:
            asked_s = time.monotonic()
            reply = await health.Check(health_pb2.HealthCheckRequest())
            delays.append(time.monotonic() - asked_s)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            await asyncio.sleep(0.02)


class Stream:
    """A call that is read as it comes.

    Attributes:
        events: What has come.
    """

    def __init__(self, call: Any) -> None:
        self.events: list[Any] = []
        self._read = asyncio.create_task(self._read_all(call))

    @property
    def tokens(self) -> int:
        """How many have come."""
        return sum(len(event.chunk.token_ids) for event in self.events)

    async def until(self, tokens: int) -> None:
        """Returns once so many tokens have come."""
        async with asyncio.timeout(10):
            while self.tokens < tokens:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)

    async def whole(self) -> list[Any]:
        """All of it but places in the queue, once it has ended well."""
        await self._read
        assert self.events[-1].HasField("finished")
        return [event for event in self.events if not event.HasField("queued")]

    async def _read_all(self, call: Any) -> None:
        while (event := await call.read()) is not grpc.aio.EOF:
            self.events.append(event)


async def until_serving(channel: grpc.aio.Channel) -> None:
    """Returns once health says SERVING."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(10):
        async for reply in watch:
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                break
    watch.cancel()


def degraded(events: list[pb.GenerateResponse]) -> bool:
    """Whether the slot was lent without Redis."""
    return next(event.started.degraded for event in events if event.HasField("started"))


@pytest.fixture
async def world(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[World]:
    """A gateway that has answered once, and has looked at Redis since."""
    directory = write_tokenizer(tmp_path / "model")
    manifest = manifest_of(directory, model=MODEL, revision=REVISION, local_path=str(directory))
    announce, terminate = tmp_path / "announce.json", asyncio.Event()
    async with AsyncExitStack() as exits:
        controller, address = await exits.enter_async_context(scripted_controller(manifest, directory))
        answer = script(directory, WORD * 400, interval_s=0.01)
        worker = await exits.enter_async_context(scripted_worker("w1", answer))
        settings = GatewayConfig(
            bind="127.0.0.1:0",
            announce_file=announce,
            controllers=(address,),
            redis_url=SecretStr(redis_server.url),
            cache_dir=tmp_path / "cache",
            mesh_token=SecretStr(MESH_TOKEN),
            jwt_secret=SecretStr(SECRET),
            drain_grace_s=1.0,
        )
        task = asyncio.create_task(gateway_main.run(settings, wait=wait_for(terminate)))
        await controller.wait_heard("activated")
        told = json.loads(announce.read_text())
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(told["address"]))
        found = World(redis_server, worker, channel)
        await found.write_records()
        assert not degraded(await found.ask())
        await until_serving(channel)
        with redis_server.client() as client:
            async with asyncio.timeout(10):
                # The look that shows the breakers has seen the worker just before.
                while "w1" not in client.hgetall(breakers_of(settings.id)):  # noqa: ASYNC110 - Redis tells nobody
                    await asyncio.sleep(0.05)
        yield found
        terminate.set()
        await task


def kill(world: World) -> None:
    """SIGKILL."""
    world.redis.stop()


def sleep(world: World) -> None:
    """SIGSTOP."""
    os.kill(world.redis.pid, signal.SIGSTOP)


def only_read(world: World) -> None:
    """It believes to be somebody's replica."""
    with world.redis.client() as client:
        client.replicaof("127.0.0.1", 1)


def fill(world: World) -> None:
    """It has no memory for another write."""
    with world.redis.client() as client:
        client.config_set("maxmemory", 1)


async def restart(world: World) -> None:
    """It begins again, empty; the controller writes its records."""
    world.redis.start()
    await world.write_records()


async def wake(world: World) -> None:
    """SIGCONT, after five seconds of sleep in all."""
    os.kill(world.redis.pid, signal.SIGCONT)


async def write_again(world: World) -> None:
    """It is nobody's replica."""
    with world.redis.client() as client:
        client.replicaof("NO", "ONE")


async def make_room(world: World) -> None:
    """Its memory has no bound."""
    with world.redis.client() as client:
        client.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    ("harm", "heal", "lasts_s", "tokens"),
    [
        pytest.param(kill, restart, 1.5, 60, id="killed"),
        # All of it, which is more than the worker's credit.
        pytest.param(sleep, wake, 5.0, BEFORE, id="stopped-for-5-s"),
        pytest.param(only_read, write_again, 1.5, 60, id="read-only"),
        pytest.param(fill, make_room, 1.5, 60, id="out-of-memory"),
    ],
)
async def test_redis_fails_and_nobody_is_turned_away(
    world: World, harm: Any, heal: Any, lasts_s: float, tokens: int
) -> None:
    """Streams go on, resumable or not, new ones are degraded, health answers, and soon all is as it was."""
    delays: list[float] = []
    before = [Stream(world.generate(BEFORE, resumable=kept)) for kept in (False, True)]
    for stream in before:
        await stream.until(1)
    watching = asyncio.create_task(world.watch_health(delays))
    harm(world)
    harmed_s = time.monotonic()
    during = await world.ask()
    assert degraded(during)
    assert joined(during) == WORD * 2
    assert sorted([await named_s(world, number) for number in range(3)])[1] < NAMED_LIMIT_S
    across = [Stream(world.generate(ACROSS, resumable=kept)) for kept in (False, True)]
    for stream in across:
        await stream.until(1)
    for stream in before:
        await stream.until(tokens)
    await asyncio.sleep(max(0.0, lasts_s - (time.monotonic() - harmed_s)))
    await heal(world)
    assert await world.until_normal() < HEAL_LIMIT_S
    for stream in before:
        assert joined(await stream.whole()) == WORD * (BEFORE // 2)
    for stream in across:
        assert joined(await stream.whole()) == WORD * (ACROSS // 2)
    if harm is not kill:
        told = await before[1].whole()
        again = await world.follow(told[0].started.request_id)
        assert [(event.cursor, event.chunk) for event in again] == [
            (event.cursor, event.chunk) for event in told
        ]
    # An assertion in it would show here.
    assert not watching.done()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert len(delays) > 20
    assert sorted(delays)[len(delays) * 9 // 10] < HEALTH_USUAL_S
    assert sorted(delays)[len(delays) * 99 // 100] < HEALTH_LIMIT_S
    with world.redis.client() as client:
        async with asyncio.timeout(HEAL_LIMIT_S):
            while client.hlen(ModelKeys(MODEL).running("w1")):  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.05)


async def named_s(world: World, number: int) -> float:
    """How long a short call takes whose id the caller chose."""
    asked_s = time.monotonic()
    assert degraded(await world.ask(request_id=f"named-{number}"))
    return time.monotonic() - asked_s


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_an_emptied_redis_lends_nothing_before_the_controller_has_written(
    world: World, *, noticed: bool
) -> None:
    """A restarted Redis knows no worker: until it does, the gateway lends the slots that it knows of.

    And no request is unknown: another gateway may tell of it again by then, and for a while longer.
    """
    assert await world.refused_resumption() == "REQUEST_UNKNOWN"
    world.redis.stop()
    if noticed:
        assert degraded(await world.ask())
    world.redis.start()
    assert await world.refused_resumption() == "STORE_UNAVAILABLE"
    # Longer than the breaker around the store sleeps, so that the way back is looked for.
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(world.ask() for _ in range(4)))
        assert all(map(degraded, answers))
    await world.write_records()
    assert await world.until_normal() < HEAL_LIMIT_S
    assert await world.refused_resumption() == "STORE_UNAVAILABLE"


async def test_an_operator_holds_a_worker_and_the_store(world: World) -> None:
    """A hold is obeyed within a second or two, shown to the fleet, and ends when it is deleted."""
    with world.redis.client() as client:
        client.hset(BREAKER_HOLDS, mapping={"w1": "forced_open", "store": "forced_open"})
        await until_shown(client, "w1", "forced_open")
        assert shown(client, "store") == "forced_open"
        starts = len(world.worker.starts)
        error, events = await fail(world.generate(4))
        assert (error.code(), reason_of(error), events) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", [])
        assert len(world.worker.starts) == starts
        client.delete(BREAKER_HOLDS)
        await until_shown(client, "w1", "closed")
        async with asyncio.timeout(HEAL_LIMIT_S):
            # Until the store is back and has heard of it, requests are turned away.
            while client.exists(ModelKeys(MODEL).prefix + "open:w1"):  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.05)
    await world.until_normal()


async def until_shown(client: Any, target: str, state: str) -> None:
    """Returns once the fleet sees a breaker in a state."""
    async with asyncio.timeout(5):
        while shown(client, target) != state:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.05)


def shown(client: Any, target: str) -> str:
    """The state of a breaker as the fleet sees it."""
    text = client.hget(breakers_of("gateway-1"), target)
    return str(json.loads(text)["state"]) if text else ""
