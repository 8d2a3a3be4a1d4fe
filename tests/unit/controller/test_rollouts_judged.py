"""Rollouts that are judged by what gateways count: members in memory, and a clock that stands still."""

from __future__ import annotations

import pytest

from services.common.ttft_buckets import BUCKETS, bucket_of
from services.controller.coordinator.judge import PROVE_EVERY_S
from services.controller.core.commands import SendProve
from services.controller.core.judgement import Tally
from services.controller.core.member import Load, LoadReport, Proven
from services.controller.core.rollout_events import Promoted
from services.controller.core.rollout_record import State, Strategy
from tests.fixtures.rollout_world import World

BACK = [State.BAKING, State.ROLLING_BACK, State.ROLLED_BACK]


class Gateway:
    """A gateway that is attached, and reports what the test lets it count."""

    def __init__(self, world: World, name: str = "g", process: str = "p1") -> None:
        self._world, self._name = world, name
        self._counts: dict[str, Tally] = {}
        world.attach_gateway(name, process)
        self.report()

    def count(self, revision: str, *, finished: int = 0, failed: int = 0, ttft_s: float = 0.1) -> None:
        """Counts some more, and reports all."""
        ttft = [0] * BUCKETS
        ttft[bucket_of(ttft_s)] = finished
        before = self._counts.get(revision, Tally())
        self._counts[revision] = before.plus(Tally(finished, failed, tuple(ttft)))
        self.report()

    def report(self) -> None:
        """Its sign of life."""
        report = LoadReport(Load(), {"m": dict(self._counts), "another": {self._world.new: Tally(0, 99)}})
        self._world.coordinator.hear(self._world.key(self._name), self._world.workers[self._name], report)


@pytest.fixture
async def world() -> World:
    """Two workers that serve the old revision."""
    world = World()
    await world.settle()
    world.attach("a")
    world.attach("b")
    await world.settle()
    return world


@pytest.fixture
async def gateway(world: World) -> Gateway:
    """A gateway beside them, with a good hundred answers of the old revision."""
    gateway = Gateway(world)
    await world.settle(1)
    gateway.count(world.old, finished=120)
    return gateway


async def test_one_that_forgets_its_golden_prompts_goes_back(world: World, gateway: Gateway) -> None:
    """Workers ask them again while it is judged; one whose answer falls short is enough, and is the cause."""
    world.answers = {world.new: ""}
    await world.start(bake_s=600.0)
    await world.settle(5)
    assert not any(isinstance(command, SendProve) for _, command in world.told)
    await world.settle(2 * PROVE_EVERY_S)
    asked = [one for one in world.told if isinstance(one[1], SendProve)]
    assert asked[:2] == [("a", SendProve(world.new)), ("b", SendProve(world.new))]
    assert len(asked) == 4
    assert world.rollout.state is State.BAKING
    gateway.count(world.new, finished=200)
    world.answers[world.new] = "Golden prompt 1 of 1: its answer does not contain what it must."
    await world.settle(PROVE_EVERY_S)
    assert world.states[-3:] == BACK
    cause = world.rollout.history[-2].cause
    assert cause == "a: Golden prompt 1 of 1: its answer does not contain what it must."


async def test_golden_prompts_count_for_the_rollout_that_asked(world: World) -> None:
    """What is said of another revision, or comes late, is nobody's verdict."""
    stream = world.workers["a"]
    world.coordinator.hear(world.key("a"), stream, Proven(world.new, "late, of an earlier rollout"))
    await world.start(bake_s=60.0)
    await world.settle(1)
    assert world.rollout.state is State.BAKING
    world.coordinator.hear(world.key("a"), stream, Proven(world.old, "of the old one"))
    await world.settle(2)
    assert world.rollout.state is State.BAKING


async def test_one_that_turns_bad_after_the_switch_goes_back(world: World, gateway: Gateway) -> None:
    """By itself, well within the time, and watchers read why."""
    await world.start(bake_s=60.0)
    await world.settle(2)
    gateway.count(world.new, finished=30)
    await world.settle(2)
    assert world.rollout.state is State.BAKING
    gateway.count(world.new, finished=10, failed=20)
    await world.settle(2)
    assert world.states[-3:] == BACK
    assert world.rollout.history[-2].cause == "20 of 60 attempts failed."
    assert world.route == {world.old: 100}
    assert world.held["a"] == world.held["b"] == {world.old}


async def test_a_good_canary_promotes_itself(world: World, gateway: Gateway) -> None:
    """At the end of its time it gets everything, and the cause says what was found."""
    await world.start(canary_percent=10, bake_s=20.0)
    await world.settle(2)
    gateway.count(world.new, finished=60, ttft_s=0.11)
    gateway.count(world.old, finished=500)
    await world.settle(16)
    assert world.route == {world.new: 10, world.old: 90}
    await world.settle(4)
    assert world.rollout.state is State.COMPLETED
    assert world.route == {world.new: 100}
    assert world.rollout.history[-1].cause.startswith("It serves for good. 60 attempts, 0 failed, first")


