"""What a request costs Redis: every command that a whole gateway sends to a real one is written down."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.common import redis_client
from services.common.redis_client import RedisStore, connect
from services.gateway.adapters import queue_scripts
from tests.fixtures.fleet_world import FleetWorld, open_fleet
from tests.fixtures.gateway_world import joined
from tests.fixtures.redis_server import RedisServer

# What each gateway does by the clock, whatever is asked of it.
CLOCKWORK = {"renew", "reap", "look", "show_breakers"}
# Sixteen tokens.
TEXT = "é" * 8


class WatchedStore(RedisStore):
    """Writes down what it sends, each command as if it travelled alone; subscriptions aside.

    Args:
        inner: What sends it.
        sent: Where it is written: scripts by their names, other commands in full.
    """

    def __init__(self, inner: RedisStore, sent: list[str]) -> None:
        super().__init__(inner._client)
        self._sent = sent
        folder = Path(queue_scripts.__file__).parent / "scripts"
        names = [file.stem for file in folder.glob("*.lua")]
        self._names = {queue_scripts.read_operation(name).sha1: name for name in names}
        self._names |= {queue_scripts.read_single(name).sha1: name for name in names}

    async def fetch(self, *command: str) -> Any:
        """See `RedisStore.fetch`."""
        self._sent.append(" ".join(command))
        return await super().fetch(*command)

    async def _execute(self, *command: str | float) -> Any:
        name = self._names.get(str(command[1])) if command[0] == "EVALSHA" else None
        if name not in CLOCKWORK:
            self._sent.append(name or " ".join(map(str, command)))
        return await super()._execute(*command)


async def sent_for(fleet: FleetWorld, sent: list[str], *, resumable: bool = False) -> list[str]:
    """What one request of many tokens, each a message, makes the gateway send until it is settled."""
    sent.clear()
    events = await fleet.ask(resumable=resumable)
    assert joined(events) == TEXT
    async with asyncio.timeout(5):
        while "settle" not in sent:  # noqa: ASYNC110 - only looking tells
            await asyncio.sleep(0.01)
    # What comes behind it would be there by now.
    await asyncio.sleep(0.1)
    return list(sent)


async def test_a_request_is_admitted_by_one_command_and_its_tokens_by_none(
    tmp_path: Path, redis_process: RedisServer, redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to admit and one to settle, however many tokens; a resumable one also writes its log."""
    sent: list[str] = []
    # The gateway's; the controller uses the store that it is given.
    monkeypatch.setattr(redis_client, "connect", lambda url: WatchedStore(connect(url), sent))
    async with open_fleet(tmp_path, redis_process.url, redis_store) as fleet:
        await fleet.add_worker("w1", answer=TEXT, interval_s=0.01)
        # Redis has to be sent each script once.
        await fleet.ask()
        await fleet.ask(resumable=True)
        for _ in range(3):
            assert await sent_for(fleet, sent) == ["enqueue", "settle"]
        assert (await sent_for(fleet, sent, resumable=True)).count("append") > 2
