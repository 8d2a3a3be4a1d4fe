"""The controller at work. Owns: the members, the route, and the order in which the store learns of both.

Decisions are the core's; this performs their effects. Members are heard at once and never wait for the
store: what the store shall hold is derived from the members, and one loop brings the store to it, again
and again. So an outage of the store costs nothing but time, and a lost write is written again.

Must not know: gRPC, Redis, protobuf.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace

from services.common import logs
from services.common.clock import Clock
from services.common.errors import Draining, NotLeader, RevisionInUse, RolloutRefused, StoreUnavailable
from services.common.threads import to_its_end
from services.controller.coordinator.conductor import Conductor, as_weights
from services.controller.coordinator.goals import Goals
from services.controller.coordinator.judge import Judge
from services.controller.coordinator.reunion import Reunion
from services.controller.coordinator.roster import Roster
from services.controller.coordinator.tenure import Tenure
from services.controller.coordinator.worker_records import MemberKey, WorkerRecords
from services.controller.core import membership, routing
from services.controller.core.catalog import Catalog
from services.controller.core.commands import SendLease
from services.controller.core.member import (
    DrainAsked,
    Event,
    Farewell,
    Goal,
    Hello,
    Kind,
    LoadReport,
    Member,
    Proven,
    Report,
    RetireAsked,
    StreamBroken,
    Tick,
)
from services.controller.core.ports import FenceStale, MemberStream, RolloutRecords, RouteStore
from services.controller.core.rollout_events import Event as RolloutEvent
from services.controller.core.rollout_events import Fleet
from services.controller.core.rollout_record import Rollout, Spec, State, Strategy
from services.controller.core.routing import Plan

# Members report every second, and gateways look as often: a slower tick would delay both.
TICK_S = 1.0


class Coordinator:
    """Leads the members of one model.

    Args:
        catalog: The registered revisions; it has a default model.
        store: Where gateways read workers and route.
        records: Where rollouts outlive this process.
        clock: The time.
        tenure: By which we lead.
        lease_ttl_s: How long a member may be silent.
        prepare_timeout_s: How long one preparation may take.

    Attributes:
        rollouts: The rollouts of the model.
        reunion: The members' return after a change of controllers.
        changed: Set when the store may not be what it shall be.
        store_lost: Whether it could not be reached when we last tried.
        led: Set once the store knows us as the controller.
        deposed: Set once another controller has taken over; nothing is written from then on.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: RouteStore,
        records: RolloutRecords,
        clock: Clock,
        tenure: Tenure,
        *,
        lease_ttl_s: float,
        prepare_timeout_s: float,
    ) -> None:
        self._model = catalog.default_model()
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._tenure = tenure
        self._rules = membership.Rules(lease_ttl_s, prepare_timeout_s, tenure.fence)
        self._judge = Judge(clock)
        self.rollouts = Conductor(self._model, catalog, records, clock)
        self._goals = Goals(self._model, catalog, self.rollouts, store)
        self._plan: Plan | None = None
        # The epoch of the route that the store is known to hold; members hear of no later one.
        self._stored_epoch = 0
        self._plan_stored = False
        self._records = WorkerRecords(self._model, store)
        self.changed = asyncio.Event()
        self._roster = Roster(self._model, clock, self._mark)
        self.reunion = Reunion(self._model, store, clock, lease_ttl_s, self._roster.members, self._mark)
        self.led = asyncio.Event()
        self.deposed = asyncio.Event()
        self.store_lost = False

    @property
    def plan(self) -> Plan | None:
        """What the route shall be; None until the store was read."""
        return self._plan

    def members(self, kind: Kind) -> tuple[Member, ...]:
        """The members of a kind, by id; those that were lost lately included."""
        return self._roster.of(kind)

    def attach(self, hello: Hello, stream: MemberStream) -> MemberKey:
        """Takes a member in; a stream of the same member before it ends.

        Raises:
            StoreUnavailable: We do not lead yet: the store was not reached.
            NotLeader: Another controller leads.
            Draining: There are too many members.
        """
        key = MemberKey(hello.kind, hello.id)
        plan = self._led_plan()
        if not self._roster.has_room(key):
            raise Draining("The controller has as many members as it can lead.")
        self._learn(plan, hello)
        self._roster.take_in(hello, stream)
        self._advance(key, hello)
        return key

    def hear(self, key: MemberKey, stream: MemberStream, report: Report | Proven) -> None:
        """Takes in what a member said; nothing that came by a replaced stream.

        Raises:
            EventIllegal: It cannot follow what the member said before.
        """
        if not self._roster.is_current(key, stream):
            return
        if isinstance(report, Proven):
            self._judge.hear_proof(key.id, report.revision, report.reason)
            self.changed.set()
            return
        if isinstance(report, LoadReport) and key.kind is Kind.GATEWAY:
            incarnation = self._roster.members[key].incarnation
            self._judge.hear(key.id, incarnation, report.tallies.get(self._model, {}))
        self._advance(key, report)
        if isinstance(report, LoadReport) and not self.deposed.is_set():
            # The member's proof that we are alive: the connection to a stopped process stays open.
            stream.send(SendLease(self._rules.lease_ttl_s, self._rules.fence))

    def detach(self, key: MemberKey, stream: MemberStream, *, farewell: bool) -> None:
        """A stream has ended, with the member's goodbye or without."""
        if self._roster.is_current(key, stream):
            self._roster.drop_stream(key)
            self._advance(key, Farewell() if farewell else StreamBroken())

    def drain(self, worker_id: str, grace_s: float) -> Member:
        """Takes a worker out of service until its process is replaced.

        Raises:
            WorkerUnknown: No such worker is here.
        """
        key = self._roster.worker_key(worker_id)
        self._advance(key, DrainAsked(grace_s))
        return self._roster.members[key]

    async def start_rollout(self, rollout_id: str, spec: Spec) -> Rollout:
        """Puts a rollout on record; it begins at once.

        Raises:
            StoreUnavailable: We do not lead, or it cannot be recorded now.
            ArgumentInvalid, ModelUnknown, RevisionInUse, RevisionUnknown, RolloutConflict: See `Conductor`.
        """
        with self._led_on():
            made = await self.rollouts.create(rollout_id, spec, self._led_plan)
        self.changed.set()
        return made

    def check_unused(self, model: str, revision: str) -> None:
        """Raises RevisionInUse for a revision that serves, is in a rollout, or is inside a worker."""
        plan = self._led_plan()
        held = {name for member in self.members(Kind.WORKER) for name in member.residents}
        used = {*self.rollouts.named, *plan.weights, plan.wanted, *held, *self._goals.awaited}
        if model == self._model and revision in used:
            raise RevisionInUse(f"The revision {revision} serves, or is in a rollout.")

    async def tell_rollout(self, rollout_id: str, event: RolloutEvent) -> Rollout:
        """Takes in what an operator wants of a rollout.

        Raises:
            RolloutRefused: It cannot be done where the rollout is.
            RolloutUnknown: No rollout has this id.
        """
        known = self.rollouts.find(rollout_id)
        if known.ended:
            raise RolloutRefused(f"The rollout is over: it is {known.state}.")
        self._led_plan()
        with self._led_on():
            # What is on record is obeyed, also where whoever asked for it has left meanwhile.
            return await to_its_end(self._tell(rollout_id, event, known))

    def close(self, reason: str) -> None:
        """Ends every stream; the members attach again, here or elsewhere."""
        self._roster.end_all(reason)

    def tick(self) -> None:
        """Judges leases and deadlines; once a second."""
        self._judge.look()
        if (rollout := self.rollouts.current) is not None and self._judge.asks(rollout):
            self._roster.prove(rollout.spec.revision)
        for key, event in self._roster.tick(self._rules.lease_ttl_s, judging=not self._tenure.doubtful):
            self._advance(key, event)
        if reason := self._tenure.over:
            self._step_down(reason)

    async def keep_store(self, *, renew: bool = True) -> None:
        """Brings the store to what the members are; with `renew` every lease is written too."""
        if self.deposed.is_set():
            return
        try:
            await self._keep_lead()
            await self._keep_route()
            await self._records.keep(self._roster.members, self._tenure.fence, renew=renew)
            if await self._goals.look(self._roster.members.values()):
                self._tell_goal()
            await self._retire()
            if self.reunion.is_over():
                await self._follow()
        except StoreUnavailable as error:
            if not self.store_lost:
                logs.get_logger().warning("store.lost", model=self._model, reason=error.message)
            self.store_lost = True
        except FenceStale:
            self._step_down("Another controller leads.")
        else:
            if self.store_lost:
                logs.get_logger().info("store.recovered", model=self._model)
            self.store_lost = False

    def _led_plan(self) -> Plan:
        if self.deposed.is_set():
            raise NotLeader("Another controller leads.", retry_after_s=TICK_S)
        if self._plan is None or not self.led.is_set():
            raise StoreUnavailable("The controller has not reached its store yet.", retry_after_s=TICK_S)
        return self._plan

    def _learn(self, plan: Plan, hello: Hello) -> None:
        """Rises above every epoch and fence that a member has seen, whatever the store forgot."""
        if hello.fence > self._rules.fence:
            self._rules = replace(self._rules, fence=hello.fence + 1)
            self._plan_stored = False
        if hello.epoch > plan.serving_epoch:
            self._plan = routing.raised(plan, None, hello.epoch, self._now_ms())
            self._plan_stored = False

    def _advance(self, key: MemberKey, event: Event) -> None:
        goal = self._goal(self._roster.members[key])
        effects = self._roster.advance(key, event, goal, self._rules)
        if effects and (now := self._goal(self._roster.members[key])) != goal:
            # By swap a goal depends on what a worker has: what was unloaded makes room, and requests wait.
            effects += self._roster.advance(key, Tick(), now, self._rules)
        # A mere sign of life changes nothing, and looking at every member for each would cost their square.
        if (
            effects
            and self._plan is not None
            and self.rollouts.current is None
            and routing.may_switch(self._plan, self._roster.members.values())
        ):
            self._plan = routing.switch(self._plan)
            self._plan_stored = False
        if not self._plan_stored or (effects and self.rollouts.current is not None):
            self.changed.set()

    def _tell_goal(self) -> None:
        """Lets every member hear of a goal that has changed, now and not at the next tick."""
        for key in self._roster.attached:
            self._advance(key, Tick())

    def _goal(self, member: Member) -> Goal | None:
        return None if self._plan is None else self._goals.of(member, self._plan, self._stored_epoch)

    def _fleet(self, rollout: Rollout) -> Fleet:
        return self._goals.fleet(rollout, self._roster.members.values())

    async def _tell(self, rollout_id: str, event: RolloutEvent, known: Rollout) -> Rollout:
        # Those who have come back so far are not the fleet: one that is ready would stand for all.
        fleet = self._fleet(known) if self.reunion.is_over() else None
        after = await self.rollouts.tell(rollout_id, event, fleet)
        self._obey(after)
        return after

    async def _follow(self) -> None:
        """Lets the rollout that is under way see what is, and obeys it."""
        while (rollout := self.rollouts.current) is not None:
            assert self._plan is not None
            written = as_weights(self._plan.weights) if self._plan_stored else None
            if not await self.rollouts.observe(self._fleet(rollout), written, self._judge.verdict(rollout)):
                return
            self._obey(self.rollouts.find(rollout.id))

    def _obey(self, rollout: Rollout) -> None:
        """Brings plan and members to what a rollout says."""
        plan = self._plan
        assert plan is not None
        plan = replace(plan, wanted=rollout.spec.revision) if rollout.state is State.COMPLETED else plan
        if as_weights(plan.weights) != rollout.route:
            plan = routing.raised(replace(plan, weights=dict(rollout.route)), None, 0, self._now_ms())
            self._plan_stored = False
        self._plan = plan
        self._tell_goal()
        self.changed.set()

    async def _retire(self) -> None:
        """Takes from workers what nobody needs there any more; what runs on it ends first."""
        routed = (rollout := self.rollouts.current) is not None and rollout.strategy is Strategy.SWAP
        for key, revision in tuple(self._roster.unneeded(self._goal)):
            fence = self._tenure.fence
            spared = await self._store.unready(self._model, key.id, revision, fence, routed=routed)
            # Its stream may have broken meanwhile; then it is asked when it is back.
            if not spared or not self._roster.has_stream(key):
                continue
            goal = self._goal(self._roster.members[key])
            if goal is not None and revision in goal.holds:
                # It was asked for meanwhile: gateways are to see it again.
                self._mark(key.id)
            else:
                self._advance(key, RetireAsked(revision))

    async def _keep_lead(self) -> None:
        """Sees to it, before anything is written, that the lease bears our number and what we learned."""
        if not self.rollouts.loaded:
            await self._tenure.keep()
            self._rules = replace(self._rules, fence=await self.rollouts.load(self._tenure.fence))
        await self.reunion.begin(self.rollouts.swapping)
        if self._tenure.fence < self._rules.fence:
            await self._tenure.keep(self._rules.fence)

    @contextlib.contextmanager
    def _led_on(self) -> Iterator[None]:
        """Turns the discovery that another controller leads into an answer for the caller."""
        try:
            yield
        except FenceStale:
            self._step_down("Another controller leads.")
            raise NotLeader("Another controller leads; ask again.", retry_after_s=TICK_S) from None

    def _step_down(self, reason: str) -> None:
        """Ends our time: nothing is written from now on, and members look elsewhere."""
        if self.deposed.is_set():
            return
        self.deposed.set()
        logs.get_logger().error("controller.deposed", model=self._model, reason=reason)
        self.close(reason)

    async def _keep_route(self) -> None:
        """Reads the route, and writes it where it is not what it shall be."""
        stored = await self._store.read_route(self._model)
        if self._plan is None:
            wanted = self.rollouts.serving(self._catalog.wanted(self._model), stored)
            self._plan = routing.claim(wanted, stored, 0, self._now_ms())
            if self.rollouts.current is not None:
                self._obey(self.rollouts.current)
        plan, fence = self._plan, self._tenure.fence
        if routing.agrees(plan, fence, stored):
            # A write whose answer was lost counts as well.
            self._plan_stored, self._stored_epoch = True, plan.epoch
            self.led.set()
            return
        if stored is not None and stored.fence > fence:
            raise FenceStale
        if self._plan_stored:
            # It was there and is gone or altered: the store lost its memory. Workers are written again too.
            plan = self._plan = routing.raised(plan, stored, 0, self._now_ms())
            self._plan_stored = False
            self._records.mark(*(key.id for key in self._roster.members if key.kind is Kind.WORKER))
            self._tell_goal()
        if stored is None:
            # By the route gateways see that the store may be asked, so the workers stand there before it.
            await self._records.keep(self._roster.members, fence, renew=True)
        await self._store.write_route(self._model, plan.epoch, fence, plan.weights)
        self.led.set()
        # Members may have moved the plan on while we wrote; then it is written again.
        self._plan_stored = self._plan == plan and self._rules.fence == fence
        self._stored_epoch = plan.epoch
        self._tell_goal()
        logs.get_logger().info(
            "route.written", model=self._model, epoch=plan.epoch, fence=fence, weights=dict(plan.weights)
        )

    def _mark(self, *worker_ids: str) -> None:
        """These workers' records have changed."""
        self._records.mark(*worker_ids)
        self.changed.set()

    def _now_ms(self) -> int:
        return int(self._clock.now() * 1000)
