"""Redis comes back with all that it knew: what the gateway went on with meanwhile goes on there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from services.common.errors import RequestExists, StoreUnavailable
from services.common.redis_client import connect
from services.controller.adapters.redis_route import RedisRouteStore
from services.gateway.adapters.breakers import STORE_LIMITS
from services.gateway.adapters.fallback_queue import FallbackJobQueue
from services.gateway.adapters.pybreaker_circuit import Circuit
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.adapters.standby import FleetView, Standby
from services.gateway.core.events import Chunk, Finished, FinishReason
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.log import Appended, AppendOutcome, Claim, Entry, LogTail, log_bounds
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, REVISION, QueueWorld, make_job
from tests.fixtures.redis_server import RedisServer

BOUNDS = log_bounds(100, None)
DONE = Entry(Finished(FinishReason.STOP))


class ForgetfulQueue(RedisJobQueue):
    """A queue in Redis whose answers to `enqueue` may get lost."""

    loses_answers = False

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """See `JobQueue.enqueue`."""
        answer = await super().enqueue(job)
        if self.loses_answers:
            raise StoreUnavailable("no answer")
        return answer


@dataclass
class Home:
    """A gateway with a queue of its own besides a Redis of the test's own, and one worker of one slot."""

    world: QueueWorld
    clock: TurnedClock
    primary: ForgetfulQueue
    queue: FallbackJobQueue
    heard: list[Grant] = field(default_factory=list)

    def leave(self) -> None:
        """Redis takes no writes any more."""
        self.world.client.replicaof("127.0.0.1", 1)

    def come_back(self) -> None:
        """It takes them again, and has lost nothing; the next renewal finds it."""
        self.world.client.replicaof("NO", "ONE")
        self.clock.turn(5)

    async def renew(self, running: dict[str, str] | None = None, *waiting: str) -> frozenset[str]:
        """The second's renewal; returns what is lost."""
        return (await self.queue.renew(MODEL, running or {}, frozenset(waiting))).lost

    async def granted_alone(self, blocker: Grant, job_id: str) -> Grant:
        """The gateway's own queue ends a job that runs, and lends its slot to one that waits."""
        await self.queue.settle(MODEL, blocker.job_id, blocker.nonce, Outcome.FINISHED, 10)
        (grant,) = self.heard
        assert (grant.job_id, grant.degraded) == (job_id, True)
        return grant


def resumable(job_id: str) -> QueuedJob:
    """A job whose log another gateway could carry on."""
    return replace(make_job(job_id), digest="d", payload="p")


@pytest.fixture
async def home(redis_server: RedisServer) -> AsyncIterator[Home]:
    """All is well."""
    store, clock = connect(redis_server.url), TurnedClock()
    with redis_server.client() as client:
        world = QueueWorld(client, store, RedisRouteStore(store))
        await world.set_route()
        await world.add_worker()
        standby = Standby(clock, QueueLimits())
        worker = QueueWorker("w1", "w1:1", 1, frozenset({REVISION}))
        standby.remember(MODEL, FleetView(1, {REVISION: 100}, [worker], {"w1": "i1"}, 1))
        primary = ForgetfulQueue(store, "g1")
        queue = FallbackJobQueue(
            primary, standby, Circuit("store", STORE_LIMITS, clock, lambda _: None), clock
        )
        found = Home(world, clock, primary, queue)
        queue.on_grant(found.heard.append)
        yield found
        await primary.close()
        await world.clear()
        await store.close()


@pytest.mark.parametrize("known", ["waiting", "granted"])
async def test_a_resumable_job_goes_on_that_redis_knows_otherwise(home: Home, known: str) -> None:
    """It waited there, or had a slot of which nobody heard, as Redis left; it runs here when it returns."""
    if known == "waiting":
        blocker = await home.queue.enqueue(make_job("blocker"))
        assert isinstance(blocker, Grant)
        assert isinstance(await home.queue.enqueue(resumable("a")), Waiting)
        home.leave()
        assert await home.renew({"blocker": blocker.nonce}, "a") == frozenset()
        grant = await home.granted_alone(blocker, "a")
    else:
        home.primary.loses_answers = True
        answer = await home.queue.enqueue(resumable("a"))
        assert isinstance(answer, Grant)
        grant, home.primary.loses_answers = answer, False
        home.leave()
    assert home.queue.degraded
    home.come_back()
    assert await home.renew({"a": grant.nonce}) == frozenset()
    assert not home.queue.degraded
    assert home.world.client.hget(KEYS.job("a"), "nonce") == grant.nonce
    assert home.world.running() == {"a"}
    audit(home.world.client)
    assert await home.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10)


