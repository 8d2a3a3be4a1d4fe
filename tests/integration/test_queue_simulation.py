"""A simulation with faults: gateways that vanish and sleep, lost answers and messages, Redis emptied."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace

import pytest

from services.common.errors import InterlockError
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.core.jobs import Band, Grant, Outcome, QueuedJob, Waiting
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.queue_audit import audit, left_over
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job

WORKERS = {"w1": 2, "w2": 3}
TENANTS = (TenantLimits(), TenantLimits(concurrency=1, weight=3), TenantLimits(tokens_per_minute=2_000))
# Seeds and the steps of each; `make soak` adds one history of 10,000.
HISTORIES = [(seed, 120) for seed in range(20)]
if "INTERLOCK_SOAK_FACTOR" in os.environ:
    HISTORIES.append((1_000, 10_000))
# Long enough for every lease, hold, pin and silence to pass.
HEALING_S = 40


@dataclass
class Gateway:
    """What a gateway's dispatcher does with the queue, in its simplest honest form."""

    name: str
    queue: RedisJobQueue
    chance: random.Random
    waiting: dict[str, QueuedJob] = field(default_factory=dict)
    running: dict[str, tuple[QueuedJob, Grant]] = field(default_factory=dict)
    ends: dict[str, list[str]] = field(default_factory=dict)
    asleep: bool = False

    def hear(self, grant: Grant) -> None:
        """Starts the job, if it is one that waits; a grant is heard any number of times."""
        job = self.waiting.pop(grant.job_id, None)
        if job is not None:
            self.running[grant.job_id] = (job, grant)

    def end(self, job_id: str, how: str) -> None:
        """Tells the client."""
        self.waiting.pop(job_id, None)
        self.running.pop(job_id, None)
        self.ends.setdefault(job_id, []).append(how)

    def loses_answer(self) -> bool:
        """Whether this call's answer gets lost, so that it is made again."""
        return self.chance.random() < 0.2

    async def enqueue(self, job: QueuedJob) -> None:
        """Submits a job; one that is refused has ended."""
        self.waiting[job.job_id] = job
        try:
            if self.loses_answer():
                self.queue.on_grant(lambda _: None)
                await self.queue.enqueue(job)
            self.queue.on_grant(self.hear)
            answer = await self.queue.enqueue(job)
        except InterlockError as error:
            self.end(job.job_id, error.reason)
        else:
            if isinstance(answer, Grant):
                self.hear(answer)
            assert isinstance(answer, Grant | Waiting)

    async def finish_one(self) -> None:
        """A worker has ended a request."""
        if self.running:
            job_id = self.chance.choice(sorted(self.running))
            _, grant = self.running[job_id]
            self.end(job_id, "finished")
            for _ in range(1 + self.loses_answer()):
                await self.queue.settle(MODEL, job_id, grant.nonce, Outcome.FINISHED, 60)

    async def fail_one(self) -> None:
        """A worker has failed or refused a request."""
        if not self.running:
            return
        job_id = self.chance.choice(sorted(self.running))
        job, grant = self.running.pop(job_id)
        self.waiting[job_id] = job
        current = False
        pin, refused = self.chance.choice(("", grant.revision)), self.chance.random() < 0.5
        for _ in range(1 + self.loses_answer()):
            if refused:
                current = await self.queue.refused(MODEL, job_id, grant.nonce, hold_s=0.1)
            else:
                current = await self.queue.requeue(MODEL, job_id, grant.nonce, pin=pin)
        if not current and job_id not in self.running:
            self.end(job_id, "lost")

    async def cancel_one(self) -> None:
        """A client has gone."""
        if self.waiting:
            job_id = self.chance.choice(sorted(self.waiting))
            job = self.waiting[job_id]
            self.end(job_id, "cancelled")
            await self.queue.cancel(MODEL, job_id, job.submission)

    async def tick(self) -> None:
        """The second's renewal, the repair of what was lost, and the reaping of others."""
        fences = {job_id: grant.nonce for job_id, (_, grant) in self.running.items()}
        renewal = await self.queue.renew(MODEL, fences, frozenset(self.waiting))
        for grant in renewal.granted:
            self.hear(grant)
        for job_id in sorted(renewal.lost):
            await self.repair(job_id)
        await self.queue.reap(MODEL)

    async def repair(self, job_id: str) -> None:
        """Redis does not know this job as the gateway's: enters it again, or ends it."""
        if job_id in self.running:
            job, grant = self.running[job_id]
            if not await self.queue.register(job, grant):
                self.end(job_id, "lost")
        elif job_id in self.waiting:
            job = self.waiting[job_id]
            await self.enqueue(replace(job, waited_s=1.0))


