"""Request ids behind the store's breaker. Owns: that nobody waits for a store that is known to be away.

What an answer says of the store is judged where queues are asked: the ids may lie on another of its nodes.
"""

from __future__ import annotations

from services.common.errors import StoreUnavailable
from services.common.redis_client import RETRY_AFTER_S
from services.gateway.adapters.pybreaker_circuit import Circuit
from services.gateway.core.breaker import State
from services.gateway.core.log import Claim
from services.gateway.core.ports import RequestDirectory


class GuardedRequestDirectory:
    """`RequestDirectory` over another one.

    Args:
        directory: What is asked while the store answers.
        circuit: The store's breaker.
    """

    def __init__(self, directory: RequestDirectory, circuit: Circuit) -> None:
        self._directory = directory
        self._circuit = circuit

    async def claim(self, job_id: str, claim: Claim, ttl_s: float) -> Claim | None:
        """See `RequestDirectory.claim`."""
        self._check()
        return await self._directory.claim(job_id, claim, ttl_s)

    async def find(self, job_id: str) -> Claim | None:
        """See `RequestDirectory.find`."""
        self._check()
        return await self._directory.find(job_id)

    async def release(self, job_id: str, claim: Claim) -> None:
        """See `RequestDirectory.release`."""
        self._check()
        await self._directory.release(job_id, claim)

    def _check(self) -> None:
        # Half open is not back: the way home may take as long as any call.
        if self._circuit.breaker.state not in {State.CLOSED, State.FORCED_CLOSED}:
            raise StoreUnavailable("The store of request ids is not asked now.", retry_after_s=RETRY_AFTER_S)
