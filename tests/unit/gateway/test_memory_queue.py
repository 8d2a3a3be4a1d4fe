"""The queue in memory: the rules that it shares with the one in Redis are compared there, step by step."""

from __future__ import annotations

import pytest

from services.common.errors import DeadlineExceeded, QueueFull, RequestExists
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker

MODEL = "m"


class SteppedClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.seconds

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.seconds


def make_job(
    job_id: str,
    *,
    tenant: str = "tenant",
    band: Band = Band.INTERACTIVE,
    submission: str = "",
    timeout_s: float = 60.0,
    waited_s: float = 0.0,
    slots: int = 1,
    cost: int = 10,
) -> QueuedJob:
    """A job with plain values."""
    name = submission or job_id
    return QueuedJob(job_id, MODEL, tenant, band, cost, timeout_s, name, waited_s, slots=slots)


@pytest.fixture
def clock() -> SteppedClock:
    """The queue's clock."""
    return SteppedClock()


@pytest.fixture
def received() -> list[Grant]:
    """What the receiver heard."""
    return []


@pytest.fixture
def queue(clock: SteppedClock, received: list[Grant]) -> MemoryJobQueue:
    """A queue with one worker of one slot, and room for two jobs that wait."""
    queue = MemoryJobQueue(clock, QueueLimits(waiting_jobs_max=2))
    queue.on_grant(received.append)
    queue.set_route(MODEL, 7, {"r1": 100})
    queue.set_worker(MODEL, QueueWorker("w1", "w1:1", 1, frozenset({"r1"})))
    return queue


async def enqueue_granted(queue: MemoryJobQueue, job_id: str) -> Grant:
    """Enqueues a job that gets a slot at once."""
    answer = await queue.enqueue(make_job(job_id))
    assert isinstance(answer, Grant)
    return answer


async def test_a_settled_slot_goes_to_the_job_that_waits(
    queue: MemoryJobQueue, received: list[Grant]
) -> None:
    """The receiver hears of the grant, which names worker, revision and epoch."""
    first = await enqueue_granted(queue, "a")
    assert await queue.enqueue(make_job("b")) == Waiting(0)
    await queue.settle(MODEL, "a", first.nonce, Outcome.FINISHED, 5)
    (second,) = received
    assert (second.job_id, second.worker_address, second.revision, second.epoch) == ("b", "w1:1", "r1", 7)
    assert await queue.length(MODEL) == 0


async def test_bounds_and_names_are_kept(queue: MemoryJobQueue) -> None:
    """A full queue refuses, a namesake is refused, and an ended submission does not run again."""
    first = await enqueue_granted(queue, "a")
    for job_id in "bc":
        await queue.enqueue(make_job(job_id))
    with pytest.raises(QueueFull):
        await queue.enqueue(make_job("d"))
    with pytest.raises(RequestExists):
        await queue.enqueue(make_job("a", submission="another"))
    await queue.settle(MODEL, "a", first.nonce, Outcome.FINISHED, 5)
    with pytest.raises(RequestExists):
        await queue.enqueue(make_job("a"))


async def test_a_job_expires_while_it_waits(queue: MemoryJobQueue, clock: SteppedClock) -> None:
    """The renewal reports it as lost, and a repeated submission hears why."""
    first = await enqueue_granted(queue, "a")
    await queue.enqueue(make_job("b", timeout_s=5.0))
    clock.seconds += 6
    renewal = await queue.renew(MODEL, {"a": first.nonce}, frozenset("b"))
    assert renewal.lost == {"b"}
    with pytest.raises(DeadlineExceeded):
        await queue.enqueue(make_job("b", timeout_s=5.0))


async def test_places_are_told_of_those_that_are_asked_for(queue: MemoryJobQueue) -> None:
    """All else that a renewal tells is of all."""
    first = await enqueue_granted(queue, "a")
    await queue.enqueue(make_job("b"))
    await queue.enqueue(make_job("c"))
    renewal = await queue.renew(MODEL, {"a": first.nonce}, frozenset("bcd"), places=frozenset("cde"))
    assert {job_id: place.position for job_id, place in renewal.waiting.items()} == {"c": 1}
    assert (renewal.lost, renewal.workers) == (frozenset("d"), 1)


