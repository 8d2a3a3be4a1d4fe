"""What becomes of a request whose client is cut off before the call has said anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.common.errors import QueueFull, StoreUnavailable
from services.gateway.core.attempts import Output
from services.gateway.core.events import Chunk, Finished, FinishReason, Started
from services.gateway.core.params import GenerationJob
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher that never renews by itself, with a queue that takes its time to answer."""
    async with dispatcher_world() as made:
        made.queue.answers_on = asyncio.Event()
        yield made
        made.queue.answers_on.set()


def resumable() -> GenerationJob:
    """What the client asks, each time."""
    return job("a", resumable=True, digest="d")


async def cut_off(call: asyncio.Task[Any]) -> None:
    """Ends a call as a broken connection does."""
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def cut_off_in_the_queue(world: World, asked: GenerationJob) -> None:
    """Submits a request and cuts its client off while the queue is asked; then the queue answers."""
    call = asyncio.create_task(world.dispatcher.submit(asked))
    await world.queue.wait_for("enqueue", asked.submission)
    await cut_off(call)
    assert world.queue.answers_on is not None
    world.queue.answers_on.set()


async def test_a_resumable_request_goes_on_and_its_client_finds_it_again(world: World) -> None:
    """The same request once more joins it, and hears all of it; the queue was asked once."""
    await cut_off_in_the_queue(world, resumable())
    attempt = await world.workers.wait_started(1)
    stream = await world.dispatcher.submit(resumable())
    attempt.sink.output(Output(0, ids("a"), FinishReason.STOP))
    assert [type(event) for event in await rest(stream)] == [Started, Chunk, Finished]
    assert [name for verb, name in world.queue.calls if verb == "enqueue"] == ["s-a"]


async def test_one_that_nobody_comes_back_for_is_given_up() -> None:
    """After the grace, as one whose client has gone later; it takes no follower's place."""
    async with dispatcher_world(detach_grace_s=0.05) as world:
        world.queue.answers_on = asyncio.Event()
        await cut_off_in_the_queue(world, resumable())
        await world.workers.wait_started(1)
        await world.queue.wait_for("settle:cancelled", "n1")
        assert ("cancel", "s-a") not in world.queue.calls
        assert world.dispatcher.following == 0


async def test_what_is_refused_afterwards_leaves_its_id_to_another(world: World) -> None:
    """The claim goes, though nobody is there to hear of the refusal."""
    world.queue.answer = QueueFull("full", retry_after_s=1)
    await cut_off_in_the_queue(world, resumable())
    await unclaimed(world)


async def test_a_client_that_is_cut_off_while_its_id_is_claimed_leaves_no_empty_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store had taken the claim, and its answer was on its way: what it stands for is still asked for."""
    claimed, answers, claim = asyncio.Event(), asyncio.Event(), world.logs.claim

    async def claim_slowly(*args: Any) -> Any:
        known = await claim(*args)
        claimed.set()
        await answers.wait()
        return known

    monkeypatch.setattr(world.logs, "claim", claim_slowly)
    world.queue.answer = QueueFull("full", retry_after_s=1)
    call = asyncio.create_task(world.dispatcher.submit(resumable()))
    await claimed.wait()
    await cut_off(call)
    answers.set()
    await world.queue.wait_for("enqueue", "s-a")
    assert world.queue.answers_on is not None
    world.queue.answers_on.set()
    await unclaimed(world)


async def test_any_other_request_is_withdrawn(world: World) -> None:
    """Its slot comes back, which the queue lent to nobody."""
    await cut_off_in_the_queue(world, job("a"))
    await world.queue.wait_for("settle:cancelled", "n1")
    await world.queue.wait_for("cancel", "s-a")
    assert world.workers.attempts == []


async def test_a_resumable_request_that_the_store_may_have_is_not_ended_in_its_log(world: World) -> None:
    """The queue took it, perhaps, without a word: who asks again must not hear of a store that was away."""
    world.queue.down = True
    with pytest.raises(StoreUnavailable):
        await world.dispatcher.submit(resumable())
    world.queue.down = False
    await world.dispatcher.wait_empty()
    assert (world.queue.calls, world.queue.tails) == ([], [])
    assert list(world.logs.claims) == ["a"]


async def unclaimed(world: World) -> None:
    """Returns once no id stands for anything."""
    async with asyncio.timeout(5):
        while world.logs.claims:  # noqa: ASYNC110 - a directory tells nobody
            await asyncio.sleep(0)
    assert (world.dispatcher.live, world.dispatcher.following) == (0, 0)
