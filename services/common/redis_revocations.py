"""The list of revoked tokens in Redis. Owns: its key, and how it is read and added to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.common.redis_client import RedisStore, read_scores, read_script
from services.common.revocation import REVOCATIONS_MAX, RevocationsFull

# One list for the mesh, outside of every model's slot. Sorted set: token id by the end of its entry.
KEY = "il:revoked"

_REVOKE = read_script(Path(__file__).with_name("scripts") / "revoke.lua")


class RedisRevocations:
    """`RevocationStore` in a sorted set that ends with its last entry."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def read(self, now_s: float) -> dict[str, float]:
        """See `RevocationStore.read`; one call, whatever the number of entries."""
        command = (
            "ZRANGEBYSCORE",
            KEY,
            f"({now_s}",
            "+inf",
            "WITHSCORES",
            "LIMIT",
            "0",
            str(REVOCATIONS_MAX),
        )
        return read_scores(await self._store.fetch(*command))

    async def add(self, entries: Mapping[str, float], now_s: float) -> None:
        """See `RevocationStore.add`."""
        pairs = [value for token_id, ends_s in entries.items() for value in (ends_s, token_id)]
        left_out = await self._store.run_script(_REVOKE, [KEY], [now_s, REVOCATIONS_MAX, *pairs])
        if left_out:
            raise RevocationsFull
