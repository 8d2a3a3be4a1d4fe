"""Resumable streams over two gateways and a real Redis: gateways die and sleep, clients come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc
import pytest
import redis
from interlock import resume
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc

from services.common.errors import StoreUnavailable
from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore
from services.common.redis_client import Script as LuaScript
from services.gateway.adapters.queue_scripts import read_operation
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, bearer, fail, joined, reason_of
from tests.fixtures.redis_server import RedisServer, advance_clock
from tests.fixtures.resumption_world import LIMITS, Peer, ResumptionWorld, open_resumption_world

KEYS = ModelKeys(MODEL)
TEXT = "Streams survive the death of a gateway, and nobody hears a word twice. " * 2


@pytest.fixture
async def world(redis_process: RedisServer, redis_store: RedisStore) -> AsyncIterator[ResumptionWorld]:
    """Two gateways, and a worker that takes about a second and a half for its answer."""
    async with open_resumption_world(redis_process.url, redis_store) as world:
        await world.add_worker("w1", Script(answer=TEXT, interval_s=0.01))
        await world.add_gateway("g1")
        await world.add_gateway("g2")
        yield world


def stub(peer: Peer) -> Any:
    """A client of a gateway."""
    return gateway_service_pb2_grpc.GatewayServiceStub(peer.channel)


def asked(request_id: str = "r", **fields: Any) -> pb.GenerateRequest:
    """A resumable request."""
    return pb.GenerateRequest(
        text="hi", request_id=request_id, **({"resumable": True, "max_tokens": 400} | fields)
    )


def begin(peer: Peer, request: pb.GenerateRequest | None = None) -> Any:
    """Begins a call of Generate."""
    return stub(peer).Generate(request or asked(), metadata=bearer())


async def take(call: Any, chunks: int) -> list[Any]:
    """Reads until so many chunks have come."""
    events: list[Any] = []
    while sum(event.HasField("chunk") for event in events) < chunks:
        events.append(await call.read())
    return events


async def follow(peer: Peer, cursor: int, request_id: str = "r", **options: Any) -> list[Any]:
    """What ResumeGeneration tells behind a cursor."""
    request = pb.ResumeGenerationRequest(request_id=request_id, cursor=cursor)
    options.setdefault("metadata", bearer())
    return [event async for event in stub(peer).ResumeGeneration(request, **options)]


async def test_the_clients_of_a_dead_gateway_get_the_rest_at_the_other(world: ResumptionWorld) -> None:
    """Several streams, cut at different tokens: exact text, each index and each cursor once."""
    g1, g2 = world.peers["g1"], world.peers["g2"]

    async def one(number: int) -> list[Any]:
        channels = [g1.channel, g2.channel]
        return [
            event
            async for event in resume.generate_async(
                channels, asked(f"r{number}"), metadata=bearer(), timeout_s=30
            )
        ]

    clients = [asyncio.create_task(one(number)) for number in range(6)]
    await world.workers["w1"].wait_until(lambda: len(world.workers["w1"].sent) == 6)
    await asyncio.sleep(0.3)
    await g1.die()
    for events in await asyncio.gather(*clients):
        assert joined(events) == TEXT
        assert events[-1].finished.usage.completion_tokens == len(TEXT)
        assert [event.started.attempt for event in events if event.HasField("started")] == [1, 2]


async def test_a_gateway_that_dies_between_the_last_word_and_its_record_has_finished(
    world: ResumptionWorld, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finds the whole answer: the tenant is charged for it, and the record says so."""
    g1 = world.peers["g1"]

    async def never(*_: object) -> bool:
        await asyncio.Event().wait()
        return False

    monkeypatch.setattr(g1.queue, "settle", never)
    events = [event async for event in begin(g1)]
    assert joined(events) == TEXT
    (live,) = redis_client.scan_iter(KEYS.job("*"))
    assert redis_client.hget(live, "state") == "running"
    monkeypatch.undo()
    await g1.die()
    async with asyncio.timeout(10):
        while redis_client.hget(live, "state") in {"running", "waiting"}:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.02)
    record, usage = redis_client.hgetall(live), events[-1].finished.usage
    assert record["state"] == "finished"
    assert int(record["used"]) == usage.prompt_tokens + usage.completion_tokens > len(TEXT)
    assert len(world.workers["w1"].starts) == 1
    assert joined(await follow(world.peers["g2"], 0)) == TEXT


