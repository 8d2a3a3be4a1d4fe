"""Logs of resumable requests in Redis. Owns: the calls that write and read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.common.redis_client import RedisStore
from services.gateway.adapters.log_entries import read_entry, write_entry
from services.gateway.adapters.queue_replies import emptied
from services.gateway.adapters.queue_scripts import QueueScripts
from services.gateway.core.jobs import Outcome
from services.gateway.core.log import Appended, AppendOutcome, Entry, LogBounds, LogPage
from services.gateway.core.queue_limits import QueueLimits

# One page stays small for the loop that reads it and for Redis, and holds a second of a fast stream.
PAGE_EVENTS_MAX = 256

# That nobody has been heard of yet.
_UNHEARD = -2
_LIVE = frozenset({"waiting", "running"})


class RedisGenerationLog:
    """`GenerationLog` in Redis, beside the queue.

    Args:
        store: Redis.
        gateway_id: This gateway.
        limits: The queue's bounds.
        expects_route: See `RedisJobQueue`. Where the route is gone, no log is lost yet: whoever has it writes
            it again once the route is back.
    """

    def __init__(
        self,
        store: RedisStore,
        gateway_id: str,
        limits: QueueLimits | None = None,
        expects_route: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._expects_route = expects_route
        operations = ("append", "attended", "follow")
        self._scripts = QueueScripts(store, gateway_id, limits or QueueLimits(), operations)

    async def append(
        self,
        model: str,
        job_id: str,
        nonce: str,
        position: int,
        entries: Sequence[Entry],
        bounds: LogBounds,
        *,
        used_tokens: int = 0,
    ) -> Appended:
        """See `GenerationLog.append`."""
        texts, most = map(write_entry, entries), (bounds.events_max, bounds.bytes_max)
        outcome, *rest = await self._scripts.run(
            "append", model, job_id, nonce, position, *most, used_tokens, *texts
        )
        return Appended(AppendOutcome(outcome), *rest)

    async def read(self, model: str, job_id: str, after: int, *, known: bool = False) -> LogPage | None:
        """See `GenerationLog.read`."""
        expects = int(known and self._expects_route(model))
        state, *rest = await self._scripts.run("follow", model, job_id, after, PAGE_EVENTS_MAX, expects)
        if state == "emptied":
            raise emptied()
        if state == "unknown":
            return None
        digest, end, texts = rest
        outcome = None if state in _LIVE else Outcome(state)
        return LogPage(digest, end, tuple(map(read_entry, texts)), outcome, waits=state == "waiting")

    async def unattended_s(self, model: str, job_id: str) -> float | None:
        """See `GenerationLog.unattended_s`."""
        ago_ms = await self._scripts.run("attended", model, job_id)
        if ago_ms == _UNHEARD:
            raise emptied()
        return None if ago_ms < 0 else ago_ms / 1000
