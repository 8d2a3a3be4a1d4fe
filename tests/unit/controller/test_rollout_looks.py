"""Rollouts whose workers answer when they like: what serves goes on serving, and a calm fleet brings an end.

Whatever the order of looks, answers, requests and an operator's words is: nobody unloads what requests run
on, a revision to which requests go is given up only beside another worker that has it or loads it, and
by swap no worker ever holds two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import RevisionInUse, RolloutConflict, RolloutRefused, RolloutUnknown
from services.controller.coordinator import TICK_S
from services.controller.core.commands import SendPrepare, SendRetire, SendStage
from services.controller.core.member import Failed, Kind
from services.controller.core.residency import Phase
from services.controller.core.rollout_events import Cancelled, Event, Paused, Promoted, Resumed, TakenBack
from services.controller.core.rollout_record import Spec, Strategy
from tests.fixtures.rollout_world import World
from tests.unit.controller.test_rollout_properties import EXAMPLES

# Stories of three workers take a hundred times as long as those of the table alone.
STORIES = max(EXAMPLES // 10, 50)
# A swap of three workers that all load, and the way back of it.
CALM_S = 200
HAD = frozenset({Phase.PREPARING, Phase.READY, Phase.ACTIVATING, Phase.ACTIVE})

Act = tuple[str, str | Event | None]

# How often each is drawn: most stories shall get as far as a swap that went back and is asked for again.
ACTS: list[Act] = [
    *[("settle", None)] * 5,
    *[("begin", None)] * 4,
    *[("look", None)] * 3,
    ("pass", None),
    *[(kind, name) for kind in ("grant", "grant", "end", "answer", "fail") for name in "ab"],
    *[("say", word) for word in (TakenBack(), TakenBack(), Cancelled(), Promoted(), Paused(), Resumed())],
]
stories = st.lists(st.sampled_from(ACTS), min_size=20, max_size=60)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """A story logs thousands of lines."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


class Story(World):
    """A world of which every act is checked, and every look."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._begun = 0
        self._checked: dict[str, int] = {}

    async def begin(self, workers: str) -> None:
        """Lets workers serve the old revision."""
        await self.settle()
        for name in workers:
            self.attach(name)
        await self.settle()

    async def do(self, act: Act) -> None:
        """Does one thing, and checks what workers were told."""
        kind, what = act
        match kind:
            case "look":
                await self.coordinator.keep_store()
            case "answer":
                self.deaf = set(self.workers) - {what}
                self._act()
            case "settle":
                self.deaf.clear()
                await self.settle()
            case "pass":
                self.clock.seconds += TICK_S
                await self.tenure.keep()
                self.coordinator.tick()
            case "grant":
                self._grant(str(what))
            case "end":
                self.store.running = {one for one in self.store.running if one[0] != what}
            case "fail":
                self._fail(str(what))
            case "begin":
                await self._begin()
            case _:
                assert what is not None
                assert not isinstance(what, str)
                with contextlib.suppress(RolloutRefused, RolloutUnknown):
                    await self.coordinator.tell_rollout(f"r{self._begun}", what)
        self._check()

    async def calm(self) -> None:
        """Lets everybody answer and every request end."""
        self.deaf.clear()
        self.store.running.clear()
        with contextlib.suppress(RolloutRefused, RolloutUnknown):
            await self.coordinator.tell_rollout(f"r{self._begun}", Resumed())
        for _ in range(CALM_S // 10):
            await self.settle(10)
            if self.coordinator.rollouts.current is None:
                break

    def _act(self) -> None:
        self._check()
        super()._act()

    async def _begin(self) -> None:
        assert self.coordinator.plan is not None
        other = self.old if self.coordinator.plan.wanted == self.new else self.new
        spec = Spec(model="m", revision=other, strategy=self._strategy, bake_s=2.0)
        with contextlib.suppress(RolloutConflict, RevisionInUse):
            await self.coordinator.start_rollout(f"r{self._begun + 1}", spec)
            self._begun += 1

    def _grant(self, name: str) -> None:
        """A request begins, as gateways let one."""
        record = self.store.workers.get(name)
        if record is not None and not record.draining:
            self.store.running |= {(name, one) for one in record.ready if self.route.get(one)}

    def _fail(self, name: str) -> None:
        """What it was told to load or fetch fails; nothing that it was told crosses its word."""
        stream = self.workers[name]
        if len(stream.sent) - self.heard[name] != 1:
            return
        match stream.sent[-1]:
            case SendPrepare(_, revision, _) | SendStage(_, revision, _) if revision not in self.held[name]:
                self.heard[name] += 1
                self.coordinator.hear(self.key(name), stream, Failed(revision, "load", "It is damaged."))

    def _check(self) -> None:
        for name, stream in self.workers.items():
            for command in stream.sent[self._checked.get(name, 0) :]:
                if isinstance(command, SendRetire):
                    assert (name, command.revision) not in self.store.running
                    assert self._is_spared(name, command.revision), (name, command, self.route)
            self._checked[name] = len(stream.sent)
        if self._strategy is Strategy.SWAP:
            assert all(len(held) <= 1 for held in self.held.values()), self.held

    def _is_spared(self, name: str, revision: str) -> bool:
        """Whether requests go elsewhere, or another worker has the revision or loads it."""
        others = [one for one in self.coordinator.members(Kind.WORKER) if one.id != name]
        had = any(revision in one.residents and one.residents[revision].phase in HAD for one in others)
        return had or not self.route.get(revision)


@settings(max_examples=STORIES, deadline=None)
@given(
    st.sampled_from([Strategy.SWAP, Strategy.SWAP, Strategy.SIDE_BY_SIDE]),
    st.sampled_from(["ab", "abc"]),
    stories,
)
def test_no_order_of_answers_takes_away_what_serves(
    strategy: Strategy, workers: str, story: list[Act]
) -> None:
    """And once everybody answers, all workers serve the one revision to which requests go."""

    async def play() -> None:
        world = Story(strategy)
        await world.begin(workers)
        for act in story:
            await world.do(act)
        await world.calm()
        assert world.coordinator.rollouts.current is None
        (serving,) = world.route
        assert world.held == {name: {serving} for name in workers}
        records = world.store.workers.values()
        assert {(one.worker_id, one.draining, one.ready) for one in records} == {
            (name, False, frozenset({serving})) for name in workers
        }

    asyncio.run(play())