@pytest.mark.parametrize("strategy", [Strategy.SIDE_BY_SIDE, Strategy.SWAP])
async def test_a_bad_canary_rolls_itself_back(world: World, gateway: Gateway, strategy: Strategy) -> None:
    """By the failures of its share alone; where it was swapped in, the old one is loaded again."""
    await world.start(canary_percent=10, bake_s=60.0, strategy=strategy)
    await world.settle(2)
    gateway.count(world.old, finished=199, failed=1)
    gateway.count(world.new, finished=5, failed=5)
    await world.settle(3)
    assert world.states[-3:] == BACK
    assert world.rollout.history[-2].cause == "5 of 10 attempts failed, of the old one's 0.5%."
    assert world.route == {world.old: 100}
    assert world.held["a"] == world.held["b"] == {world.old}


async def test_a_canary_is_compared_with_the_same_time(world: World, gateway: Gateway) -> None:
    """The load has risen for both, so being slower than before is not its fault."""
    await world.start(canary_percent=50, bake_s=30.0)
    await world.settle(1)
    gateway.count(world.old, finished=120, ttft_s=2.0)
    gateway.count(world.new, finished=120, ttft_s=2.5)
    await world.settle(31)
    assert world.rollout.state is State.COMPLETED


async def test_slow_first_tokens_after_the_switch(world: World, gateway: Gateway) -> None:
    """They are compared with what the old revision did before; not at once, as caches are cold."""
    await world.start(bake_s=60.0)
    await world.settle(1)
    gateway.count(world.new, finished=100, ttft_s=2.0)
    await world.settle(8)
    assert world.rollout.state is State.BAKING
    await world.settle(4)
    assert world.states[-3:] == BACK
    assert world.rollout.history[-2].cause == "First tokens take 2.5 s (p50), the old one's took 0.11 s."


async def test_nobody_asks(world: World) -> None:
    """Without a word against it, it stays; the cause says that there was little to judge by."""
    gateway = Gateway(world)
    await world.settle(1)
    await world.start(bake_s=5.0)
    await world.settle()
    gateway.count(world.new, failed=2)
    await world.settle(7)
    assert world.rollout.state is State.COMPLETED
    assert (
        world.rollout.history[-1].cause == "It serves for good. 2 attempts, 2 failed: too few to judge it by."
    )


async def test_an_operator_is_faster(world: World, gateway: Gateway) -> None:
    """Promoted, it is over: what fails later rolls nothing back."""
    await world.start(canary_percent=10, bake_s=600.0)
    await world.settle(2)
    await world.coordinator.tell_rollout("r", Promoted())
    await world.settle()
    gateway.count(world.new, failed=50)
    await world.settle(2)
    assert world.rollout.state is State.COMPLETED
    assert world.route == {world.new: 100}


async def test_what_was_counted_earlier_is_not_held_against_it(world: World, gateway: Gateway) -> None:
    """A revision that was bad once is judged by what it does now."""
    gateway.count(world.new, failed=50)
    await world.start(bake_s=5.0)
    await world.settle(7)
    assert world.rollout.state is State.COMPLETED


async def test_two_gateways_and_one_that_restarts(world: World, gateway: Gateway) -> None:
    """Counts of all add up; a new process begins at its first word, and the old one's counts stay."""
    other = Gateway(world, "h")
    await world.settle(1)
    await world.start(bake_s=60.0)
    await world.settle(2)
    gateway.count(world.new, finished=20, failed=2)
    other.count(world.new, finished=20, failed=2)
    await world.settle(1)
    assert world.rollout.state is State.BAKING
    again = Gateway(world, "h", "p2")
    await world.settle(1)
    again.count(world.new, finished=10, failed=1)
    gateway.report()
    await world.settle(2)
    assert world.rollout.history[-2].cause == "5 of 55 attempts failed."


async def test_the_next_controller_judges_by_what_it_hears(world: World) -> None:
    """What a gateway counted before may be old; what it counts from then on is not."""
    await world.start(bake_s=60.0)
    await world.settle(2)
    later = World(world.store, world.records)
    later.clock.seconds = world.clock.seconds
    await later.settle()
    for name in "ab":
        later.attach(name)
    await later.settle()
    heir = Gateway(later)
    heir.count(later.new, finished=10)
    await later.settle(2)
    assert later.rollout.state is State.BAKING
    heir.count(later.new, failed=10)
    await later.settle(2)
    assert later.states[-3:] == BACK
    assert later.rollout.history[-2].cause == "10 of 20 attempts failed."


async def test_the_spec_says_how_much_worse_it_may_be(world: World, gateway: Gateway) -> None:
    """One that is slower on purpose, and fails as often as was expected, stays."""
    await world.start(bake_s=20.0, failed_percent_max=50, ttft_ratio_max=0)
    await world.settle(1)
    gateway.count(world.new, finished=100, failed=90, ttft_s=5.0)
    await world.settle(21)
    assert world.rollout.state is State.COMPLETED
