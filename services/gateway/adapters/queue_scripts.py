"""The queue's scripts. Owns: which files make one, and the arguments that all of them share."""

from __future__ import annotations

import itertools
import math
import secrets
from pathlib import Path
from typing import Any

from services.common.queue_keys import ModelKeys
from services.common.redis_client import RedisStore, Script, read_script
from services.gateway.core.queue_limits import QueueLimits

_COMMON = Path(__file__).parents[2] / "common" / "scripts"
_SCRIPTS = Path(__file__).parent / "scripts"
_SHARED = (
    _COMMON / "clock.lua",
    _SCRIPTS / "shared" / "call.lua",
    _COMMON / "index.lua",
    *(_SCRIPTS / "shared" / f"{part}.lua" for part in ("tenants", "jobs", "resumption", "workers", "grants")),
)


def read_operation(name: str) -> Script:
    """One operation of the queue, with the parts that all of them share."""
    return read_script(*_SHARED, _SCRIPTS / f"{name}.lua")


def read_single(name: str) -> Script:
    """A script that stands by itself."""
    return read_script(_SCRIPTS / f"{name}.lua")


class QueueScripts:
    """Runs operations of the queue for one gateway.

    Args:
        store: Where Redis is.
        gateway_id: Who calls.
        limits: The queue's bounds.
        operations: The names of the scripts that are needed.
    """

    def __init__(
        self, store: RedisStore, gateway_id: str, limits: QueueLimits, operations: tuple[str, ...]
    ) -> None:
        self._store = store
        self._gateway_id = gateway_id
        self._limits = limits
        self._scripts = {name: read_operation(name) for name in operations}
        # What tells one call from another: drawn once and then counted, as it must be unique and no secret.
        self._process, self._calls = secrets.token_hex(8), itertools.count()

    async def run(self, name: str, model: str, *args: str | float) -> Any:
        """Runs one operation; KEYS and the first five of ARGV are the same for all, see `call.lua`."""
        limits = self._limits
        header = (
            self._gateway_id,
            f"{self._process}{next(self._calls):x}",
            ms(limits.lease_ttl_s),
            ms(limits.gateway_ttl_s),
            ms(limits.record_ttl_s),
        )
        return await self._store.run_script(self._scripts[name], [ModelKeys(model).prefix], [*header, *args])


def ms(seconds: float) -> int:
    """Whole milliseconds, rounded up: what is short is not nothing."""
    return math.ceil(seconds * 1000)