@dataclass
class Simulation:
    """A mesh of gateways over one queue, driven by one seed."""

    world: QueueWorld
    chance: random.Random
    gateways: list[Gateway] = field(default_factory=list)
    born: int = 0
    flushed: bool = False

    def add_gateway(self) -> None:
        """A gateway joins under a name that nobody has had."""
        name = f"g{len(self.world.gateways)}"
        queue = self.world.gateway(name)
        gateway = Gateway(name, queue, self.chance)
        queue.on_grant(gateway.hear)
        self.gateways.append(gateway)

    async def submit(self) -> None:
        """A client comes."""
        self.born += 1
        number, band = self.chance.randrange(len(TENANTS)), self.chance.choice(list(Band))
        slots = self.chance.choice((1, 1, 2))
        job = make_job(f"j{self.born}", tenant=f"t{number}", band=band, limits=TENANTS[number], slots=slots)
        await self.awake().enqueue(job)

    def awake(self) -> Gateway:
        """One of the gateways that are not asleep."""
        return self.chance.choice([gateway for gateway in self.gateways if not gateway.asleep])

    async def step(self) -> None:
        """One thing happens."""
        verbs = (
            ["submit"] * 6 + ["finish"] * 4 + ["tick"] * 4 + ["fail", "cancel", "worker", "breaker", "fault"]
        )
        match self.chance.choice(verbs):
            case "submit":
                await self.submit()
            case "finish":
                await self.awake().finish_one()
            case "fail":
                await self.awake().fail_one()
            case "cancel":
                await self.awake().cancel_one()
            case "worker":
                await self.change_worker()
            case "breaker":
                await self.turn_breaker()
            case "fault":
                await self.break_something()
            case _:
                self.world.advance(self.chance.random())
                await self.awake().tick()

    async def change_worker(self) -> None:
        """A worker goes or comes."""
        name = self.chance.choice(sorted(WORKERS))
        if self.chance.random() < 0.5:
            await self.world.routes.remove_worker(MODEL, name, 1)
        else:
            await self.world.add_worker(name, slots=WORKERS[name])

    async def turn_breaker(self) -> None:
        """A gateway's breaker for a worker opens or closes."""
        queue, name = self.awake().queue, self.chance.choice(sorted(WORKERS))
        if self.chance.random() < 0.5:
            await queue.list_open(MODEL, name, self.chance.choice([1.0, 5.0]))
        else:
            await queue.list_closed(MODEL, name)
        # What is scheduled happens by the wall clock; here the renewals do it.
        await queue.close()

    async def break_something(self) -> None:
        """A gateway vanishes, sleeps or wakes; or Redis is emptied, and the controller writes again."""
        fault = self.chance.choice(["vanish", "sleep", "wake", "flush"])
        awake = [gateway for gateway in self.gateways if not gateway.asleep]
        if fault == "vanish" and len(awake) > 1:
            self.gateways.remove(self.chance.choice(awake))
            self.add_gateway()
        elif fault == "sleep" and len(awake) > 1:
            self.chance.choice(awake).asleep = True
            self.world.advance(self.chance.choice([1, 6]))
        elif fault == "wake":
            for gateway in self.gateways:
                gateway.asleep = False
        elif fault == "flush":
            self.flushed = True
            self.world.client.flushall()
            await self.build()

    async def build(self) -> None:
        """The controller writes the route and all workers."""
        await self.world.set_route()
        for name, slots in WORKERS.items():
            await self.world.add_worker(name, slots=slots)

    async def heal(self) -> None:
        """No more faults: every gateway ticks each second and finishes what it runs."""
        await self.build()
        for _ in range(HEALING_S):
            self.world.advance(1)
            for gateway in self.gateways:
                gateway.asleep = False
                await gateway.tick()
                while gateway.running:
                    await gateway.finish_one()

    def check_slots(self) -> None:
        """No worker has more jobs than slots. After a loss, registrations may exceed them for a while."""
        if not self.flushed:
            for name, slots in WORKERS.items():
                assert len(self.world.running(name)) <= slots

    def check_grants(self) -> None:
        """No job runs on two gateways that are awake."""
        running = [job for gateway in self.gateways if not gateway.asleep for job in gateway.running]
        assert len(running) == len(set(running))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "steps"), HISTORIES)
async def test_every_job_ends_once_whatever_fails(empty_world: QueueWorld, seed: int, steps: int) -> None:
    """After healing nothing waits, runs or is owned; every client was told one end; all books agree."""
    simulation = Simulation(empty_world, random.Random(seed))  # noqa: S311 - a history to repeat, no secret
    await simulation.build()
    for _ in range(3):
        simulation.add_gateway()
    for step in range(steps):
        await simulation.step()
        simulation.check_slots()
        simulation.check_grants()
        if step % 10 == 0:
            audit(empty_world.client)
    await simulation.heal()
    for gateway in simulation.gateways:
        assert not gateway.waiting
        assert not gateway.running
        assert all(len(ends) == 1 for ends in gateway.ends.values())
    assert sum(ends == ["finished"] for g in simulation.gateways for ends in g.ends.values()) > 0
    assert not audit(empty_world.client).live
    # Breakers of gateways that vanished go by themselves, and the others' as they are closed.
    empty_world.advance(61)
    for gateway in simulation.gateways:
        await gateway.queue.reap(MODEL)
        for name in WORKERS:
            await gateway.queue.list_closed(MODEL, name)
    assert not left_over(empty_world.client)
    assert not list(empty_world.client.scan_iter(f"{KEYS.prefix}open:*"))
