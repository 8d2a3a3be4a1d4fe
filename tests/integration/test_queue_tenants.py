"""What a tenant may take: its share, its cap, its quota and its room in the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.common.errors import QueueFull, QuotaExceeded
from services.gateway.core.jobs import Band, Grant, Outcome, Waiting
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job


async def test_a_tenant_is_told_what_is_left_of_its_limits(world: QueueWorld) -> None:
    """With a grant, a place and a refusal alike, the estimate counted; nothing without limits."""
    limits, queue = TenantLimits(tokens_per_minute=250, concurrency=1), world.gateway()
    told = []
    for name in "ab":
        answer = await queue.enqueue(make_job(name, limits=limits))
        told.append(answer.allowance)
    with pytest.raises(QuotaExceeded) as refused:
        await queue.enqueue(make_job("c", limits=limits))
    told.append(refused.value.allowance)
    assert all(allowance is not None and 0 < allowance.tokens_reset_s <= 60 for allowance in told)
    assert [(one.tokens_limit, one.tokens_left) for one in told if one] == [(250, 150), (250, 50), (250, 50)]
    assert [(one.requests_limit, one.requests_left) for one in told if one] == [(1, 0)] * 3
    assert (await queue.enqueue(make_job("d", tenant="another"))).allowance is None


async def test_the_tenant_that_was_served_least_goes_first(world: QueueWorld) -> None:
    """A long answer costs turns: after 300 tokens of one tenant the other has three of 100."""
    running = await world.grant("running", tenant="x")
    for name in ("a1", "a2"):
        await world.wait(name, tenant="a", cost=300)
    for name in ("b1", "b2", "b3", "b4"):
        await world.wait(name, tenant="b", cost=100)
    await world.finish(running)
    assert await world.finish_all(used=300) == ["a1", "b1", "a2", "b2", "b3", "b4"]


async def test_what_was_not_used_is_given_back(world: QueueWorld) -> None:
    """A tenant that asks for 1,000 tokens and uses 10 waits no longer than one that asks for 10."""
    running = await world.grant("running", tenant="x")
    for number in range(3):
        await world.wait(f"a{number}", tenant="a", cost=1_000)
        await world.wait(f"b{number}", tenant="b", cost=10)
    await world.finish(running)
    assert await world.finish_all(used=10) == ["a0", "b0", "a1", "b1", "a2", "b2"]


async def test_idleness_earns_no_credit(world: QueueWorld) -> None:
    """A tenant that comes when another was served 500 tokens does not have the next 500 for itself."""
    running = await world.grant("running", tenant="a", cost=100)
    for number in range(9):
        await world.wait(f"a{number}", tenant="a", cost=100)
    await world.finish(running, used=100)
    for _ in range(4):
        await world.finish(world.received["g1"].pop(0), used=100)
    for number in range(3):
        await world.wait(f"late{number}", tenant="late", cost=100)
    order = await world.finish_all(used=100)
    assert order[:6] == ["a4", "late0", "a5", "late1", "a6", "late2"]


async def test_asking_for_much_and_leaving_early_earns_no_credit(empty_world: QueueWorld) -> None:
    """The charge of a job from before an idle time is taken back only as far as it stood above the floor."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=2)
    greedy = await empty_world.grant("greedy", tenant="a", cost=10_000)
    other = await empty_world.grant("other", tenant="b", cost=100)
    for number in range(4):
        await empty_world.wait(f"b{number}", tenant="b", cost=100)
    await empty_world.wait("a0", tenant="a", cost=100)
    await empty_world.finish(greedy, used=10)
    await empty_world.finish(other, used=100)
    served = empty_world.client.zscore(KEYS.prefix + "served:2", "a")
    assert served == 10.0 + (100.0 if "a0" in empty_world.running() else 0.0)
    await empty_world.finish_all(used=100)


async def test_weights_divide_the_turns(world: QueueWorld) -> None:
    """Weight 3 has three jobs for each one of weight 1."""
    running = await world.grant("running", tenant="x")
    for number in range(9):
        await world.wait(f"a{number}", tenant="a")
        await world.wait(f"b{number}", tenant="b", limits=TenantLimits(weight=3))
    await world.finish(running)
    order = await world.finish_all(used=100)
    assert sum(name.startswith("b") for name in order[:8]) == 6


