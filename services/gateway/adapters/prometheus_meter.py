"""The gateway's numbers for Prometheus. Owns: their names, buckets and labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.adapters.breakers import BreakerReport
from services.gateway.core.attempts import AttemptEnd
from services.gateway.core.breaker import State
from services.gateway.core.events import Finished
from services.gateway.core.jobs import Outcome

# From an idle mesh to the longest deadline.
_WAIT_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 240)

REQUESTS = Counter("interlock_gateway_requests", "Requests that ended, by outcome.", ("model", "outcome"))
TOKENS = Counter("interlock_gateway_tokens", "Tokens of requests that finished, by kind.", ("model", "kind"))
QUEUE_SECONDS = Histogram(
    "interlock_gateway_queue_seconds",
    "Time from acceptance to the first grant.",
    ("model",),
    buckets=_WAIT_BUCKETS_S,
)
TTFT_SECONDS = Histogram(
    "interlock_gateway_ttft_seconds",
    "Time from acceptance to the first token.",
    ("model",),
    buckets=_WAIT_BUCKETS_S,
)
ATTEMPTS = Counter("interlock_gateway_attempts", "Attempts that ended, by how.", ("end",))


M = TypeVar("M", Counter, Histogram)


@functools.lru_cache(maxsize=4_096)
def _labelled(metric: M, *values: str) -> M:
    """One line of a metric. Asking the library for it takes longer than counting, several times a request."""
    return metric.labels(*values)


class PrometheusMeter:
    """`Meter` in this process's registry."""

    def request_ended(self, model: str, outcome: Outcome, finished: Finished | None) -> None:
        """See `Meter.request_ended`."""
        _labelled(REQUESTS, model, outcome.value).inc()
        if finished is not None:
            _labelled(QUEUE_SECONDS, model).observe(finished.timings.queue_s)
            _labelled(TOKENS, model, "prompt").inc(finished.usage.prompt_tokens)
            _labelled(TOKENS, model, "cached_prompt").inc(finished.usage.cached_prompt_tokens)
            _labelled(TOKENS, model, "completion").inc(finished.usage.completion_tokens)

    def first_token(self, model: str, ttft_s: float) -> None:
        """See `Meter.first_token`."""
        _labelled(TTFT_SECONDS, model).observe(ttft_s)

    def attempt_ended(self, end: AttemptEnd) -> None:
        """See `Meter.attempt_ended`."""
        _labelled(ATTEMPTS, end.value).inc()


class GatewayCollector(Collector):
    """Reads the gateway at each scrape.

    Args:
        live: Requests that have not ended.
        prompts_waiting: Prompts that wait for their turn to be tokenized.
        store_reachable: Whether the store answered when it was last asked.
        breakers: The state of each breaker.
    """

    def __init__(
        self,
        live: Callable[[], int],
        prompts_waiting: Callable[[], int],
        store_reachable: Callable[[], bool],
        breakers: Callable[[], Iterable[BreakerReport]],
    ) -> None:
        self._live = live
        self._prompts_waiting = prompts_waiting
        self._store_reachable = store_reachable
        self._breakers = breakers

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`."""
        yield GaugeMetricFamily("interlock_gateway_live", "Requests that have not ended.", self._live())
        yield GaugeMetricFamily(
            "interlock_gateway_prompts_waiting",
            "Prompts that wait for their turn to be tokenized.",
            self._prompts_waiting(),
        )
        reachable = float(self._store_reachable())
        yield GaugeMetricFamily("interlock_gateway_store_up", "1 while the store answers.", reachable)
        states = GaugeMetricFamily(
            "interlock_gateway_breaker", "1 for the state that a breaker is in.", labels=("target", "state")
        )
        for report in self._breakers():
            for state in State:
                states.add_metric((report.target, state.value), float(state is report.state))
        yield states
