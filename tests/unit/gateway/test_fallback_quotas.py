"""What tenants may take while the store is gone, and what the store learns of what they took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.common.allowance import Allowance
from services.common.errors import QuotaExceeded, StoreUnavailable
from services.gateway.adapters import tenant_minutes
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.fallback_world import MODEL, W1, World, job

LIMITS = TenantLimits(tokens_per_minute=100)


@pytest.fixture
def world() -> World:
    """A world in which all is well, and a minute of the store that ends in half of one."""
    world = World((replace(W1, slots=4),))
    world.store._lines[MODEL].quotas.began = world.clock.monotonic() - 30
    return world


def limited(name: str, tokens: int, limits: TenantLimits = LIMITS) -> QueuedJob:
    """A job of a tenant that has limits."""
    return replace(job(name), cost_tokens=tokens, limits=limits)


async def use(world: World, name: str, tokens: int, *, cost: int = 0) -> None:
    """A request that begins and ends."""
    grant = await world.queue.enqueue(limited(name, cost or tokens))
    assert isinstance(grant, Grant)
    assert await world.queue.settle(MODEL, name, grant.nonce, Outcome.FINISHED, tokens)


async def used(world: World) -> int:
    """What the tenant has used, as its caller is told."""
    return (await world.queue.usage(MODEL, "alice")).used_tokens


async def come_back(world: World) -> None:
    """The store answers again, with all that it knew."""
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert not world.queue.degraded


@pytest.mark.parametrize("found", ["by-a-renewal", "by-the-request"])
@pytest.mark.parametrize("end", ["settled", "cancelled"])
async def test_what_is_used_without_the_store_counts_when_it_is_back(
    world: World, found: str, end: str
) -> None:
    """Begun and ended alone, also where the call that was to tell of it found out that the store is gone."""
    await use(world, "a", 60)
    if found == "by-a-renewal":
        await world.go_away()
    world.store.down = True
    if end == "settled":
        await use(world, "b", 15)
    else:
        assert isinstance(await world.queue.enqueue(limited("b", 15)), Grant)
        await world.queue.cancel(MODEL, "b", "s-b", used_tokens=15)
    await come_back(world)
    assert await used(world) == 75
    with pytest.raises(QuotaExceeded):
        await world.queue.enqueue(limited("c", 26))
    await use(world, "c", 25)


async def test_what_is_told_twice_counts_once(world: World) -> None:
    """The answer to the booking is lost; what is used before the next try is another one."""

    async def lose() -> None:
        await use(world, "b", 5)
        raise StoreUnavailable("no answer")

    await world.go_away()
    await use(world, "a", 10)
    world.store.meanwhile["book"] = lose
    await world.come_back(empty=False)
    await world.queue.renew(MODEL, {}, frozenset())
    assert world.queue.degraded
    assert (await world.store.usage(MODEL, "alice")).used_tokens == 10
    await come_back(world)
    assert await used(world) == 15


async def test_a_job_that_the_store_knows_is_charged_by_its_end(world: World) -> None:
    """It was settled there, and the answer was lost: it is told again, and charged once."""
    grant = await world.queue.enqueue(limited("a", 20))
    assert isinstance(grant, Grant)
    world.store.loses_answers = True
    await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 20)
    assert world.queue.degraded
    await come_back(world)
    assert await used(world) == 20


async def test_what_was_used_in_earlier_minutes_counts_no_more(world: World) -> None:
    """After an hour alone the next minute is not taken up by all of it."""
    await world.go_away()
    await use(world, "a", 40)
    world.clock.turn(30)
    await use(world, "b", 20)
    world.clock.turn(31)
    await come_back(world)
    assert await used(world) == 20


async def test_a_bounded_number_of_sums_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten."""
    monkeypatch.setattr(tenant_minutes, "UNTOLD_MAX", 1)
    await world.go_away()
    await use(world, "a", 10)
    world.clock.turn(20)
    await use(world, "b", 5)
    await come_back(world)
    assert await used(world) == 5


async def test_each_gateway_lets_its_part_through(world: World) -> None:
    """Of 100 tokens a minute and two requests at once two gateways that are alone let half through each."""
    limits = TenantLimits(tokens_per_minute=100, concurrency=2)
    await world.go_away()
    first = await world.queue.enqueue(limited("a", 20, limits))
    assert isinstance(first, Grant)
    assert first.allowance == Allowance(50, 30, 20.0, 1, 0)
    assert isinstance(await world.queue.enqueue(limited("b", 20, limits)), Waiting)
    refusals = []
    for tokens in (11, 60, 101):
        with pytest.raises(QuotaExceeded) as refused:
            await world.queue.enqueue(limited("c", tokens, limits))
        refusals.append(refused.value.retry_after_s)
    # What is more than the part fits into the whole, once that counts again.
    assert refusals == [20.0, 20.0, None]
    await world.queue.settle(MODEL, "a", first.nonce, Outcome.FINISHED, 20)
    assert [grant.job_id for grant in world.heard] == ["b"]


async def test_the_minute_goes_on_without_the_store(world: World) -> None:
    """What all gateways took of it counts by its part, until it ends as it would have ended there."""
    await world.store.enqueue(limited("elsewhere", 20))
    await use(world, "a", 20, cost=70)
    await world.go_away()
    assert await used(world) == 20
    with pytest.raises(QuotaExceeded) as refused:
        await world.queue.enqueue(limited("b", 31))
    assert refused.value.retry_after_s == 30.0
    await use(world, "b", 30)
    world.clock.turn(29)
    with pytest.raises(QuotaExceeded):
        await world.queue.enqueue(limited("c", 1))
    world.clock.turn(1)
    await use(world, "c", 50)


async def test_a_refusal_tells_of_the_minute_too(world: World) -> None:
    """Others took all of it: this gateway, which has let nothing through, does not begin with a new one."""
    await world.store.enqueue(limited("elsewhere", 100))
    for _ in range(2):
        with pytest.raises(QuotaExceeded):
            await world.queue.enqueue(limited("a", 1))
        await world.go_away()


async def test_a_store_that_comes_and_goes_gives_nobody_a_new_minute(world: World) -> None:
    """What was used alone counts when it goes again, though it has said nothing meanwhile."""
    await use(world, "a", 40)
    for name, tokens in (("b", 30), ("c", 15)):
        await world.go_away()
        with pytest.raises(QuotaExceeded):
            await world.queue.enqueue(limited(name, tokens + 1))
        await use(world, name, tokens)
        await come_back(world)
    assert await used(world) == 85


async def test_what_runs_counts_by_what_is_reserved_for_it(world: World) -> None:
    """It is among what all had taken, and is not counted twice."""
    grant = await world.queue.enqueue(limited("a", 80))
    assert isinstance(grant, Grant)
    await world.go_away()
    usage = await world.queue.usage(MODEL, "alice")
    assert (usage.used_tokens, usage.reserved_tokens) == (0, 80)
    await world.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10)
    await use(world, "b", 40)
    await come_back(world)
    assert await used(world) == 50
