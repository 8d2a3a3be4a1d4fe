"""Who comes back by a cursor to a request that the store does not know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.common.errors import RequestUnknown, StoreUnavailable
from services.gateway.core.events import Chunk, Finished, FinishReason, Started
from services.gateway.core.jobs import Renewal
from services.gateway.core.log import Claim, Entry
from services.gateway.dispatcher.follower import LOST_LOG_WAIT_S, Follower
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.dispatcher_world import World, dispatcher_world, ids, job, rest


@dataclass
class Scene:
    """A dispatcher whose rounds measure by a clock that a test turns."""

    world: World
    clock: TurnedClock

    async def refused(self, cursor: int = 1) -> type[Exception]:
        """What a client is told that comes back."""
        with pytest.raises((RequestUnknown, StoreUnavailable)) as caught:
            await self.world.dispatcher.resume("alice", "x", cursor)
        return caught.type


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """All is well, and nobody has heard of the request."""
    async with dispatcher_world() as world:
        clock = TurnedClock()
        monkeypatch.setattr(world.dispatcher._rounds, "_clock", clock)
        await world.dispatcher.renew()
        yield Scene(world, clock)


async def test_a_store_that_was_emptied_says_nothing_of_it(scene: Scene) -> None:
    """What the id stood for went with the rest, and so it may be known again."""
    assert await scene.refused() is RequestUnknown
    scene.world.logs.emptied = True
    assert await scene.refused() is StoreUnavailable
    scene.world.logs.emptied = False
    # Its own gateway may come home after the one that is asked.
    assert await scene.refused() is StoreUnavailable
    scene.clock.turn(LOST_LOG_WAIT_S)
    assert await scene.refused() is RequestUnknown


@pytest.mark.parametrize("trouble", ["gone", "degraded", "back", "forgetful"])
@pytest.mark.parametrize("claimed", [False, True])
async def test_what_a_store_may_have_lost_is_not_unknown_at_once(
    scene: Scene, trouble: str, *, claimed: bool
) -> None:
    """Its own gateway has not come home, perhaps; of what has no cursor nobody has heard."""
    world = scene.world
    if claimed:
        world.logs.claims["x"] = Claim("m", "d")
    stream = await world.dispatcher.submit(job())
    world.queue.down = trouble == "gone"
    world.queue.renewal = {
        "degraded": Renewal(degraded=True),
        "back": Renewal(returns=1),
        "forgetful": Renewal(lost=frozenset("j")),
    }.get(trouble, Renewal())
    await world.dispatcher.renew()
    world.queue.down = False
    world.queue.renewal = Renewal(returns=int(trouble == "back"))
    await world.dispatcher.renew()
    assert await scene.refused(0) is RequestUnknown
    scene.clock.turn(LOST_LOG_WAIT_S - 0.1)
    assert await scene.refused() is StoreUnavailable
    scene.clock.turn(0.1)
    assert await scene.refused() is RequestUnknown
    await stream.aclose()


async def test_a_request_is_found_of_which_the_id_alone_was_lost(scene: Scene) -> None:
    """As where the id's node is another one than its queue's."""
    started, chunk, end = (
        Started("r", "m", "r1", "w1", 1, 0.0),
        Chunk(0, "ab", ids("ab")),
        Finished(FinishReason.STOP),
    )
    scene.world.logs.entries["x"] = [Entry(started), Entry(chunk), Entry(end)]
    assert await rest(await scene.world.dispatcher.resume("alice", "x", 1)) == [chunk, end]


async def test_a_queue_that_is_away_hides_no_other(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what no id says whose it is, any model's queue may know."""
    resumption, rounds = scene.world.dispatcher._resumption, scene.world.dispatcher._rounds
    follow = resumption.follow

    async def away(tenant: str, model: str, job_id: str, cursor: int) -> Follower:
        if model == "away":
            raise StoreUnavailable("Its node is away.")
        return await follow(tenant, model, job_id, cursor)

    monkeypatch.setattr(resumption, "follow", away)
    monkeypatch.setattr(rounds, "known_models", lambda: ("away", "m"))
    assert await scene.refused() is StoreUnavailable
    scene.world.logs.entries["x"] = [Entry(Chunk(0, "ab", ids("ab"))), Entry(Finished(FinishReason.STOP))]
    stream = await scene.world.dispatcher.resume("alice", "x", 1)
    assert await rest(stream) == [Finished(FinishReason.STOP)]
