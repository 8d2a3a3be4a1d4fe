"""The standby. Owns: what was last known of route and workers, and the queue in memory made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from services.common.clock import Clock
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.queue_line import QueueWorker


@dataclass(frozen=True, slots=True)
class FleetView:
    """One model's route and workers, as the controller wrote them.

    Attributes:
        epoch: The route's epoch.
        weights: Weight by revision.
        workers: The workers that have a record.
        incarnations: By worker, the name of its process.
        gateways: How many gateways share the workers, and what tenants may take.
    """

    epoch: int
    weights: Mapping[str, int]
    workers: Sequence[QueueWorker]
    incarnations: Mapping[str, str]
    gateways: int


class Standby:
    """Remembers views, and makes queues of them.

    Args:
        clock: For the queues.
        limits: For the queues.
        activated: The revision that the controller told this gateway to serve last, and the epoch of the
            route; None: it told none. The controller reaches us also while the store does not.
        opened: The workers of a model whose breakers are open, and for how long still; None: they are held.
    """

    def __init__(
        self,
        clock: Clock,
        limits: QueueLimits,
        activated: Callable[[str], tuple[str, int] | None] = lambda _: None,
        opened: Callable[[str], Mapping[str, float | None]] = lambda _: {},
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._activated = activated
        self._opened = opened
        self._views: dict[str, FleetView] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models of which anything is known."""
        return tuple(self._views)

    def remember(self, model: str, view: FleetView) -> None:
        """Replaces what was known of a model; a view of nothing says that the store lost it."""
        if view.weights and view.workers:
            self._views[model] = view

    def serves(self, model: str) -> bool:
        """Whether enough is known to lend slots for a model."""
        return model in self._views

    def make_queue(self) -> MemoryJobQueue:
        """A new queue over all that is known.

        Each gateway lends its share of every worker's slots, and lets its part of what tenants may take
        through, at least one of each: none knows what the others do.
        """
        queue = MemoryJobQueue(self._clock, self._limits)
        for model, view in self._views.items():
            queue.set_route(model, view.epoch, view.weights, view.gateways)
            for worker in view.workers:
                share = max(1, worker.slots // max(1, view.gateways))
                queue.set_worker(model, replace(worker, slots=share))
            for worker_id, sleep_s in self._opened(model).items():
                queue.bar(model, worker_id, sleep_s)
            self.follow(queue, model)
        return queue

    def follow(self, queue: MemoryJobQueue, model: str) -> None:
        """Lets a queue that was made here lend by the latest route: workers refuse earlier ones."""
        view, activated = self._views.get(model), self._activated(model)
        if view is None or activated is None or activated[1] <= view.epoch:
            return
        revision, epoch = activated
        weights = view.weights if revision in view.weights else {revision: 1}
        self._views[model] = replace(view, epoch=epoch, weights=weights)
        queue.set_route(model, epoch, weights, view.gateways)
