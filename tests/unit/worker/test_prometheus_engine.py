"""The worker's numbers: what the engine says of itself reaches a scrape."""

from __future__ import annotations

from types import MappingProxyType

from prometheus_client import CollectorRegistry, generate_latest

from services.worker.adapters.prometheus_engine import EngineCollector
from services.worker.core.revision import Phase, Residency
from services.worker.core.stepper import Pulse


def test_a_scrape_shows_the_moment_at_which_it_was_made() -> None:
    """Counters, gauges and one line a revision, with the values of now and not of the start."""
    residency, pulses = Residency(), [Pulse()]
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: pulses[-1], residency))
    residency.begin("demo", "abc")
    pulses.append(Pulse(7, 40, 3, 29, MappingProxyType({1: 2, 5: 1}), 2.5))
    shown = generate_latest(registry).decode().splitlines()
    assert "interlock_worker_steps_total 7.0" in shown
    assert "interlock_worker_step_seconds_total 2.5" in shown
    assert "interlock_worker_tokens_total 40.0" in shown
    assert "interlock_worker_running 3.0" in shown
    assert "interlock_worker_slots_free 29.0" in shown
    assert "interlock_worker_paused 3.0" in shown
    assert f'interlock_worker_revision{{phase="{Phase.FETCH.value}",revision="abc"}} 1.0' in shown
