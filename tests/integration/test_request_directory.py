"""What request ids stand for, in a real Redis, and for how long."""

from __future__ import annotations

import pytest
import redis

from services.common.queue_keys import request_key
from services.common.redis_client import RedisStore
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.core.log import Claim

CLAIM = Claim("m", "digest")


@pytest.mark.parametrize(
    ("again", "ttl_s", "left_s"),
    [(CLAIM, 900.0, 900.0), (CLAIM, 60.0, 600.0), (Claim("m", "another"), 900.0, 600.0)],
    ids=["longer", "shorter", "another-body"],
)
async def test_an_id_that_is_used_again_stands_for_its_request_for_as_long_as_that(
    redis_client: redis.Redis, redis_store: RedisStore, again: Claim, ttl_s: float, left_s: float
) -> None:
    """The new one is resumed by it when the first one's time is over; another body prolongs nothing."""
    directory = RedisRequestDirectory(redis_store)
    assert await directory.claim("a", CLAIM, 600.0) is None
    for _ in range(2):
        assert await directory.claim("a", again, ttl_s) == CLAIM
        assert left_s - 60 < redis_client.pttl(request_key("a")) / 1000 <= left_s
    await directory.release("a", CLAIM)
    assert await directory.find("a") is None