async def test_a_failed_worker_is_left_alone_for_a_moment(
    queue: MemoryJobQueue, clock: SteppedClock, received: list[Grant]
) -> None:
    """A fenced attempt cannot put the job back; the current one can, at the cost of an attempt."""
    first = await enqueue_granted(queue, "a")
    assert not await queue.requeue(MODEL, "a", "another")
    assert await queue.requeue(MODEL, "a", first.nonce, pin=first.revision)
    assert await queue.requeue(MODEL, "a", first.nonce, pin=first.revision)
    assert received == []
    clock.seconds += 1
    (second,) = (await queue.renew(MODEL, {}, frozenset("a"))).granted
    assert second.attempt == 2


async def test_a_suspicion_is_not_shortened_by_another(
    queue: MemoryJobQueue, clock: SteppedClock, received: list[Grant]
) -> None:
    """A worker fails one job and refuses another one a moment later."""
    queue.set_worker(MODEL, QueueWorker("w1", "w1:1", 2, frozenset({"r1"})))
    first, second = [await enqueue_granted(queue, job_id) for job_id in "ab"]
    await queue.requeue(MODEL, "a", first.nonce)
    await queue.refused(MODEL, "b", second.nonce, hold_s=0.1)
    clock.seconds += 0.5
    await queue.reap(MODEL)
    assert received == []
    clock.seconds += 0.5
    await queue.reap(MODEL)
    assert [grant.job_id for grant in received] == ["a", "b"]


async def test_a_pinned_job_ends_when_nobody_can_continue_it(
    queue: MemoryJobQueue, clock: SteppedClock
) -> None:
    """It waits for the worker's return first."""
    first = await enqueue_granted(queue, "a")
    queue.remove_worker(MODEL, "w1")
    await queue.requeue(MODEL, "a", first.nonce, pin=first.revision)
    await queue.reap(MODEL)
    assert await queue.length(MODEL) == 1
    clock.seconds += 16
    await queue.reap(MODEL)
    assert await queue.length(MODEL) == 0


async def test_a_pinned_job_waits_for_a_worker_s_return_from_when_the_last_one_went(
    queue: MemoryJobQueue, clock: SteppedClock
) -> None:
    """It had waited for longer than that already, while another worker held its revision."""
    first = await enqueue_granted(queue, "a")
    queue.set_worker(MODEL, QueueWorker("w1", "w1:1", 1, frozenset({"r1"}), draining=True))
    await queue.requeue(MODEL, "a", first.nonce, pin=first.revision)
    for seconds, left in ((20, 1), (14, 1), (2, 0)):
        clock.seconds += seconds
        await queue.reap(MODEL)
        assert await queue.length(MODEL) == left
        queue.remove_worker(MODEL, "w1")


async def test_aged_jobs_keep_the_turn_of_their_band_and_their_order(
    clock: SteppedClock, received: list[Grant]
) -> None:
    """As in Redis: of eight grants one begins with INTERACTIVE, where one of `b` counts."""
    queue = MemoryJobQueue(clock)
    queue.on_grant(received.append)
    queue.set_route(MODEL, 7, {"r1": 100})
    queue.set_worker(MODEL, QueueWorker("w1", "w1:1", 1, frozenset({"r1"})))
    running = await enqueue_granted(queue, "running")
    for number in range(6):
        await queue.enqueue(make_job(f"b{number}", tenant="b", band=Band.BATCH, timeout_s=600.0))
        clock.seconds += 12
    for number in range(20):
        await queue.enqueue(make_job(f"s{number}", tenant="s", band=Band.SYSTEM))
        await queue.enqueue(make_job(f"i{number}", tenant=f"i{number % 4}"))
    received.append(running)
    for number in range(24):
        await queue.settle(MODEL, received[number].job_id, received[number].nonce, Outcome.FINISHED, 10)
    order = [grant.job_id for grant in received[1:24]]
    assert "".join(name[0] for name in order) == "ssb" + "sssb" + "sssi" + "sssb" + "sssi" + "sssb"
    assert [name for name in order if name.startswith("b")] == [f"b{number}" for number in range(4)]


