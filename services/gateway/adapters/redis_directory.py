"""What request ids stand for, in Redis. Owns: the key of an id, and the form of its value."""

from __future__ import annotations

from services.common.queue_keys import request_key
from services.common.redis_client import RedisStore
from services.gateway.adapters.queue_scripts import ms, read_single
from services.gateway.core.log import Claim


class RedisRequestDirectory:
    """`RequestDirectory` in Redis: one key an id, in a slot of its own."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._script = read_single("where")

    async def claim(self, job_id: str, claim: Claim, ttl_s: float) -> Claim | None:
        """See `RequestDirectory.claim`."""
        known = await self._run(job_id, "claim", _write(claim), ms(ttl_s))
        return _read(known)

    async def find(self, job_id: str) -> Claim | None:
        """See `RequestDirectory.find`."""
        return _read(await self._store.fetch("GET", request_key(job_id)))

    async def release(self, job_id: str, claim: Claim) -> None:
        """See `RequestDirectory.release`."""
        await self._run(job_id, "release", _write(claim))

    async def _run(self, job_id: str, *args: str | int) -> str:
        return str(await self._store.run_script(self._script, [request_key(job_id)], args))


def _write(claim: Claim) -> str:
    return f"{claim.digest} {claim.model}"


def _read(text: str | None) -> Claim | None:
    if not text:
        return None
    digest, _, model = text.partition(" ")
    return Claim(model, digest)
