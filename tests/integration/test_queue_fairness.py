"""Fair shares over a real Redis and two gateways that hear one another, with simulated workers.

The workers' time is simulated: whichever grant is due first ends next, and its tenant sends another job.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import pytest

from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_world import MODEL, QueueWorld, make_job

SLOTS = 4
ESTIMATE = 300
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Sender:
    """A tenant that always has so many jobs under way."""

    jobs: int
    weight: int = 1
    band: Band = Band.INTERACTIVE


@dataclass
class Crowd:
    """Tenants that keep two gateways saturated.

    Attributes:
        tokens: What each tenant was served.
        answers: How many jobs of each ended.
    """

    gateways: list[RedisJobQueue]
    senders: Mapping[str, Sender]
    chance: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311 - no secret
    heard: asyncio.Queue[tuple[int, Grant]] = field(default_factory=asyncio.Queue)
    tokens: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    due: list[tuple[int, str, int, Grant, int]] = field(default_factory=list)
    born: int = 0
    now: int = 0

    async def submit(self, tenant: str) -> None:
        """A job comes to either gateway."""
        self.born += 1
        sender, at = self.senders[tenant], self.chance.randrange(len(self.gateways))
        limits = TenantLimits(weight=sender.weight)
        name = f"{tenant}/{self.born}"
        job = make_job(name, tenant=tenant, band=sender.band, cost=ESTIMATE, limits=limits)
        answer = await self.gateways[at].enqueue(job)
        if isinstance(answer, Grant):
            self.heard.put_nowait((at, answer))

    async def run(self, answers: int) -> None:
        """Serves until so many jobs have ended."""
        for at, gateway in enumerate(self.gateways):
            gateway.on_grant(lambda grant, at=at: self.heard.put_nowait((at, grant)))  # type: ignore[misc]
        for tenant, sender in self.senders.items():
            for _ in range(sender.jobs):
                await self.submit(tenant)
        async with asyncio.timeout(TIMEOUT_S):
            for _ in range(answers):
                await self.finish_next()

    async def finish_next(self) -> None:
        """The grant that is due first ends, mostly with fewer tokens than were estimated."""
        while len(self.due) < SLOTS:
            at, grant = await self.heard.get()
            used = self.chance.randint(20, ESTIMATE)
            heapq.heappush(self.due, (self.now + used, grant.job_id, at, grant, used))
        self.now, _, at, grant, used = heapq.heappop(self.due)
        tenant = grant.job_id.partition("/")[0]
        self.tokens[tenant] += used
        self.answers[tenant] += 1
        await self.gateways[at].settle(MODEL, grant.job_id, grant.nonce, Outcome.FINISHED, used)
        await self.submit(tenant)


@pytest.fixture
async def gateways(empty_world: QueueWorld) -> AsyncIterator[list[RedisJobQueue]]:
    """Two gateways that hear what is granted to them, and one worker."""
    await empty_world.set_route()
    await empty_world.add_worker(slots=SLOTS)
    queues = [empty_world.gateway(name) for name in ("g1", "g2")]
    for queue in queues:
        await queue.start()
        await queue.wait_subscribed()
    yield queues
    for queue in queues:
        await queue.close()


def jain(shares: list[int]) -> float:
    """Jain's index: 1 for equal shares, 1/n when one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


async def test_tokens_follow_the_weights_through_two_gateways(gateways: list[RedisJobQueue]) -> None:
    """Weight 1 and 3, both saturating: tokens as 1 : 3 within a tenth."""
    crowd = Crowd(gateways, {"one": Sender(jobs=12), "three": Sender(jobs=12, weight=3)})
    await crowd.run(600)
    assert crowd.tokens["three"] / crowd.tokens["one"] == pytest.approx(3, rel=0.1)


async def test_a_tenant_that_sends_ten_times_as_much_gets_no_more(gateways: list[RedisJobQueue]) -> None:
    """Jain's index over ten equal tenants is at least 0.95."""
    senders = {f"t{number}": Sender(jobs=2) for number in range(9)} | {"flood": Sender(jobs=20)}
    crowd = Crowd(gateways, senders)
    await crowd.run(600)
    assert len(crowd.tokens) == 10
    assert jain(list(crowd.tokens.values())) >= 0.95


async def test_no_band_starves(gateways: list[RedisJobQueue]) -> None:
    """Behind saturating SYSTEM work BATCH and INTERACTIVE have an eighth of the grants each."""
    senders = {
        "batch": Sender(jobs=6, band=Band.BATCH),
        "interactive": Sender(jobs=8),
        "system": Sender(jobs=8, band=Band.SYSTEM),
    }
    crowd = Crowd(gateways, senders)
    await crowd.run(320)
    assert crowd.answers["batch"] == pytest.approx(320 / 8, abs=5)
    assert crowd.answers["interactive"] == pytest.approx(320 / 8, abs=5)