@pytest.mark.parametrize("end", ["meanwhile", "after"])
async def test_the_log_of_a_job_that_went_on_without_redis_becomes_whole(home: Home, end: str) -> None:
    """Redis has the text of its first worker; the slot of the second was lent here."""
    before = await home.queue.enqueue(resumable("a"))
    assert isinstance(before, Grant)
    log = RedisGenerationLog(home.world.store, "g1")
    first, second, last = (Entry(Chunk(at, "a", (7,))) for at in range(2)), Entry(Chunk(2, "b", (8,))), DONE
    await log.append(MODEL, "a", before.nonce, 0, tuple(first), BOUNDS)
    home.leave()
    await home.queue.requeue(MODEL, "a", before.nonce, pin=before.revision)
    home.clock.turn(2)
    (grant,) = (await home.queue.renew(MODEL, {}, frozenset("a"))).granted or home.heard
    assert grant.degraded
    if end == "meanwhile":
        await home.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10, LogTail(2, (second, last)))
    home.come_back()
    running = {"a": grant.nonce} if end == "after" else {}
    renewal = await home.queue.renew(MODEL, running, frozenset())
    assert (renewal.lost, renewal.degraded) == (frozenset(), False)
    if end == "after":
        written = await log.append(MODEL, "a", grant.nonce, 2, (second,), BOUNDS)
        assert written == Appended(AppendOutcome.WRITTEN, 3)
        await home.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 10, LogTail(3, (last,)))
    page = await log.read(MODEL, "a", 2)
    assert page is not None
    assert (page.entries, page.end, page.outcome) == ((second, last), 4, Outcome.FINISHED)
    home.world.client.delete(KEYS.prefix + "log:a", KEYS.job("a"))


async def test_redis_learns_what_a_tenant_used_without_it(home: Home) -> None:
    """A request began and ended here while it was away."""
    home.leave()
    await home.renew()
    grant = await home.queue.enqueue(make_job("a"))
    assert isinstance(grant, Grant)
    assert grant.degraded
    await home.queue.settle(MODEL, "a", grant.nonce, Outcome.FINISHED, 30)
    home.come_back()
    await home.renew()
    assert not home.queue.degraded
    assert (await home.primary.usage(MODEL, "tenant")).used_tokens == 30


async def test_a_gateway_comes_back_whose_job_another_one_took_over(home: Home) -> None:
    """It alone was cut off, and its job waits again: the renewal says that it is lost; all else goes on."""
    before = await home.queue.enqueue(resumable("a"))
    assert isinstance(before, Grant)
    home.leave()
    assert await home.renew({"a": before.nonce}) == frozenset()
    await home.queue.requeue(MODEL, "a", before.nonce, pin=before.revision)
    home.come_back()
    adopted: tuple[str, ...] = ()
    while not adopted:
        # More at once would count as a pause of Redis.
        home.world.advance(3)
        adopted = await home.world.gateway("g2").reap(MODEL)
    assert adopted == ("a",)
    assert await home.renew({}, "a") == {"a"}
    assert not home.queue.degraded
    with pytest.raises(RequestExists):
        await home.queue.enqueue(replace(resumable("a"), waited_s=1.0))
    assert isinstance(await home.queue.enqueue(make_job("b")), Waiting)


async def test_a_job_that_began_without_redis_has_its_id_once_redis_is_back(home: Home) -> None:
    """Nobody could be told before what the id stands for; another gateway finds the job by it."""
    home.leave()
    grant = await home.queue.enqueue(resumable("a"))
    assert isinstance(grant, Grant)
    assert grant.degraded
    home.come_back()
    assert await home.renew({"a": grant.nonce}) == frozenset()
    assert await RedisRequestDirectory(home.world.store).find("a") == Claim(MODEL, "d")
