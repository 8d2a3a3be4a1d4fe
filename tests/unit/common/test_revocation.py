"""Which tokens are refused before their end, with and without the store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from services.common.errors import ArgumentInvalid, StoreUnavailable
from services.common.revocation import (
    REFRESH_AGAIN_S,
    REFRESH_S,
    REVOCATIONS_MAX,
    RevocationList,
    RevocationsFull,
)
from services.common.token_claims import TimeRules

TIMES = TimeRules(lifetime_max_s=1_000, leeway_s=10)
# The longest that a token lives whose clock is ahead by the leeway, and the leeway at its end.
ENTRY_TTL_S = 1_021


class MemoryRevocations:
    """`RevocationStore` in memory.

    Attributes:
        entries: What all processes share.
        down: Whether every call raises StoreUnavailable.
        most: How many entries fit.
        read_once: Set once it was read.
    """

    def __init__(self, most: int = REVOCATIONS_MAX) -> None:
        self.entries: dict[str, float] = {}
        self.down = False
        self.most = most
        self.read_once = asyncio.Event()

    async def read(self, now_s: float) -> dict[str, float]:
        """See `RevocationStore.read`."""
        self.read_once.set()
        self._check()
        return {token_id: ends_s for token_id, ends_s in self.entries.items() if ends_s > now_s}

    async def add(self, entries: Mapping[str, float], now_s: float) -> None:
        """See `RevocationStore.add`."""
        del now_s
        self._check()
        for token_id, ends_s in entries.items():
            if token_id not in self.entries and len(self.entries) >= self.most:
                raise RevocationsFull
            self.entries[token_id] = max(ends_s, self.entries.get(token_id, 0))

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("gone")


class World:
    """A store, a time, and processes."""

    def __init__(self, most: int = REVOCATIONS_MAX) -> None:
        self.store = MemoryRevocations(most)
        self.now_s = 5_000.0

    def process(self) -> RevocationList:
        """One more gateway or controller."""
        return RevocationList(self.store, TIMES, lambda: self.now_s)


async def test_a_revocation_reaches_everybody_with_the_next_read() -> None:
    """At once where it was made, elsewhere with one bulk read; other tokens are not touched."""
    world = World()
    here, there = world.process(), world.process()
    assert await here.revoke("one") == world.now_s + ENTRY_TTL_S
    assert here.is_revoked("one")
    assert not there.is_revoked("one")
    await there.refresh()
    assert (there.is_revoked("one"), there.is_revoked("two")) == (True, False)


async def test_an_entry_is_forgotten_when_no_token_can_have_it() -> None:
    """Its end is the latest end of any token that was believed when it was made."""
    world = World()
    here = world.process()
    await here.revoke("one")
    world.now_s += ENTRY_TTL_S - 1
    await here.refresh()
    assert here.is_revoked("one")
    world.now_s += 1
    await here.refresh()
    assert not here.is_revoked("one")


async def test_what_is_known_outlives_a_store_that_is_away() -> None:
    """Reads fail, the list stays; a new revocation is refused, because nobody would hear of it."""
    world = World()
    here = world.process()
    await here.revoke("one")
    world.store.down = True
    await here.refresh()
    assert here.is_revoked("one")
    with pytest.raises(StoreUnavailable):
        await here.revoke("two")
    assert not here.is_revoked("two")


async def test_a_store_that_comes_back_empty_is_filled_again() -> None:
    """Whoever still knows an entry writes it, and those who start later learn it."""
    world = World()
    here = world.process()
    await here.revoke("one")
    ends_s = world.store.entries.pop("one")
    await here.refresh()
    assert here.is_revoked("one")
    assert world.store.entries == {"one": ends_s}
    later = world.process()
    await later.refresh()
    assert later.is_revoked("one")


@pytest.mark.parametrize("token_id", ["", "a\nb", "x" * 257, "é" * 129, "\ud800"])
async def test_only_what_a_token_may_have_can_be_revoked(token_id: str) -> None:
    """An empty id, a control character and one that is too long are mistakes."""
    with pytest.raises(ArgumentInvalid, match="token_id"):
        await World().process().revoke(token_id)


async def test_the_list_is_bounded() -> None:
    """A full list says what to do instead; what is in it can be renewed."""
    world = World(most=2)
    here = world.process()
    await here.revoke("one")
    await here.revoke("two")
    with pytest.raises(ArgumentInvalid, match="signing key"):
        await here.revoke("three")
    world.now_s += 5
    assert await here.revoke("one") == world.now_s + ENTRY_TTL_S


async def test_a_process_remembers_no_more_than_the_store_may_hold() -> None:
    """A store that lost everything and was filled by others pushes out what ends first; nothing fails."""
    world = World()
    here = world.process()
    await here.revoke("oldest")
    world.now_s += 1
    world.store.entries = {f"other-{number}": world.now_s + 500 for number in range(REVOCATIONS_MAX)}
    world.store.entries["other-0"] = world.now_s + 1
    await here.refresh()
    assert here.is_revoked("oldest")
    assert not here.is_revoked("other-0")
    await here.refresh()
    assert not here.is_revoked("nobody")


async def test_the_list_is_read_again_and_again() -> None:
    """The loop reads at once, and survives a store that is away."""
    world = World()
    world.store.down = True
    running = asyncio.create_task(world.process().run())
    async with asyncio.timeout(5):
        await world.store.read_once.wait()
    assert not running.done()
    running.cancel()
    await asyncio.wait({running})


async def test_a_read_that_failed_is_tried_again_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token passes for five seconds after it was revoked, a read that fails at once included."""
    world = World()
    world.store.down = True
    pauses_s: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        world.store.down = False
        if len(pauses_s) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await world.process().run()
    assert pauses_s == [REFRESH_AGAIN_S, REFRESH_S]
    assert sum(pauses_s) <= 5
