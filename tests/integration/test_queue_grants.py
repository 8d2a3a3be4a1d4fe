"""Where a job goes: workers, revisions, pins and suspicions."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from services.common.queue_keys import gateway_channel
from services.gateway.core.jobs import Grant, Waiting
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, REVISION, QueueWorld, make_job


async def test_the_least_loaded_worker_takes_the_job(empty_world: QueueWorld) -> None:
    """Load is the share of slots in use, so that a large worker takes more."""
    await empty_world.set_route()
    await empty_world.add_worker("large", slots=4)
    await empty_world.add_worker("small", slots=2)
    grants = [await empty_world.grant(f"j{number}") for number in range(6)]
    assert [grant.worker_id for grant in grants[:3]] == ["large", "small", "large"]
    assert Counter(grant.worker_id for grant in grants) == {"large": 4, "small": 2}


@pytest.mark.parametrize("flaw", [{"draining": True}, {"ready": ()}, {"ready": ("other",)}, {"slots": 0}])
async def test_an_unfit_worker_gets_no_job(empty_world: QueueWorld, flaw: dict[str, object]) -> None:
    """Draining, not ready for the route's revision, or without slots: the other one takes all."""
    await empty_world.set_route()
    await empty_world.add_worker("w1", **flaw)  # type: ignore[arg-type]
    await empty_world.wait("a")
    await empty_world.add_worker("w2", slots=2)
    assert (await empty_world.grant("b")).worker_id == "w2"


async def test_without_a_route_jobs_wait(empty_world: QueueWorld) -> None:
    """A worker alone is no reason to answer; the route says what serves."""
    await empty_world.add_worker()
    await empty_world.wait("a")
    await empty_world.set_route(r1=0, r2=0)
    await empty_world.wait("b")


async def test_a_worker_whose_lease_lapsed_gets_no_job(empty_world: QueueWorld) -> None:
    """As long as another worker's lease lives, the controller is there, and its silence means something."""
    await empty_world.set_route()
    await empty_world.add_worker("w1", lease_ttl_s=5.0)
    await empty_world.add_worker("w2", slots=2)
    empty_world.advance(6)
    assert (await empty_world.grant("a")).worker_id == "w2"
    assert (await empty_world.grant("b")).worker_id == "w2"
    await empty_world.wait("c")


async def test_when_all_leases_lapsed_they_are_not_judged(empty_world: QueueWorld) -> None:
    """Then it is the controller that is away, and serving goes on without it."""
    await empty_world.set_route()
    await empty_world.add_worker("w1", lease_ttl_s=5.0)
    await empty_world.add_worker("w2", lease_ttl_s=5.0)
    empty_world.advance(60)
    assert {(await empty_world.grant(name)).worker_id for name in "ab"} == {"w1", "w2"}


async def test_weights_divide_the_jobs_and_stick_to_them(empty_world: QueueWorld) -> None:
    """A tenth goes to the canary, chosen by the job's id: a second attempt meets the same revision."""
    await empty_world.set_route(canary=10, stable=90)
    await empty_world.add_worker("w1", slots=200, ready=("canary", "stable"))
    grants = [await empty_world.grant(f"job-{number}") for number in range(150)]
    assert 5 <= sum(grant.revision == "canary" for grant in grants) <= 30
    for grant in grants[:20]:
        await empty_world.gateway().refused(MODEL, grant.job_id, grant.nonce, hold_s=0.0)
    again = {grant.job_id: grant.revision for grant in empty_world.received["g1"]}
    assert again == {grant.job_id: grant.revision for grant in grants[:20]}


async def test_a_revision_without_a_free_worker_gives_way(empty_world: QueueWorld) -> None:
    """Rather than wait for the weighted revision, a job takes another one of the route, but no other."""
    await empty_world.set_route(r1=99, r2=1, r3=0)
    await empty_world.add_worker("w2", slots=20, ready=("r2", "r3"))
    assert {(await empty_world.grant(f"j{number}")).revision for number in range(20)} == {"r2"}


