"""Swaps over the end of a time of leading."""

from __future__ import annotations

from services.controller.core.member import Hello, Kind, Ready
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_record import State, Strategy
from tests.fakes.controller_ports import FakeStream
from tests.fixtures.rollout_world import heir_of, pair


async def test_a_worker_that_loads_belongs_to_the_fleet() -> None:
    """It is not listed while it has nothing to serve; the one that serves already does not stand for both."""
    world = await pair()
    world.lazy = {"b"}
    await world.start(strategy=Strategy.SWAP, bake_s=1.0)
    await world.settle(5)
    assert (world.rollout.state, world.rollout.swapping) == (State.BAKING, ("a", "b"))
    assert "b" not in world.store.workers
    heir = heir_of(world)
    await heir.settle()
    heir.lazy = {"b"}
    for name, phase in (("a", Phase.ACTIVE), ("b", Phase.PREPARING)):
        await heir.settle(3)
        assert heir.rollout.state is State.BAKING
        stream = FakeStream()
        heir.workers[name], heir.heard[name], heir.held[name] = stream, 0, {world.new}
        residents = {world.new: Resident(phase)}
        heir.coordinator.attach(Hello(Kind.WORKER, name, "i0", "h:1", 8, (), residents), stream)
    await heir.settle(3)
    assert heir.rollout.state is State.BAKING
    heir.coordinator.hear(heir.key("b"), heir.workers["b"], Ready(world.new, 1))
    await heir.settle(2)
    assert heir.rollout.history[-1].state is State.COMPLETED
    assert heir.rollout.history[-1].cause.startswith("It serves for good.")


async def test_a_swap_goes_on_when_its_first_worker_left() -> None:
    """It drained for good before it served; nobody waits for it until the time to prepare is over."""
    world = await pair()
    world.store.running.add(("a", world.old))
    await world.start(strategy=Strategy.SWAP)
    await world.settle(2)
    assert list(world.rollout.swapping) == ["a"]
    world.kill("a")
    await world.settle(50)
    assert list(world.rollout.swapping) == ["a"]
    await world.settle(15)
    assert list(world.rollout.swapping) == ["a", "b"]
    await world.settle(10)
    assert world.rollout.history[-1].state is State.COMPLETED