@pytest.mark.parametrize("after_s", [0.0, 1.5], ids=["within its lease", "after it"])
async def test_a_gateway_restarted_under_its_name_takes_up_what_it_left(
    world: ResumptionWorld, redis_client: redis.Redis, after_s: float
) -> None:
    """The queue names jobs that the new process does not know; no other gateway is there to adopt them."""
    await world.peers["g2"].die()
    call = begin(world.peers["g1"])
    events = await take(call, 3)
    await world.peers["g1"].die()
    advance_clock(redis_client, MODEL, after_s)
    restarted = await world.add_gateway("g1")
    events = [event for event in events if not event.HasField("queued")]
    events += await follow(restarted, events[-1].cursor, timeout=20)
    assert joined(events) == TEXT
    starts = [event.started for event in events if event.HasField("started")]
    assert len(starts) == 2
    assert len(world.workers["w1"].starts) == 2


async def test_a_gateway_that_drains_alone_leaves_its_requests_to_its_next_process(
    world: ResumptionWorld, redis_client: redis.Redis
) -> None:
    """Its client is told to come back, and hears the rest there, or all of it by the same request again."""
    await world.peers["g2"].die()
    # Nothing is handed to one that was heard of so long ago.
    advance_clock(redis_client, MODEL, 2 * LIMITS.gateway_ttl_s)
    call = begin(world.peers["g1"])
    events = await take(call, 3)
    await world.peers["g1"].dispatcher.drain(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - it fails at any read
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
    assert reason_of(caught.value) == "DRAINING"
    await world.peers["g1"].die()
    restarted = await world.add_gateway("g1")
    events = [event for event in events if not event.HasField("queued")]
    events += await follow(restarted, events[-1].cursor, timeout=20)
    assert joined(events) == joined([event async for event in begin(restarted)]) == TEXT
    assert [event.started.attempt for event in events if event.HasField("started")] == [1, 2]


async def test_a_gateway_that_slept_cannot_speak_and_its_client_follows(world: ResumptionWorld) -> None:
    """The other one carries on; the sleeper's append is refused, and its stream ends with the same text."""
    g1 = world.peers["g1"]
    call = begin(g1)
    events = await take(call, 3)
    # The scripted worker cannot tell two sessions' jobs of one name apart; a real one can.
    await world.add_worker("w2", Script(answer=TEXT, interval_s=0.01))
    await world.add_worker("w1", Script(), draining=True)
    await g1.sleep()
    async with asyncio.timeout(10):
        while not world.peers["g2"].dispatcher.live:  # noqa: ASYNC110 - an adoption has no event
            await asyncio.sleep(0.02)
    g1.wake()
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    assert joined(events) == TEXT
    assert joined(await follow(world.peers["g2"], 0)) == TEXT


async def test_two_clients_follow_at_once_and_a_late_one_hears_all_again(world: ResumptionWorld) -> None:
    """At the gateway that runs it and at another, from the beginning, from the middle, after the end."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    call = begin(g1)
    first = await take(call, 2)
    here, there = await asyncio.gather(follow(g1, 0), follow(g2, 0))
    while (event := await call.read()) is not grpc.aio.EOF:
        first.append(event)
    late = await follow(g2, 0)
    assert joined(first) == joined(here) == joined(there) == joined(late) == TEXT
    middle = await follow(g2, late[-3].cursor)
    assert [event.cursor for event in middle] == [late[-2].cursor, late[-1].cursor]


async def test_the_same_request_again_joins_and_never_generates_twice(world: ResumptionWorld) -> None:
    """While it runs and after its end, at both gateways; another body under its id is refused."""
    call = begin(world.peers["g1"])
    await take(call, 1)
    for peer in world.peers.values():
        error, _ = await fail(begin(peer, asked(max_tokens=7)))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    joint = [[event async for event in begin(peer)] for peer in world.peers.values()]
    after = [[event async for event in begin(peer)] for peer in world.peers.values()]
    assert [joined(events) for events in joint + after] == [TEXT] * 4
    assert len(world.workers["w1"].starts) == 1
    call.cancel()


async def test_a_client_that_vanishes_does_not_end_its_request(world: ResumptionWorld) -> None:
    """It goes on by itself, without anybody's credit, and is there when the client comes back."""
    call = begin(world.peers["g1"])
    events = await take(call, 2)
    call.cancel()
    rest = await follow(world.peers["g2"], events[-1].cursor)
    assert joined(events + rest) == TEXT
    assert not world.workers["w1"].cancelled


async def test_a_request_that_the_store_took_without_a_word_is_joined_by_its_client(
    world: ResumptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call failed, and the job is in the queue: it is taken up, and its log has no end before that."""
    store, enqueue = world.peers["g1"].store, read_operation("enqueue")
    run = store.run_script

    async def run_mutely(script: LuaScript, keys: Sequence[str], args: Iterable[str | int | float]) -> Any:
        answer = await run(script, keys, args)
        if script == enqueue:
            raise StoreUnavailable("It has taken the job.")
        return answer

    monkeypatch.setattr(store, "run_script", run_mutely)
    error, _ = await fail(begin(world.peers["g1"]))
    assert reason_of(error) == "STORE_UNAVAILABLE"
    assert joined([event async for event in begin(world.peers["g1"])]) == TEXT
    assert len(world.workers["w1"].starts) == 1


async def test_a_request_that_nobody_comes_back_for_is_given_up(world: ResumptionWorld) -> None:
    """After the grace its slot is free."""
    g3 = await world.add_gateway("g3", detach_grace_s=0.2)
    call = begin(g3)
    await take(call, 1)
    call.cancel()
    await world.workers["w1"].wait_until(lambda: not world.workers["w1"].running)
    assert world.workers["w1"].cancelled


async def test_a_request_is_cancelled_from_any_gateway(world: ResumptionWorld) -> None:
    """Resumable or not, named or not: the worker stops within a moment, and the stream says why."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    for request in (asked(), asked("named", resumable=False), pb.GenerateRequest(text="x", max_tokens=400)):
        call = begin(g1, request)
        request_id = (await take(call, 1))[0].started.request_id
        cancel = pb.CancelGenerationRequest(request_id=request_id)
        answer = await stub(g2).CancelGeneration(cancel, metadata=bearer())
        assert answer.cancelled
        async with asyncio.timeout(10):
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - it fails at any read
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert reason_of(caught.value) == "CANCELLED"


async def test_a_waiting_request_is_cancelled_from_any_gateway_too(world: ResumptionWorld) -> None:
    """It has no worker yet: it leaves the queue, and its stream says why."""
    await world.add_worker("w1", world.workers["w1"].script, draining=True)
    for request in (asked(), pb.GenerateRequest(text="x", request_id="plain", max_tokens=400)):
        call = begin(world.peers["g1"], request)
        assert (await call.read()).HasField("queued")
        cancel = pb.CancelGenerationRequest(request_id=request.request_id)
        answer = await stub(world.peers["g2"]).CancelGeneration(cancel, metadata=bearer())
        assert answer.cancelled
        async with asyncio.timeout(10):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert reason_of(caught.value) == "CANCELLED"
        assert await world.peers["g2"].queue.length(MODEL) == 0


async def test_an_id_that_ended_here_is_cancelled_where_it_was_used_again(world: ResumptionWorld) -> None:
    """Any gateway may be asked, also the one that knows of an earlier request by that id alone."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    cancel = pb.CancelGenerationRequest(request_id="again")
    first = begin(g1, asked("again", resumable=False, max_tokens=1))
    assert joined([event async for event in first]) == TEXT[:1]
    assert not (await stub(g1).CancelGeneration(cancel, metadata=bearer())).cancelled
    call = begin(g2, asked("again", resumable=False))
    await take(call, 1)
    assert (await stub(g1).CancelGeneration(cancel, metadata=bearer())).cancelled
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - it fails at any read
        while await call.read() is not grpc.aio.EOF:
            pass
    assert reason_of(caught.value) == "CANCELLED"


async def test_foreign_and_unknown_ids_are_not_found(world: ResumptionWorld) -> None:
    """Another subject's request is as unknown as one that never was."""
    call = begin(world.peers["g1"])
    await take(call, 1)
    for request_id, subject in (("r", "mallory"), ("never", "alice")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await follow(world.peers["g2"], 0, request_id, metadata=bearer(subject=subject))
        assert reason_of(caught.value) == "REQUEST_UNKNOWN"
    # What no log can have is the caller's mistake, and not the store's, which could not even read it.
    for cursor in (2**31, 10**18, 2**64 - 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await follow(world.peers["g2"], cursor)
        assert reason_of(caught.value) == "ARGUMENT_INVALID"
    await stub(world.peers["g1"]).CancelGeneration(
        pb.CancelGenerationRequest(request_id="r"), metadata=bearer()
    )
    call.cancel()
    async with asyncio.timeout(10):
        await world.peers["g1"].dispatcher.wait_empty()


async def test_a_draining_gateway_hands_its_resumable_requests_to_one_that_stays(
    world: ResumptionWorld,
) -> None:
    """Its client is told that it leaves, and gets the rest there at once; another one leaves as well."""
    g1, g2 = world.peers["g1"], world.peers["g2"]
    g3 = await world.add_gateway("g3")

    async def read() -> list[Any]:
        channels = [g1.channel, g2.channel, g3.channel]
        return [event async for event in resume.generate_async(channels, asked(), metadata=bearer())]

    client = asyncio.create_task(read())
    await world.workers["w1"].wait_until(lambda: bool(world.workers["w1"].sent))
    await asyncio.sleep(0.2)
    # It has nothing to end, and so has left the line before it renews as the last one that is heard of.
    await g2.dispatcher.drain(5)
    await g2.dispatcher.renew()
    await g1.dispatcher.drain(0)
    async with asyncio.timeout(5):
        # The message that tells it may be on its way.
        while not g3.dispatcher.live:  # noqa: ASYNC110 - another process would not tell either
            await asyncio.sleep(0.01)
    assert joined(await client) == TEXT


async def test_gateways_that_hand_a_request_on_use_up_none_of_its_workers(world: ResumptionWorld) -> None:
    """A rolling update of them, and the death of a worker behind it: three attempts have been cut short."""
    await world.add_gateway("g3")
    worker = world.workers["w1"]
    worker.script.interval_s = 0.02
    await world.add_worker("w2", worker.script)

    async def read() -> list[Any]:
        channels = [peer.channel for peer in world.peers.values()]
        return [event async for event in resume.generate_async(channels, asked(), metadata=bearer())]

    def begun() -> bool:
        return sum(len(one.starts) for one in world.workers.values()) > handed

    client = asyncio.create_task(read())
    for handed in range(3):
        async with asyncio.timeout(5):
            while not begun():  # noqa: ASYNC110 - two workers may begin it
                await asyncio.sleep(0.01)
        # Its first tokens are in the log, and with them the worker that said them.
        await asyncio.sleep(0.3)
        if handed < 2:
            peer = next(peer for peer in world.peers.values() if peer.dispatcher.live)
            await peer.dispatcher.drain(0)
    worker.script.die_at = len(TEXT) - 5
    events = await client
    assert joined([event for event in events if not event.HasField("queued")]) == TEXT
    assert [event.started.attempt for event in events if event.HasField("started")] == [1, 2, 3, 4]


OTHERS = ("Short.", "Another text, which is told by another sequence of the same request. " * 2)


def texts(events: list[Any]) -> dict[int, str]:
    """The text of each sequence; indices are contiguous, cursors come once, and nothing follows an end."""
    found: dict[int, str] = {}
    positions: dict[int, int] = {}
    ended: set[int] = set()
    cursors = [event.cursor for event in events if not event.HasField("queued")]
    assert cursors == list(range(1, len(cursors) + 1))
    for event in events:
        if event.HasField("chunk"):
            chunk = event.chunk
            assert chunk.sequence not in ended
            assert chunk.index == positions.get(chunk.sequence, 0)
            positions[chunk.sequence] = chunk.index + len(chunk.token_ids)
            found[chunk.sequence] = found.get(chunk.sequence, "") + chunk.text
        if event.HasField("finished"):
            assert event.finished.sequence not in ended
            ended.add(event.finished.sequence)
    assert ended == found.keys()
    return found


async def test_several_sequences_are_followed_behind_a_cursor(world: ResumptionWorld) -> None:
    """A client that left after the end of one hears the rest of the others, at either gateway."""
    await world.add_worker("w2", Script(answer=TEXT, others=OTHERS, interval_s=0.003))
    await world.add_worker("w1", Script(), draining=True)
    call = begin(world.peers["g1"], asked(n=3))
    events: list[Any] = []
    while not any(event.HasField("finished") for event in events):
        events.append(await call.read())
    call.cancel()
    events = [event for event in events if not event.HasField("queued")]
    said = dict(enumerate((TEXT, *OTHERS)))
    for peer in ("g1", "g2"):
        rest = await follow(world.peers[peer], events[-1].cursor, timeout=20)
        assert texts(events + rest) == said
        assert texts(await follow(world.peers[peer], 0, timeout=20)) == said


async def test_the_sequences_of_a_dead_gateway_go_on_at_the_other(world: ResumptionWorld) -> None:
    """One had ended: it is not begun again. The others go on where the log ends, and all is charged once."""
    await world.add_worker("w2", Script(answer=TEXT, others=OTHERS, interval_s=0.003))
    await world.add_worker("w1", Script(), draining=True)
    g1, g2 = world.peers["g1"], world.peers["g2"]
    call = begin(g1, asked(n=3))
    events: list[Any] = []
    while not any(event.HasField("finished") for event in events):
        events.append(await call.read())
    # Another worker goes on: the scripted one cannot tell two sessions' jobs of one name apart.
    await world.add_worker("w3", Script(answer=TEXT, others=OTHERS, interval_s=0.003))
    await world.add_worker("w2", Script(), draining=True)
    await g1.die()
    events = [event for event in events if not event.HasField("queued")]
    events += await follow(g2, events[-1].cursor, timeout=20)
    assert texts(events) == dict(enumerate((TEXT, *OTHERS)))
    (order,) = world.workers["w3"].starts
    assert (order.n, [part.sequence for part in order.emitted if part.ended]) == (3, [1])
    prompts = [event.finished.usage.prompt_tokens for event in events if event.HasField("finished")]
    assert sorted(prompts) == [0, 0, len(order.prompt_ids)]