async def test_a_requeue_gives_back_the_charge(world: QueueWorld) -> None:
    """A worker's failure is not the tenant's debt."""
    running = await world.grant("a", tenant="a", cost=100)
    assert world.client.zscore(KEYS.prefix + "served:2", "a") == 100.0
    await world.gateway().requeue(MODEL, "a", running.nonce)
    assert world.client.zscore(KEYS.prefix + "served:2", "a") == 0.0


@pytest.mark.parametrize("end", ["cancel", "deadline", "reap", "stop"])
async def test_what_was_produced_before_a_loss_is_charged_however_the_job_ends(
    world: QueueWorld, end: str
) -> None:
    """It waits for another worker and ends there: share and minute know of its 900 tokens."""
    lost = await world.grant("a", tenant="a", cost=1_000, timeout_s=20.0)
    await world.wait("b", tenant="b")
    await world.routes.remove_worker(MODEL, "w1", 1)
    await world.gateway().requeue(MODEL, "a", lost.nonce, pin=lost.revision, used_tokens=900)
    if end == "cancel":
        await world.gateway().cancel(MODEL, "a", "submission-of-a")
    elif end == "stop":
        await world.gateway().stop(MODEL, "a")
    else:
        world.advance(16 if end == "reap" else 21)
        await world.gateway().reap(MODEL)
    usage = await world.gateway().usage(MODEL, "a")
    assert (usage.used_tokens, usage.reserved_tokens) == (900, 0)
    assert world.client.zscore(KEYS.prefix + "served:2", "a") == 900.0


async def test_what_was_produced_outlives_a_loss_in_redis(world: QueueWorld) -> None:
    """The gateway enters the job again with what it has used; a registration keeps what was noted."""
    for name in "ab":
        await world.gateway().enqueue(replace(make_job(name, tenant=name, waited_s=1.0), used_tokens=70))
    waiting = await world.gateway().enqueue(make_job("c", tenant="c"))
    assert isinstance(waiting, Waiting)
    other = Grant("b", 2, "nonce", "w1", "w1:1", "r1", 1)
    assert await world.gateway().register(make_job("b", tenant="b"), other)
    for name in "ab":
        await world.gateway().cancel(MODEL, name, f"submission-of-{name}", used_tokens=7)
        assert (await world.gateway().usage(MODEL, name)).used_tokens == 70


async def test_going_on_after_a_failure_costs_a_turn_too(world: QueueWorld) -> None:
    """A pinned job goes before all turns; while it runs, the next job of its tenant waits its turn."""
    await world.add_worker("w2")
    failed, other = await world.grant("a0", tenant="a"), await world.grant("x", tenant="x")
    await world.gateway().requeue(MODEL, "a0", failed.nonce, pin=failed.revision)
    await world.wait("a1", tenant="a")
    await world.wait("b0", tenant="b")
    await world.finish(other)
    assert world.running("w2") == {"a0"}
    world.advance(1)
    await world.gateway().reap(MODEL)
    assert world.running("w1") == {"b0"}


async def test_an_idle_band_forgets_its_shares(world: QueueWorld) -> None:
    """When nothing waits or runs any more, everybody begins anew."""
    await world.finish(await world.grant("a", tenant="a"))
    assert not world.client.exists(
        KEYS.prefix + "served:2", KEYS.prefix + "entered:2", KEYS.prefix + "floors"
    )


async def test_tenants_that_left_long_ago_are_forgotten(world: QueueWorld) -> None:
    """A band that is never idle does not remember every tenant that ever came."""
    running = await world.grant("running", tenant="x")
    for number in range(3):
        await world.wait(f"old{number}", tenant=f"old{number}")
    for number in range(6):
        await world.wait(f"a{number}", tenant="a")
    await world.finish(running, used=100)
    for _ in range(7):
        await world.finish(world.received["g1"].pop(0), used=100)
    await world.gateway().reap(MODEL)
    assert set(world.client.zrange(KEYS.prefix + "served:2", 0, -1)) == {"a"}


async def test_a_tenant_at_its_cap_waits_for_its_own(empty_world: QueueWorld) -> None:
    """Slots are free and its jobs wait all the same; each end starts the next; nobody is blocked."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=4)
    capped = TenantLimits(concurrency=1)
    first = await empty_world.grant("a0", tenant="a", limits=capped)
    await empty_world.wait("a1", tenant="a", limits=capped)
    await empty_world.wait("a2", tenant="a", limits=capped, band=Band.SYSTEM)
    await empty_world.grant("b0", tenant="b")
    await empty_world.finish(first)
    assert empty_world.running() == {"b0", "a2"}
    assert await empty_world.finish_all() == ["a2", "a1"]


async def test_a_raised_cap_holds_at_once(empty_world: QueueWorld) -> None:
    """The newest token of a tenant says how many of its jobs may run."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=4)
    await empty_world.grant("a0", tenant="a", limits=TenantLimits(concurrency=1))
    await empty_world.wait("a1", tenant="a", limits=TenantLimits(concurrency=1))
    await empty_world.gateway().enqueue(make_job("a2", tenant="a"))
    assert empty_world.running() == {"a0", "a1", "a2"}


