"""The worker's numbers for Prometheus. Owns: which of them are shown, and their names.

They are read when somebody asks, from what the engine says of itself anyway: a step counts nothing for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.core.revision import Residency
from services.worker.core.stepper import Pulse


class EngineCollector(Collector):
    """Reads the engine at each scrape.

    Args:
        pulse: What the engine carries now.
        residency: What is resident; its phases are shown by revision.
    """

    def __init__(self, pulse: Callable[[], Pulse], residency: Residency) -> None:
        self._pulse = pulse
        self._residency = residency

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`."""
        pulse = self._pulse()
        yield CounterMetricFamily("interlock_worker_steps", "Forward passes.", pulse.steps)
        yield CounterMetricFamily(
            "interlock_worker_step_seconds", "Seconds that forward passes took.", pulse.step_s
        )
        yield CounterMetricFamily("interlock_worker_tokens", "Tokens generated.", pulse.generated_tokens)
        yield GaugeMetricFamily("interlock_worker_running", "Sequences that hold a slot.", pulse.running)
        yield GaugeMetricFamily(
            "interlock_worker_slots_free", "Sequences that could start.", pulse.free_slots
        )
        paused = sum(pulse.paused.values())
        yield GaugeMetricFamily("interlock_worker_paused", "Sequences that wait for credit.", paused)
        revisions = GaugeMetricFamily(
            "interlock_worker_revision", "1 for the phase of each revision.", labels=("revision", "phase")
        )
        for resident in self._residency.all:
            revisions.add_metric((resident.revision, resident.phase.value), 1)
        yield revisions
