"""Refusals of a crowded queue. Owns: when what was refused just now need not be asked again.

A queue that is asked ten times as often as it serves says no nine times of ten. Each no costs the store and
the gateway as much as a yes, and that time is missing where tokens are made. So in a flood a refusal stands
for a moment, for requests of the same tenant that are like the one that was refused and take no less. Must
not know: clocks, or where the queue is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

from services.common.errors import QueueFull
from services.gateway.core.jobs import Band
from services.gateway.core.params import GenerationJob
from services.gateway.core.rolling_window import RollingWindow
from services.gateway.core.tenancy import TenantLimits

# A queue that serves fifty requests a second has moved by two or three in this time.
STANDS_S = 0.05
# So many refusals of one tenant in a second are a flood; below, every request is put to the queue.
FLOOD = 32
FLOOD_WINDOW_S = 1.0
FLOOD_BUCKETS = 10
# Clients that give the same deadline differ by their way here: by so much, or this part of it.
ALIKE_S = 0.1
ALIKE_PART = 0.1
# Those beyond are put to the queue each time.
KEPT_MAX = 1_024

Key = tuple[str, str, Band, int, TenantLimits]


@dataclass(slots=True)
class _Refused:
    """What is remembered of requests of one kind: the latest refusal, and how many there were lately."""

    error: QueueFull
    timeout_s: float
    cost_tokens: int
    at_s: float
    window: RollingWindow

    def tally(self, now_s: float) -> None:
        """Counts one more."""
        self.window = self.window.counted(now_s, failed=True)

    def stands(self, job: GenerationJob, now_s: float) -> bool:
        """Whether a request would be refused in the same words: it has as much time, and takes no less."""
        if self.window.tally(now_s).failures < FLOOD or now_s - self.at_s >= STANDS_S:
            return False
        alike_s = min(ALIKE_S, ALIKE_PART * self.timeout_s)
        return abs(job.timeout_s - self.timeout_s) <= alike_s and job.cost_tokens >= self.cost_tokens


class Refusals:
    """What the queue refused lately, by tenant, model, band, slots and limits."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, _Refused] = OrderedDict()

    def note(self, job: GenerationJob, error: QueueFull, now_s: float) -> None:
        """The queue refused a request."""
        if not error.lasting:
            return
        # The error itself was raised: it holds all that was under way then, prompts too.
        error = copy.copy(error)
        window = RollingWindow(FLOOD_WINDOW_S, FLOOD_BUCKETS)
        refused = self._kept.setdefault(_key(job), _Refused(error, 0.0, 0, now_s, window))
        refused.error, refused.at_s = error, now_s
        refused.timeout_s, refused.cost_tokens = job.timeout_s, job.cost_tokens
        refused.tally(now_s)
        self._kept.move_to_end(_key(job))
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def recall(self, job: GenerationJob, now_s: float) -> QueueFull | None:
        """The refusal that stands for a request; None: it is put to the queue."""
        refused = self._kept.get(_key(job))
        quota = job.limits.tokens_per_minute
        if refused is None or not refused.stands(job, now_s) or (quota and job.cost_tokens > quota):
            # What no minute could hold is told so.
            return None
        refused.tally(now_s)
        # Its own, for whoever raises it.
        return copy.copy(refused.error)


def _key(job: GenerationJob) -> Key:
    return job.model, job.tenant, job.band, job.params.n, job.limits