async def test_a_tenant_has_its_own_bound_in_the_queue(world: QueueWorld) -> None:
    """One that floods the queue is refused while others still find room."""
    gateway = world.gateway("g1", QueueLimits(tenant_waiting_jobs_max=2))
    await world.grant("running")
    for number in range(2):
        await world.wait(f"a{number}", tenant="a")
    with pytest.raises(QueueFull, match="2 of its requests wait") as refusal:
        await gateway.enqueue(make_job("a2", tenant="a"))
    assert refusal.value.retry_after_s is not None
    await world.wait("b0", tenant="b")


async def test_tokens_are_reserved_at_admission_and_settled_by_what_was_used(world: QueueWorld) -> None:
    """Two estimates of 100 do not fit into 150; what the first did not use makes room for the second."""
    limits = TenantLimits(tokens_per_minute=150)
    first = await world.grant("a", limits=limits)
    with pytest.raises(QuotaExceeded, match="100 tokens, and 100 of 150") as refusal:
        await world.gateway().enqueue(make_job("b", limits=limits))
    assert refusal.value.retry_after_s is not None
    assert 1 <= refusal.value.retry_after_s <= 60
    await world.finish(first, used=40)
    usage = await world.gateway().usage(MODEL, "tenant")
    assert (usage.used_tokens, usage.reserved_tokens, usage.running) == (40, 0, 0)
    await world.grant("b", limits=limits)
    usage = await world.gateway().usage(MODEL, "tenant")
    assert (usage.used_tokens, usage.reserved_tokens, usage.running) == (40, 100, 1)


async def test_the_minute_ends_and_reservations_stay(world: QueueWorld) -> None:
    """Used tokens belong to the minute in which their request ended; what runs stays reserved."""
    limits = TenantLimits(tokens_per_minute=250)
    await world.add_worker(slots=2)
    await world.grant("long", limits=limits)
    await world.finish(await world.grant("a", limits=limits), used=100)
    with pytest.raises(QuotaExceeded):
        await world.gateway().enqueue(make_job("b", limits=limits))
    world.advance(60)
    usage = await world.gateway().usage(MODEL, "tenant")
    assert (usage.used_tokens, usage.reserved_tokens) == (0, 100)
    await world.grant("b", limits=limits)


async def test_a_request_that_no_minute_holds_is_told_so(world: QueueWorld) -> None:
    """Coming back later would not help, so no time is named."""
    with pytest.raises(QuotaExceeded, match="limit is 99 a minute") as refusal:
        await world.gateway().enqueue(make_job("a", limits=TenantLimits(tokens_per_minute=99)))
    assert refusal.value.retry_after_s is None
    assert not refusal.value.retryable


@pytest.mark.parametrize("waits", [True, False])
async def test_a_cancelled_job_is_charged_what_it_used(world: QueueWorld, *, waits: bool) -> None:
    """One that waited used nothing; one that ran used what its gateway says."""
    running = await world.grant("a")
    if waits:
        await world.wait("b")
        await world.gateway().cancel(MODEL, "b", "submission-of-b")
    await world.gateway().settle(MODEL, "a", running.nonce, Outcome.CANCELLED, 17)
    usage = await world.gateway().usage(MODEL, "tenant")
    assert (usage.used_tokens, usage.reserved_tokens) == (17, 0)


async def test_what_was_used_without_the_queue_is_charged_once(world: QueueWorld) -> None:
    """However often it is said; and not where the job is known, whose end charges it."""
    limits, gateway = TenantLimits(tokens_per_minute=100), world.gateway()
    for _ in range(2):
        await gateway.book(MODEL, "tenant", "nonce", 30)
    await gateway.book(MODEL, "tenant", "another", 40)
    with pytest.raises(QuotaExceeded, match="and 70 of 100"):
        await gateway.enqueue(make_job("a", cost=31, limits=limits))
    grant = await world.grant("a", cost=30, limits=limits)
    await gateway.book(MODEL, "tenant", "running", 30, unless="a")
    await world.finish(grant, used=20)
    await gateway.book(MODEL, "tenant", "ended", 30, unless="a")
    await gateway.book(MODEL, "tenant", "unknown", 5, unless="b")
    assert (await gateway.usage(MODEL, "tenant")).used_tokens == 95
    assert 0 < world.client.pttl(KEYS.prefix + "booked:nonce") <= 60_000