async def test_a_job_that_has_emitted_goes_on_with_its_revision_only(empty_world: QueueWorld) -> None:
    """The route has switched meanwhile; the job is served before all others once a worker has it."""
    await empty_world.set_route(r1=100)
    await empty_world.add_worker("w1", ready=("r1",))
    grant = await empty_world.grant("a")
    await empty_world.set_route(epoch=2, r2=100)
    await empty_world.routes.remove_worker(MODEL, "w1", 1)
    await empty_world.gateway().requeue(MODEL, "a", grant.nonce, pin=grant.revision)
    await empty_world.wait("b")
    await empty_world.add_worker("w2", ready=("r2",))
    await empty_world.gateway().reap(MODEL)
    assert [granted.job_id for granted in empty_world.received["g1"]] == ["b"]
    await empty_world.add_worker("w3", ready=("r1",))
    await empty_world.gateway().reap(MODEL)
    assert [granted.revision for granted in empty_world.received["g1"]] == ["r2", "r1"]


async def test_a_pinned_job_goes_before_older_ones(empty_world: QueueWorld) -> None:
    """Its client has a text that stands still."""
    await empty_world.set_route()
    await empty_world.add_worker()
    grant = await empty_world.grant("a")
    await empty_world.wait("older", waited_s=100.0)
    await empty_world.gateway().requeue(MODEL, "a", grant.nonce, pin=grant.revision)
    empty_world.advance(1)
    await empty_world.gateway().reap(MODEL)
    assert [granted.job_id for granted in empty_world.received["g1"]] == ["a"]


@pytest.mark.parametrize("known", ["not-at-all", "waiting", "granted", "granted-and-heard", "registered"])
async def test_a_job_with_a_text_takes_its_pin_with_it(empty_world: QueueWorld, known: str) -> None:
    """Redis was emptied, or has it without a pin, or lent it another revision's slot that nobody heard of."""
    world, job = empty_world, replace(make_job("a"), pin="r1", waited_s=1.0)
    gateway = world.gateway()
    await world.set_route(r2=100)
    if known.startswith("granted"):
        await world.add_worker("w2", ready=("r2",))
    answer = None if known in {"not-at-all", "registered"} else await gateway.enqueue(make_job("a"))
    await world.add_worker("w2", ready=("r2",))
    if known == "registered":
        await world.add_worker("w1", ready=("r1",))
        assert await gateway.register(job, Grant("a", 2, "n", "w1", "w1:1", "r1", 1))
        assert await gateway.refused(MODEL, "a", "n", hold_s=0.1)
        await world.routes.remove_worker(MODEL, "w1", 1)
    elif known == "granted-and-heard":
        assert isinstance(answer, Grant)
        assert await gateway.requeue(MODEL, "a", answer.nonce, pin="r1")
    else:
        assert isinstance(await gateway.enqueue(job), Waiting)
    await gateway.reap(MODEL)
    audit(world.client)
    assert await world.routes.read_awaited(MODEL) == {"r1"}
    assert await gateway.length(MODEL) == 1
    await world.add_worker("w3", ready=("r1",))
    await gateway.reap(MODEL)
    assert [grant.revision for grant in world.received["g1"]] == ["r1"]


async def test_a_grant_that_nobody_heard_of_is_not_refused_into_another_revision(
    empty_world: QueueWorld,
) -> None:
    """It is of the text's revision, made without a pin; its worker refuses, and the other waits in vain."""
    world, gateway = empty_world, empty_world.gateway()
    await world.set_route(r1=100, r2=100)
    await world.add_worker("w1", ready=("r1",))
    first = await world.grant("a")
    await world.add_worker("w2", ready=("r2",))
    again = await gateway.enqueue(replace(make_job("a"), pin="r1", waited_s=1.0))
    assert again == first
    assert await gateway.refused(MODEL, "a", first.nonce, hold_s=0.1)
    assert world.received["g1"] == []
    audit(world.client)


