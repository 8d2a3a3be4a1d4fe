"""What a gateway does with resumable requests that another process began, as the queue tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import RequestUnknown, WorkerLost
from services.gateway.core.attempts import Output, RefusalReason
from services.gateway.core.events import Chunk, Finished, FinishReason, Started
from services.gateway.core.jobs import Grant, Outcome, Renewal
from services.gateway.core.log import Claim, Entry, Failed, Notice, NoticeKind, TakenUp
from services.gateway.core.payload import write_payload
from tests.fakes.gateway_ports import grant
from tests.fixtures.dispatcher_world import World, dispatcher_world, job, rest


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself."""
    async with dispatcher_world() as made:
        yield made


def left(held: Grant | None, *events: Started | Chunk | Finished | Failed) -> TakenUp:
    """A resumable job, and what its log says."""
    payload, entries = write_payload(job("a", resumable=True, digest="d")), tuple(map(Entry, events))
    return TakenUp(payload, "new", waited_s=6.0, left_s=20.0, adoptions=1, entries=entries, grant=held)


def ends(world: World) -> list[tuple[str, str]]:
    """The calls that ended a job."""
    return [call for call in world.queue.calls if call[0].startswith(("settle", "cancel"))]


@pytest.mark.parametrize("unknown", [frozenset("a"), frozenset[str]()], ids=["own", "met"])
async def test_a_job_that_a_renewal_adopted_and_granted_goes_on(
    world: World, unknown: frozenset[str]
) -> None:
    """Of an earlier process of its name, or of a gateway that vanished, met at the head of the line."""
    found = grant("n1", "a")
    world.queue.taken["a"] = left(found)
    world.queue.renewal = Renewal(granted=(found,), unknown=unknown)
    await world.dispatcher.renew()
    (attempt,) = world.workers.attempts
    assert attempt.order.prompt_ids == (1, 2, 3)
    assert (ends(world), attempt.cancelled) == ([], False)


@pytest.mark.parametrize(
    ("said", "used", "outcome"),
    [
        ((Chunk(0, "ab", (7, 8)), Chunk(2, "", (9,)), Finished(FinishReason.STOP)), 6, Outcome.FINISHED),
        ((Finished(FinishReason.STOP),), 3, Outcome.FINISHED),
        ((Chunk(0, "ab", (7, 8)), Failed(WorkerLost("gone"))), 5, Outcome.CANCELLED),
        ((Failed(WorkerLost("gone")),), 0, Outcome.CANCELLED),
    ],
    ids=["answered", "empty", "cut", "nothing"],
)
async def test_an_end_that_was_written_and_not_told_to_the_queue_is_told(
    world: World, said: tuple[Chunk | Finished | Failed, ...], used: int, outcome: Outcome
) -> None:
    """Its gateway went in between: its tenant is charged, and nobody is asked again."""
    world.queue.taken["a"] = left(None, Started("r", "m", "r1", "w1", 1, 0.0), *said)
    world.queue.renewal = Renewal(unknown=frozenset("a"))
    await world.dispatcher.renew()
    assert (ends(world), world.workers.attempts) == ([("cancel", "new")], [])
    assert (world.queue.used, world.queue.outcomes) == ([used], [outcome])


async def test_a_found_grant_that_the_take_up_fenced_off_is_not_started(world: World) -> None:
    """The job of an earlier process was granted, and waits again when it is taken up."""
    world.queue.taken["a"] = left(None)
    world.queue.renewal = Renewal(granted=(grant("stale", "a"),), unknown=frozenset("a"))
    await world.dispatcher.renew()
    assert (world.dispatcher.live, world.workers.attempts, ends(world)) == (1, [], [])
    world.queue.receive(grant("fresh", "a"))
    await world.workers.wait_started(1)


async def test_nobody_takes_over_in_time_what_was_taken_up(world: World) -> None:
    """Its host is gone, and the controller that would strike off the worker: as after any loss, it ends."""
    world.queue.taken["a"] = left(grant("n1", "a"), Started("r", "m", "r1", "w1", 1, 0.0))
    world.queue.renewal = Renewal(unknown=frozenset("a"))
    await world.dispatcher.renew()
    stream = await world.dispatcher.resume("alice", "a", 0)

    async def lend_in_vain() -> None:
        for number in range(2, 100):
            world.workers.attempts[-1].sink.refused(RefusalReason.UNREACHABLE, "away")
            await asyncio.sleep(0.05)
            world.queue.receive(grant(f"n{number}", "a"))

    lending = asyncio.create_task(lend_in_vain())
    with pytest.raises(WorkerLost, match="no other one could go on"):
        await rest(stream)
    lending.cancel()
    await asyncio.gather(lending, return_exceptions=True)


async def test_a_grant_for_what_has_moved_away_and_come_back_is_taken_up(world: World) -> None:
    """The request has ended here and owes the queue a call still; its job is this gateway's again."""
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    world.queue.registers = world.queue.settles = False
    moved = world.dispatcher._live["a"]
    moved.leave()
    world.queue.receive(grant("n2", "a"))
    world.queue.taken["a"] = left(grant("n2", "a"))
    world.queue.renewal = Renewal(granted=(grant("n2", "a"),))
    await world.dispatcher.renew()
    second = await world.workers.wait_started(2)
    assert (ends(world), second.cancelled) == ([], False)
    await stream.aclose()