@pytest.mark.parametrize("behind", [0, 1])
async def test_an_aged_job_keeps_the_turn_of_its_band_whatever_is_behind_it(
    clock: SteppedClock, received: list[Grant], behind: int
) -> None:
    """As in Redis: in INTERACTIVE its tenant, which runs a large request, comes behind all others."""
    queue = MemoryJobQueue(clock)
    queue.on_grant(received.append)
    queue.set_route(MODEL, 7, {"r1": 100})
    queue.set_worker(MODEL, QueueWorker("w1", "w1:1", 2, frozenset({"r1"})))
    await queue.enqueue(make_job("large", tenant="a", cost=8_000))
    running = await enqueue_granted(queue, "running")
    for number in range(1 + behind):
        await queue.enqueue(make_job(f"b{number}", tenant="a", band=Band.BATCH))
    for number in range(24):
        await queue.enqueue(make_job(f"i{number}", tenant=f"t{number % 8}"))
    clock.seconds += 31
    received.append(running)
    for number in range(8):
        await queue.settle(MODEL, received[number].job_id, received[number].nonce, Outcome.FINISHED, 10)
    assert "b0" in [grant.job_id for grant in received[1:]]


@pytest.mark.parametrize("end", ["cancel", "deadline", "reap"])
async def test_what_was_produced_before_a_loss_is_charged_however_the_job_ends(
    queue: MemoryJobQueue, clock: SteppedClock, end: str
) -> None:
    """As in Redis: the job waits for another worker when it ends."""
    first = await enqueue_granted(queue, "a")
    queue.remove_worker(MODEL, "w1")
    await queue.requeue(MODEL, "a", first.nonce, pin=first.revision, used_tokens=7)
    clock.seconds += {"cancel": 0, "deadline": 61, "reap": 16}[end]
    if end == "cancel":
        await queue.cancel(MODEL, "a", "a")
    else:
        await queue.reap(MODEL)
    usage = await queue.usage(MODEL, "tenant")
    assert (usage.used_tokens, usage.reserved_tokens) == (7, 0)


async def test_what_runs_already_can_be_registered(queue: MemoryJobQueue) -> None:
    """It takes its slot; another attempt of the same job does not."""
    grant = Grant("a", 2, "nonce", "w1", "w1:1", "r1", 7)
    assert await queue.register(make_job("a"), grant)
    assert await queue.enqueue(make_job("b")) == Waiting(0)
    assert not await queue.register(make_job("a"), Grant("a", 1, "older", "w1", "w1:1", "r1", 7))
    await queue.cancel(MODEL, "a", "a")
    assert not await queue.register(make_job("a"), grant)


async def test_workers_too_small_for_a_job_go_to_those_behind_it(
    queue: MemoryJobQueue, received: list[Grant]
) -> None:
    """The large one is kept for it, whoever's turn it is meanwhile."""
    queue.remove_worker(MODEL, "w1")
    for name, slots in (("big", 4), ("small", 2)):
        queue.set_worker(MODEL, QueueWorker(name, f"{name}:1", slots, frozenset({"r1"})))
    long = await enqueue_granted(queue, "long")
    assert long.worker_id == "big"
    assert isinstance(await queue.enqueue(make_job("quad", slots=4)), Waiting)
    assert [(await enqueue_granted(queue, job_id)).worker_id for job_id in "ab"] == ["small", "small"]
    assert isinstance(await queue.enqueue(make_job("c")), Waiting)
    await queue.settle(MODEL, "long", long.nonce, Outcome.FINISHED, 5)
    assert [(grant.job_id, grant.worker_id) for grant in received] == [("quad", "big")]
