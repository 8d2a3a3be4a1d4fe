"""Usage. Owns: what a caller is told of its own tenant's consumption, over all models.

Must not know: where it is counted, or which API asks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.common.clock import Clock
from services.gateway.core.catalog import Catalog
from services.gateway.core.jobs import Principal
from services.gateway.core.ports import UsageBook
from services.gateway.core.queue_quota import WINDOW_MS


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has taken, summed over the models.

    Attributes:
        window_start_s: When the minute began that the tokens belong to: seconds since the epoch.
        window_s: Its length.
        used_tokens: Tokens of requests that ended in it.
        reserved_tokens: Estimates of requests that wait or run.
        running: Requests that run.
    """

    window_start_s: float
    window_s: float
    used_tokens: int
    reserved_tokens: int
    running: int


class UsageDesk:
    """Answers what a tenant has taken.

    Args:
        book: Where it is counted, model by model.
        catalog: The models.
        clock: The time of day.
    """

    def __init__(self, book: UsageBook, catalog: Catalog, clock: Clock) -> None:
        self._book = book
        self._catalog = catalog
        self._clock = clock

    async def report(self, principal: Principal) -> Usage:
        """What the caller's tenant has taken.

        Raises:
            StoreUnavailable: It cannot be looked up now.
        """
        models = self._catalog.models
        found = await asyncio.gather(*(self._book.usage(model, principal.subject) for model in models))
        # Each model's minute is counted by the clock of its queue; the youngest is still open.
        age_s = min((usage.window_age_s for usage in found), default=0.0)
        return Usage(
            window_start_s=self._clock.now() - age_s,
            window_s=WINDOW_MS / 1000,
            used_tokens=sum(usage.used_tokens for usage in found),
            reserved_tokens=sum(usage.reserved_tokens for usage in found),
            running=sum(usage.running for usage in found),
        )
