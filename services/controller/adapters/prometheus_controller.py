"""The controller's numbers for Prometheus. Owns: which of them are shown, and their names.

They are read when somebody asks, from a thread of its own, and of what never changes in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.clock import Clock
from services.common.errors import InterlockError
from services.controller.core.member import Kind, Member
from services.controller.core.rollout_record import Rollout


class Kept(Protocol):
    """The rollouts of a controller."""

    @property
    def all(self) -> tuple[Rollout, ...]:
        """Those that are kept."""
        ...


class Led(Protocol):
    """What is read of a controller that leads."""

    def members(self, kind: Kind) -> tuple[Member, ...]:
        """Its members of a kind."""
        ...

    @property
    def rollouts(self) -> Kept:
        """Its rollouts."""
        ...


class ControllerCollector(Collector):
    """Reads the controller at each scrape.

    Args:
        led: Returns what is read, and raises an InterlockError while another controller leads.
        clock: The time.
    """

    def __init__(self, led: Callable[[], Led], clock: Clock) -> None:
        self._led = led
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`. One that stands by shows that it does, and nothing else."""
        try:
            led = self._led()
        except InterlockError:
            yield _leading(0)
            return
        yield _leading(1)
        members = GaugeMetricFamily(
            "interlock_controller_members",
            "Members, those that were lost lately included.",
            labels=("kind", "presence"),
        )
        for kind in Kind:
            for presence, count in Counter(one.presence for one in led.members(kind)).items():
                members.add_metric((kind.value, presence.value.lower()), count)
        yield members
        rollouts = GaugeMetricFamily(
            "interlock_controller_rollouts", "Rollouts on record, by state.", labels=("state",)
        )
        for state, count in Counter(one.state for one in led.rollouts.all).items():
            rollouts.add_metric((state.value,), count)
        yield rollouts
        yield GaugeMetricFamily(
            "interlock_controller_rollout_seconds",
            "Time since the rollout that is under way came into its state; 0: none is.",
            self._age_s(led.rollouts.all),
        )

    def _age_s(self, rollouts: tuple[Rollout, ...]) -> float:
        entered_ms = [one.history[-1].time_ms for one in rollouts if not one.ended]
        return max(0.0, self._clock.now() - entered_ms[0] / 1000) if entered_ms else 0.0


def _leading(value: float) -> Metric:
    return GaugeMetricFamily(
        "interlock_controller_leading", "1 where this controller leads, 0 where it stands by.", value
    )