async def test_an_account_ends_by_itself(world: QueueWorld) -> None:
    """Nothing is kept of a tenant that has stayed away for two minutes."""
    await world.finish(await world.grant("a"))
    assert 60_000 < world.client.pttl(KEYS.prefix + "quota:tenant") <= 120_000
    assert not world.client.exists(KEYS.prefix + "tenant:tenant")


async def test_a_job_that_cannot_be_done_in_time_is_refused_at_once(world: QueueWorld) -> None:
    """By the measured service time, its own included; the refusal has numbers, and leaves nothing behind."""
    first = await world.grant("a")
    world.advance(2)
    world.advance(2)
    await world.finish(first)
    await world.grant("b")
    await world.wait("c", timeout_s=8.5)
    with pytest.raises(
        QueueFull, match=r"1 requests are ahead, which takes about 8\.\d s, and 5\.0 s"
    ) as refusal:
        await world.gateway().enqueue(make_job("d", timeout_s=5.0))
    assert refusal.value.retry_after_s == pytest.approx(3, rel=0.2)
    assert await world.gateway().length(MODEL) == 1
    assert not world.client.exists(KEYS.job("d"))
    with pytest.raises(QueueFull, match=r"about 8\.\d s, and 10\.0 s"):
        await world.gateway().enqueue(make_job("d", timeout_s=10.0))
    await world.wait("d", timeout_s=12.5)


async def test_a_job_that_comes_back_is_not_refused_for_its_deadline(world: QueueWorld) -> None:
    """It was promised a place before the store was emptied."""
    first = await world.grant("a")
    world.advance(2)
    await world.finish(first)
    await world.grant("b")
    await world.wait("c", timeout_s=0.5, waited_s=1.0)


async def test_the_estimate_follows_the_size_of_what_is_ahead(world: QueueWorld) -> None:
    """A job behind one of five times the mean size waits six mean times."""
    first = await world.grant("a", cost=100)
    world.advance(2)
    await world.finish(first)
    await world.grant("b", cost=100)
    await world.wait("c", tenant="c", cost=500)
    place = await world.wait("d", tenant="d", cost=500)
    assert place.position == 1
    assert place.estimated_wait_s == pytest.approx(12, rel=0.05)


async def test_the_estimate_of_a_capped_tenant_counts_its_own_jobs(empty_world: QueueWorld) -> None:
    """Ten free slots do not help one that may use a single one."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=10)
    limits = TenantLimits(concurrency=1)
    first = await empty_world.grant("a", limits=limits)
    empty_world.advance(2)
    await empty_world.finish(first)
    await empty_world.grant("b", limits=limits)
    waits = [(await empty_world.wait(name, limits=limits)).estimated_wait_s for name in "cd"]
    assert waits == pytest.approx([2, 4], rel=0.05)


async def test_a_capped_backlog_of_a_higher_band_does_not_put_off_the_others(empty_world: QueueWorld) -> None:
    """Who may run two of eight jobs takes no more slots by having a hundred in line."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=8)
    limits = TenantLimits(concurrency=2)
    first = await empty_world.grant("first")
    empty_world.advance(2)
    await empty_world.finish(first)
    for number in range(6):
        await empty_world.grant(f"x{number}", tenant="x")
    for number in range(2):
        await empty_world.grant(f"a{number}", tenant="a", limits=limits)
    for number in range(2, 100):
        await empty_world.wait(f"a{number}", tenant="a", limits=limits)
    place = await empty_world.wait("b", tenant="b", band=Band.BATCH, timeout_s=5.0)
    assert place.position == 1
    assert place.estimated_wait_s == pytest.approx(0.5, rel=0.05)
    own = await empty_world.wait("own", tenant="a", band=Band.BATCH, limits=limits)
    assert own.position == 99
    assert own.estimated_wait_s == pytest.approx(99, rel=0.05)
    # Of tenants without a bound all that waits is counted, and what the other one begins meanwhile.
    for number in range(60):
        await empty_world.wait(f"c{number}", tenant="c")
    place = await empty_world.wait("d", tenant="d", band=Band.BATCH)
    assert place.position == pytest.approx((60 + 2) * 8 / 6, abs=2)
