"""Tenants' minutes. Owns: what the store said of them last, and what was used of which it has not heard.

Both lead over the time in which the store does not answer: what tenants took before counts in the gateway's
own queue, and what they used meanwhile counts at the store when it is back.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from dataclasses import dataclass

from services.common.allowance import Allowance
from services.common.clock import Clock
from services.common.errors import InterlockError
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.core.jobs import Grant, QueuedJob, Waiting
from services.gateway.core.ports import StoreQueue
from services.gateway.core.queue_quota import WINDOW_MS

# Tenants of which something is known, by model, and sums that the store has not heard of; beyond it the
# oldest are forgotten.
KNOWN_MAX = 4_096
UNTOLD_MAX = 4_096
# What a tenant uses within this is one sum.
TOGETHER_S = 20.0
MINUTE_S = WINDOW_MS / 1000


@dataclass(slots=True)
class _Known:
    """What all gateways have taken of a tenant's minute, and when it ends."""

    taken_tokens: int
    ends_s: float


@dataclass(slots=True)
class _Untold:
    """What a tenant used within a while, and when the last of it; a repetition is known by the nonce."""

    model: str
    tenant: str
    nonce: str
    tokens: int = 0
    latest_s: float = 0.0


class TenantMinutes:
    """What one gateway knows of tenants' minutes.

    Args:
        clock: Measures.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str], _Known] = {}
        self._untold: dict[tuple[str, str, int], _Untold] = {}
        self._telling: _Untold | None = None

    async def hearing(self, job: QueuedJob, answer: Awaitable[Grant | Waiting]) -> Grant | Waiting:
        """Awaits the store's answer to a job, and notes what it says of the tenant's minute."""
        try:
            found = await answer
        except InterlockError as error:
            self._hear(job, error.allowance)
            raise
        self._hear(job, found.allowance)
        return found

    def _hear(self, job: QueuedJob, allowance: Allowance | None) -> None:
        if allowance is None or allowance.tokens_limit is None or allowance.tokens_left is None:
            return
        key = job.model, job.tenant
        taken, left_s = allowance.tokens_limit - allowance.tokens_left, allowance.tokens_reset_s
        self._known.pop(key, None)
        self._known[key] = _Known(taken, self._clock.monotonic() + left_s)
        if len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]

    def carry(self, queue: MemoryJobQueue) -> None:
        """Lets a queue that takes the store's place go on with what is known."""
        now_s = self._clock.monotonic()
        for (model, tenant), known in self._known.items():
            if known.ends_s > now_s:
                queue.carry(model, tenant, max(0, known.taken_tokens), known.ends_s)

    def settle(self, job: QueuedJob) -> None:
        """Notes that the store has heard of a job's end: what it did not use is free again."""
        if (known := self._known.get((job.model, job.tenant))) is not None:
            known.taken_tokens -= job.cost_tokens - job.used_tokens

    def use(self, job: QueuedJob) -> None:
        """Notes what a job has used that has ended without the store's having heard of it."""
        tokens, now_s = job.used_tokens, self._clock.monotonic()
        if not tokens:
            return
        key = job.model, job.tenant, int(now_s // TOGETHER_S)
        if (untold := self._untold.get(key)) is None:
            untold = self._untold[key] = _Untold(job.model, job.tenant, secrets.token_hex(8))
        untold.tokens, untold.latest_s = untold.tokens + tokens, now_s
        if len(self._untold) > UNTOLD_MAX:
            del self._untold[next(iter(self._untold))]
        if (known := self._known.get((job.model, job.tenant))) is not None:
            # The store may go again before it has said so itself.
            known.taken_tokens += tokens

    async def tell_one(self, store: StoreQueue) -> bool:
        """Tells the store one sum; returns False, and lets nothing happen meanwhile, where there is none.

        What is older than a minute is in none that counts.
        """
        if self._telling is None:
            if not self._untold:
                return False
            # What is used from now on is another sum: this one may be said again, and must be the same then.
            self._telling = self._untold.pop(next(iter(self._untold)))
        told = self._telling
        if self._clock.monotonic() - told.latest_s < MINUTE_S:
            await store.book(told.model, told.tenant, told.nonce, told.tokens)
        self._telling = None
        return True