async def test_a_pinned_job_waits_for_its_revision_and_not_for_ever(world: QueueWorld) -> None:
    """A worker that was lost may return within the failover wait; then the job ends."""
    grant = await world.grant("a")
    await world.routes.remove_worker(MODEL, "w1", 1)
    await world.gateway().requeue(MODEL, "a", grant.nonce, pin=grant.revision)
    for seconds, lost in ((14.0, set()), (2.0, {"a"})):
        world.advance(seconds)
        await world.gateway().reap(MODEL)
        assert (await world.gateway().renew(MODEL, {}, frozenset("a"))).lost == lost


async def test_a_pinned_job_waits_while_any_worker_holds_its_revision(world: QueueWorld) -> None:
    """A worker that is draining, or busy for long, may still take it before its deadline."""
    grant = await world.grant("a")
    await world.add_worker(draining=True)
    await world.gateway().requeue(MODEL, "a", grant.nonce, pin=grant.revision)
    world.advance(60)
    await world.gateway().reap(MODEL)
    assert await world.gateway().length(MODEL) == 1
    # The last one that held it may be on its way back, too.
    await world.routes.remove_worker(MODEL, "w1", 1)
    for seconds, left in ((14, 1), (2, 0)):
        world.advance(seconds)
        await world.gateway().reap(MODEL)
        assert await world.gateway().length(MODEL) == left


async def test_every_pinned_job_waits_as_long_for_a_worker_s_return(world: QueueWorld) -> None:
    """Also one that stood behind too many to be looked at while a worker held the revision."""
    names = [f"p{number}" for number in range(35)]
    await world.add_worker(draining=True)
    for name in names:
        await world.gateway().enqueue(replace(make_job(name), pin=REVISION))
    world.advance(60)
    await world.gateway().reap(MODEL)
    await world.routes.remove_worker(MODEL, "w1", 1)
    for name in names[:3]:
        await world.gateway().cancel(MODEL, name, f"submission-of-{name}")
    for seconds, left in ((14, 32), (2, 0)):
        world.advance(seconds)
        await world.gateway().reap(MODEL)
        assert await world.gateway().length(MODEL) == left


async def test_a_retry_avoids_its_worker_beyond_the_suspicion(world: QueueWorld) -> None:
    """With both workers free, the job goes to the one where it has not failed."""
    await world.add_worker("w2")
    first, other = await world.grant("a"), await world.grant("b")
    assert (first.worker_id, other.worker_id) == ("w1", "w2")
    await world.gateway().requeue(MODEL, "a", first.nonce)
    world.advance(1)
    await world.finish(other)
    (second,) = world.received["g1"]
    assert second.worker_id == "w2"


async def test_a_retry_prefers_another_worker(world: QueueWorld) -> None:
    """The worker where the job failed is taken again only if there is no other."""
    await world.add_worker("w2", slots=8)
    grants = [await world.grant(name) for name in "ab"]
    failed = next(grant for grant in grants if grant.worker_id == "w1")
    await world.gateway().requeue(MODEL, failed.job_id, failed.nonce)
    (retried,) = world.received["g1"]
    assert retried.worker_id == "w2"


async def test_a_worker_that_failed_gets_no_job_for_a_moment(world: QueueWorld) -> None:
    """A dead worker that the controller has not missed yet does not use up the attempts of all who wait."""
    grant = await world.grant("a")
    await world.gateway().requeue(MODEL, "a", grant.nonce)
    await world.wait("b")
    world.advance(0.5)
    await world.wait("c")
    world.advance(0.5)
    await world.gateway().reap(MODEL)
    assert [granted.job_id for granted in world.received["g1"]] == ["a"]


