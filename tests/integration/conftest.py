"""Fixtures of the integration tests: a real Redis, a queue in it, and Node.

Libraries hold as little here as in a worker.
"""

from __future__ import annotations

import os

from services.worker.adapters.library_environment import PRIMITIVES_MAX
from tests.fixtures.javascript import node
from tests.fixtures.queue_world import empty_world, world
from tests.fixtures.redis_server import redis_client, redis_process, redis_server, redis_store

__all__ = ["empty_world", "node", "redis_client", "redis_process", "redis_server", "redis_store", "world"]

# Read when the first product is computed, by whichever test.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES_MAX))
