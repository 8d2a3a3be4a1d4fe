"""Fixtures of the integration tests: a real Redis, and a queue in it."""

from __future__ import annotations

from tests.fixtures.queue_world import empty_world, world
from tests.fixtures.redis_server import redis_client, redis_process, redis_server, redis_store

__all__ = ["empty_world", "redis_client", "redis_process", "redis_server", "redis_store", "world"]
