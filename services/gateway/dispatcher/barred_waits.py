"""Waits for workers that may not be asked. Owns: how long each request has waited in vain, and who waits on.

Must not know: the queue, or what becomes of a request then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from services.gateway.core.jobs import Renewal
from services.gateway.dispatcher.generation import Generation

# A worker that is tried may be well again: requests wait longer by this factor, however often one is tried.
TRIED_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class _Wait:
    """How long one request has waited in vain, and when that was found last."""

    spent_s: float
    seen_s: float


class BarredWaits:
    """Measures each request by itself: how long others have waited says nothing of one that has just come.

    Args:
        wait_s: How long a request waits while there is no worker that it may go to.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        # By model; an id may be another request's a moment later.
        self._waits: dict[str, dict[Generation, _Wait]] = {}

    def forget(self, model: str) -> None:
        """Lets every wait for a model's workers begin anew: one takes jobs, or a rollout replaces them."""
        self._waits.pop(model, None)

    def judge(
        self, model: str, renewal: Renewal, of_model: Collection[Generation], now_s: float
    ) -> Iterable[Generation]:
        """Whose wait is over, of a model's requests that are under way.

        Workers whose breakers are open count as away. One whose trial is due has no room for it, for else the
        renewal had lent it: as long as nothing can be tried, nobody's time runs, as with any busy worker.
        """
        is_tried = any(one.tries for one in of_model) or any(grant.trial for grant in renewal.granted)
        if renewal.workers is None and is_tried:
            # The one that waited is under way, and perhaps waits on soon.
            return ()
        if renewal.workers != 0:
            self.forget(model)
            return ()
        runs = is_tried or not renewal.due
        before = self._waits.get(model, {})
        # One that tries a worker waits on where that fails. One that is served, and comes back, begins anew.
        self._waits[model] = waits = {
            one: _later(before.get(one), now_s, runs=runs) for one in of_model if one.waits or one.tries
        }
        bound_s = self._wait_s * (TRIED_FACTOR if is_tried or renewal.due else 1.0)
        return [one for one, wait in waits.items() if wait.spent_s >= bound_s]


def _later(wait: _Wait | None, now_s: float, *, runs: bool) -> _Wait:
    if wait is None:
        return _Wait(0.0, now_s)
    return _Wait(wait.spent_s + (now_s - wait.seen_s if runs else 0.0), now_s)
