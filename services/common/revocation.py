"""Revoked tokens. Owns: which token ids are refused before their end, as far as this process knows.

Every gateway and controller holds the whole list and reads it again every few seconds: no request asks the
store. What was read stays known until it would have ended anyway, so a store that is away, or comes back
empty, lets no revoked token in; whoever still knows an entry writes it again.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Mapping
from typing import Protocol

from services.common import logs
from services.common.errors import ArgumentInvalid, StoreUnavailable
from services.common.token_claims import TOKEN_ID_BYTES_MAX, TimeRules, is_name

# While the store answers, a revoked token passes for five seconds at most: the pause, and room for the read.
# One bulk read that often costs nothing.
REFRESH_S = 4.0
# After a read that failed: what was revoked meanwhile waits already.
REFRESH_AGAIN_S = 1.0
# Whoever revokes ten thousand tokens within a day has lost a key, and changes it. About 1 MB a process.
REVOCATIONS_MAX = 10_000


class RevocationsFull(Exception):
    """The store holds as many entries as it may."""


class RevocationStore(Protocol):
    """The list that all processes share: token id -> when its entry may go, in seconds since the epoch."""

    async def read(self, now_s: float) -> dict[str, float]:
        """Every entry that has not ended. Raises StoreUnavailable."""
        ...

    async def add(self, entries: Mapping[str, float], now_s: float) -> None:
        """Adds entries; the later end wins.

        Raises:
            RevocationsFull: Some were left out.
            StoreUnavailable: The store cannot be reached.
        """
        ...


class RevocationList:
    """What this process knows of the list.

    Args:
        store: The shared list; None: this process is alone.
        times: Bounds the life of every token, and with it of every entry.
        now: Seconds since the epoch.
    """

    def __init__(self, store: RevocationStore | None, times: TimeRules, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        # Whenever it was issued, a token with this id ends before; the leeway counts at both of its ends.
        self._entry_ttl_s = times.lifetime_max_s + 2 * times.leeway_s + 1
        self._known: dict[str, float] = {}
        self._reachable = True

    def is_revoked(self, token_id: str) -> bool:
        """Whether a token with this `jti` is refused."""
        return token_id in self._known

    async def revoke(self, token_id: str) -> float:
        """Takes every token with this `jti` back; returns until when that is remembered.

        Raises:
            ArgumentInvalid: It is no `jti` that a believed token may have; or the list is full.
            StoreUnavailable: The others cannot be told. Nothing was revoked.
        """
        if not is_name(token_id, TOKEN_ID_BYTES_MAX):
            raise ArgumentInvalid(
                f"token_id: 1 to {TOKEN_ID_BYTES_MAX} bytes without control characters: the token's `jti`."
            )
        now_s = self._now()
        ends_s = now_s + self._entry_ttl_s
        try:
            if self._store is not None:
                await self._store.add({token_id: ends_s}, now_s)
        except RevocationsFull:
            raise ArgumentInvalid(
                f"{REVOCATIONS_MAX} tokens are revoked already; change the signing key instead."
            ) from None
        self._known[token_id] = ends_s
        return ends_s

    async def run(self) -> None:
        """Reads the list again and again, sooner after a read that failed."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S if self._reachable else REFRESH_AGAIN_S)

    async def refresh(self) -> None:
        """Reads the list once; without the store, what is known goes on."""
        if self._store is None:
            return
        try:
            await self._exchange(self._store)
        except StoreUnavailable:
            if self._reachable:
                logs.get_logger().warning("revocations.unread", known=len(self._known))
            self._reachable = False
        else:
            self._reachable = True

    async def _exchange(self, store: RevocationStore) -> None:
        now_s = self._now()
        stored = await store.read(now_s)
        missing = {
            token_id: ends_s
            for token_id, ends_s in self._known.items()
            if ends_s > now_s and token_id not in stored
        }
        self._known = _longest({**missing, **stored})
        if missing:
            logs.get_logger().warning("revocations.restored", entries=len(missing))
            try:
                await store.add(missing, now_s)
            except RevocationsFull:
                logs.get_logger().warning("revocations.full", most=REVOCATIONS_MAX)


def _longest(entries: dict[str, float]) -> dict[str, float]:
    """The entries that end last, as many as may be known."""
    if len(entries) <= REVOCATIONS_MAX:
        return entries
    return dict(heapq.nlargest(REVOCATIONS_MAX, entries.items(), key=lambda entry: entry[1]))
