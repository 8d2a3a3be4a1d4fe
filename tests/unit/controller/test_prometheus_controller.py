"""What a controller shows of itself to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from services.common.errors import NotLeader
from services.controller.adapters.prometheus_controller import ControllerCollector, Led
from services.controller.core.rollout_record import State
from tests.fixtures.rollout_world import World


def shown(collector: ControllerCollector) -> str:
    """The page."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


async def test_what_a_leader_shows() -> None:
    """Members by kind and presence, rollouts by state, and for how long one has been where it is."""
    world = World()
    await world.settle()
    world.attach("a")
    world.attach("b")
    await world.settle()
    collector = ControllerCollector(lambda: world.coordinator, world.clock)
    assert "interlock_controller_rollout_seconds 0.0" in shown(collector)
    await world.start()
    await world.settle()
    assert world.rollout.state is State.BAKING
    world.clock.seconds += 2.5
    page = shown(collector)
    assert "interlock_controller_leading 1.0" in page
    assert 'interlock_controller_members{kind="worker",presence="attached"} 2.0' in page
    assert 'interlock_controller_rollouts{state="BAKING"} 1.0' in page
    assert "interlock_controller_rollout_seconds 2.5" in page


def test_what_a_standby_shows() -> None:
    """That it stands by; it knows nothing else."""

    def refused() -> Led:
        raise NotLeader("Another controller leads.")

    page = shown(ControllerCollector(refused, World().clock))
    assert "interlock_controller_leading 0.0" in page
    assert "members" not in page