async def test_a_suspicion_is_not_shortened_by_another(empty_world: QueueWorld) -> None:
    """A worker fails one job and refuses another one a moment later: it is left alone for 0.8 s."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=2)
    first, second = [await empty_world.grant(name) for name in "ab"]
    await empty_world.gateway().requeue(MODEL, "a", first.nonce)
    await empty_world.gateway().refused(MODEL, "b", second.nonce, hold_s=0.01)
    for seconds, running in ((0.1, set()), (1.0, {"a", "b"})):
        empty_world.advance(seconds)
        await empty_world.gateway().reap(MODEL)
        assert empty_world.running() == running


@pytest.mark.parametrize("reaps", [True, False])
async def test_a_hold_ends_also_where_nobody_waits_for_it(world: QueueWorld, *, reaps: bool) -> None:
    """The only job is cancelled within the hold; whoever comes a minute later finds the worker."""
    grant = await world.grant("a")
    await world.gateway().requeue(MODEL, "a", grant.nonce)
    await world.gateway().cancel(MODEL, "a", "submission-of-a")
    world.advance(1)
    if reaps:
        await world.gateway().reap(MODEL)
        assert world.client.zrange(KEYS.prefix + "takers", 0, -1) == ["w1"]
    # What ends by itself has ended by then.
    if world.client.pttl(KEYS.prefix + "held") >= 0:
        world.client.delete(KEYS.prefix + "held")
    assert (await world.grant("b")).worker_id == "w1"


async def test_a_worker_that_returns_as_a_new_process_is_not_suspect(world: QueueWorld) -> None:
    """A new incarnation starts clean; the same one does not."""
    grant = await world.grant("a")
    await world.gateway().requeue(MODEL, "a", grant.nonce)
    await world.add_worker(incarnation="i1")
    await world.wait("b")
    await world.add_worker(incarnation="i2")
    await world.wait("c")
    assert [granted.job_id for granted in world.received["g1"]] == ["a"]


async def test_a_grant_for_another_gateway_reaches_it_by_message(world: QueueWorld) -> None:
    """The gateway that settles publishes; the one that owns the job hears, and nobody else."""
    heard = asyncio.Event()
    listener = world.gateway("g2")

    def hear(grant: Grant) -> None:
        world.received["g2"].append(grant)
        heard.set()

    listener.on_grant(hear)
    await listener.start()
    await listener.wait_subscribed()
    running = await world.grant("a")
    await world.wait("b", gateway="g2")
    await world.finish(running)
    await asyncio.wait_for(heard.wait(), 5)
    renewal = await listener.renew(MODEL, {}, frozenset("b"))
    assert renewal.granted == tuple(world.received["g2"])
    assert world.received["g1"] == []


async def test_a_message_that_cannot_be_read_ends_no_subscription(world: QueueWorld) -> None:
    """Of a gateway that is newer, or of nobody's: what comes behind it is heard, and it is logged."""
    heard = asyncio.Event()
    listener = world.gateway("g2")
    listener.on_grant(lambda _: heard.set())
    await listener.start()
    await listener.wait_subscribed()
    newer = json.dumps({"kind": "new", "job_id": "a", "prefix": KEYS.prefix})
    with capture_logs() as lines:
        for message in (newer, newer, "no JSON", "[]"):
            assert world.client.publish(gateway_channel("g2"), message) == 1
        running = await world.grant("a")
        await world.wait("b", gateway="g2")
        await world.finish(running)
        await asyncio.wait_for(heard.wait(), 5)
    dropped = [line["kind"] for line in lines if line["event"] == "message.dropped"]
    assert dropped == ["ValueError", "JSONDecodeError", "TypeError"]


async def test_one_call_grants_many_slots(empty_world: QueueWorld) -> None:
    """When a large worker arrives, the next call of anyone fills it."""
    await empty_world.set_route()
    for number in range(40):
        await empty_world.wait(f"j{number}")
    await empty_world.add_worker(slots=32)
    await empty_world.gateway().renew(MODEL, {}, frozenset())
    assert len(empty_world.running()) == 32


async def test_enqueue_hands_grants_of_other_jobs_to_the_receiver(empty_world: QueueWorld) -> None:
    """What the call grants besides its own job is not lost."""
    await empty_world.set_route()
    await empty_world.wait("a")
    await empty_world.add_worker(slots=2)
    answer = await empty_world.gateway().enqueue(make_job("b"))
    assert isinstance(answer, Grant)
    assert (answer.job_id, answer.revision) == ("b", REVISION)
    assert [grant.job_id for grant in empty_world.received["g1"]] == ["a"]
