"""What a resumable job is charged whose gateway vanished while it answered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.core.events import Chunk
from services.gateway.core.jobs import Grant
from services.gateway.core.log import Appended, AppendOutcome, Entry, LogBounds
from tests.fixtures.queue_audit import audit
from tests.fixtures.queue_world import KEYS, MODEL, QueueWorld, make_job


@pytest.mark.parametrize("end", ["stop", "deadline", "untaken", "stop-before"])
async def test_what_the_log_holds_is_charged_however_the_job_ends(world: QueueWorld, end: str) -> None:
    """Its worker has gone, too: it ends while it waits, be it before its heir has said a word of it."""
    job = replace(make_job("a", tenant="a", cost=1_000, timeout_s=20.0), digest="d", payload="p")
    grant = await world.gateway("g1").enqueue(job)
    assert isinstance(grant, Grant)
    await world.wait("b", gateway="g2", tenant="b")
    log = RedisGenerationLog(world.store, "g1")
    entries, bounds = (Entry(Chunk(0, "hello", (7, 8, 9, 10, 11))),), LogBounds(100, 10_000)
    for _ in range(2):
        # The second time its answer was lost.
        written = await log.append(MODEL, "a", grant.nonce, 0, entries, bounds, used_tokens=25)
        assert written == Appended(AppendOutcome.WRITTEN, 1)
    await world.routes.remove_worker(MODEL, "w1", 1)
    if end == "stop-before":
        await world.gateway("g3").stop(MODEL, "a")
    world.advance(6)
    assert await world.gateway("g2").reap(MODEL) == (() if end == "stop-before" else ("a",))
    if end in {"stop", "deadline"}:
        assert await world.gateway("g2").take_up(MODEL, "a") is not None
    if end == "stop":
        assert await world.gateway("g3").stop(MODEL, "a")
    elif end != "stop-before":
        world.advance(21)
        await world.gateway("g2").reap(MODEL)
    usage = await world.gateway("g3").usage(MODEL, "a")
    assert (usage.used_tokens, usage.reserved_tokens) == (25, 0)
    assert world.client.zscore(KEYS.prefix + "served:2", "a") == 25.0
    audit(world.client)
    world.client.delete(KEYS.prefix + "log:a", KEYS.job("a"))