async def test_a_position_that_the_gateway_before_told_and_could_not_write_is_lost(world: World) -> None:
    """The store was away from it: what stands there now is not what its client has seen."""
    said = Started("r", "m", "r1", "w1", 1, 0.0), Chunk(0, "ab", (7, 8))
    world.queue.taken["a"] = left(grant("n1", "a"), *said)
    world.queue.renewal = Renewal(unknown=frozenset("a"))
    await world.dispatcher.renew()
    with pytest.raises(WorkerLost):
        await world.dispatcher.resume("alice", "a", 5)


async def test_a_gateway_that_leaves_hands_on_what_comes_to_it(world: World) -> None:
    """By a notice, as unknown or with a grant: it takes nothing up and ends nothing."""
    await world.dispatcher.drain(0)
    world.queue.taken["a"] = left(grant("n1", "a"))
    world.queue.tell(Notice(NoticeKind.TAKE, "a", "m"))
    await world.queue.wait_for("release", "")
    world.queue.releases = False
    world.queue.calls.clear()
    world.queue.renewal = Renewal(granted=(grant("n1", "a"),), unknown=frozenset("b"))
    await world.dispatcher.renew()
    assert world.queue.calls == [("renew", ""), ("release", ""), ("release", "")]


async def test_a_gateway_that_leaves_says_so_at_once(world: World) -> None:
    """Not a second later, when the others may have handed their requests to it."""
    work = asyncio.create_task(world.dispatcher.run())
    await world.queue.wait_for("renew", "")
    assert not world.queue.leaving
    async with asyncio.timeout(0.5):
        # It carries nothing, and ends as soon as it has said so.
        await world.dispatcher.drain(30)
    assert world.queue.leaving
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_a_gateway_has_left_when_every_model_s_queue_knows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them hands requests over by its own notes."""
    told, heard, renew = asyncio.Event(), asyncio.Event(), world.queue.renew

    async def renew_slowly(model: str, *args: Any, leaving: bool, **fields: Any) -> Renewal:
        if leaving and model == "other":
            told.set()
            await heard.wait()
        return await renew(model, *args, leaving=leaving, **fields)

    monkeypatch.setattr(world.queue, "renew", renew_slowly)
    monkeypatch.setattr(world.dispatcher._rounds, "_models", lambda: ("m", "other"))
    work = asyncio.create_task(world.dispatcher.run())
    leaving = asyncio.create_task(world.dispatcher.drain(30))
    await told.wait()
    await asyncio.sleep(0.1)
    assert not leaving.done()
    heard.set()
    await leaving
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_what_has_moved_away_can_be_cancelled(world: World) -> None:
    """It goes on elsewhere: this gateway looks for it there, in vain, and does not say that it has ended."""
    stream = await world.dispatcher.submit(job("a", resumable=True, digest="d"))
    world.dispatcher._live["a"].leave()
    await stream.aclose()
    await world.dispatcher.wait_empty()
    with pytest.raises(RequestUnknown):
        await world.dispatcher.cancel("a")


async def test_what_cannot_be_read_keeps_nobody_behind_it_waiting(world: World) -> None:
    """A later version wrote it; whoever comes after it in the same renewal goes on."""
    world.queue.taken["b"] = replace(left(None), payload="{}")
    world.queue.taken["a"] = left(grant("n1", "a"))
    world.queue.renewal = Renewal(granted=(grant("n0", "b"), grant("n1", "a")), unknown=frozenset("b"))
    await world.dispatcher.renew()
    (attempt,) = world.workers.attempts
    assert (attempt.order.job_id, ends(world), world.dispatcher.store_reachable) == ("a", [], True)


async def test_who_followed_it_elsewhere_reads_it_at_hand_where_it_was_taken_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is not asked any more, which tells nobody of what is written here; and somebody is there."""
    started = Started("r", "m", "r1", "w1", 1, 0.0)
    async with dispatcher_world(detach_grace_s=0.1) as world:
        world.logs.claims["a"], world.logs.entries["a"] = Claim("m", "d"), [Entry(started)]
        stream = await world.dispatcher.resume("alice", "a", 0)
        reading = asyncio.create_task(rest(stream))
        await asyncio.sleep(0)
        monkeypatch.setattr(world.logs, "read", lambda *_: pytest.fail("the store was asked"))
        world.queue.taken["a"] = left(grant("n1", "a"), started)
        world.queue.renewal = Renewal(unknown=frozenset("a"))
        await world.dispatcher.renew()
        attempt = await world.workers.wait_started(1)
        # Longer than it would go on for nobody.
        await asyncio.sleep(0.3)
        attempt.sink.output(Output(0, (97,), FinishReason.STOP))
        first, again, chunk, end = await reading
        assert (first, chunk) == (started, Chunk(0, "a", (97,)))
        assert isinstance(again, Started)
        assert isinstance(end, Finished)
