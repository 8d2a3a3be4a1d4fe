"""The workers' records in the store. Owns: which of them are due, and that a write that failed is made again.

What a record says is the member's listing; this decides only when it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from services.controller.core.member import Kind, Member
from services.controller.core.ports import RouteStore
from services.controller.core.records import WorkerRecord

# We remove lost workers ourselves; this only bounds what a dead controller leaves behind. It is longer than a
# controller needs to be restarted, because serving goes on without one meanwhile.
RECORD_TTL_S = 30.0


class MemberKey(NamedTuple):
    """A worker and a gateway may bear the same id."""

    kind: Kind
    id: str


class WorkerRecords:
    """Keeps the records of one model's workers.

    Args:
        model: The model.
        store: Where gateways read them.
    """

    def __init__(self, model: str, store: RouteStore) -> None:
        self._model = model
        self._store = store
        self._due: set[str] = set()

    def mark(self, *worker_ids: str) -> None:
        """These have changed: the next `keep` writes or removes them."""
        self._due.update(worker_ids)

    async def keep(self, members: Mapping[MemberKey, Member], fence: int, *, renew: bool) -> None:
        """Brings the store to what the members are; with `renew` every lease is written too.

        Raises:
            FenceStale: Another controller has taken over.
            StoreUnavailable: The store cannot be reached; what was not written is due again.
        """
        due, self._due = self._due, set()
        if renew:
            due |= {key.id for key, member in members.items() if member.listing is not None}
        while due:
            worker_id = due.pop()
            try:
                await self._keep(worker_id, members.get(MemberKey(Kind.WORKER, worker_id)), fence)
            except BaseException:
                self._due |= {worker_id, *due}
                raise

    async def _keep(self, worker_id: str, member: Member | None, fence: int) -> None:
        listing = member.listing if member is not None else None
        if listing is None:
            await self._store.remove_worker(self._model, worker_id, fence)
            return
        record = WorkerRecord(
            worker_id=worker_id,
            address=listing.address,
            incarnation=listing.incarnation,
            slots=listing.slots,
            draining=listing.draining,
            ready=listing.revisions,
            lease_ttl_s=RECORD_TTL_S,
        )
        await self._store.write_worker(self._model, record, fence)
