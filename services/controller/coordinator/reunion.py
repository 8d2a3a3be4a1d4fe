"""The members' return to a new leader. Owns: until when it is waited for, and that who stays away is lost.

The first worker that comes back is not the fleet: a rollout that waits for all of them would take it for all.
One that was lost while nobody led has no lease that could run out with us: it is lost when the wait ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from services.common import logs
from services.common.clock import Clock
from services.controller.coordinator.worker_records import MemberKey
from services.controller.core.member import Kind, Member, Presence
from services.controller.core.ports import RouteStore

# How many leases of a member those who were there before are waited for.
PATIENCE_LEASES = 2


class Reunion:
    """Waits for those whom the store knows.

    Args:
        model: The model.
        store: Where the members of the controller before stand.
        clock: The time.
        lease_ttl_s: How long a member may be silent.
        members: Everybody who has come.
        mark: Is told of workers that did not come: what the store has of them goes.
    """

    def __init__(
        self,
        model: str,
        store: RouteStore,
        clock: Clock,
        lease_ttl_s: float,
        members: Mapping[MemberKey, Member],
        mark: Callable[[str], None],
    ) -> None:
        self._model = model
        self._store = store
        self._clock = clock
        self._members = members
        self._mark = mark
        self._patience_s = PATIENCE_LEASES * lease_ttl_s
        self._expected: set[tuple[Kind, str]] = set()
        self._until_s: float | None = None
        self._over = False

    async def begin(self, swapped: Iterable[str]) -> None:
        """Reads, once, who was there.

        Args:
            swapped: Workers that a swap under way has taken out of line: the store does not list those that
                load.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        if self._until_s is not None:
            return
        known = await self._store.read_members(self._model)
        self._expected = {(Kind.WORKER, name) for name in known.workers}
        self._expected |= {(Kind.GATEWAY, name) for name in known.gateways}
        self._expected |= {(Kind.WORKER, name) for name in swapped}
        self._until_s = self._clock.monotonic() + self._patience_s

    def is_over(self) -> bool:
        """Whether all have come, and a worker is among them, or they were waited for long enough."""
        if self._over or self._until_s is None:
            return self._over
        come = tuple(self._members.values())
        here = {(one.kind, one.id) for one in come if one.presence is Presence.ATTACHED}
        complete = self._expected <= here and any(kind is Kind.WORKER for kind, _ in here)
        self._over = complete or self._clock.monotonic() >= self._until_s
        if self._over:
            # Who came and left again has a lease, and is removed by that.
            self._give_up(self._expected - {(one.kind, one.id) for one in come})
        return self._over

    def _give_up(self, absent: Iterable[tuple[Kind, str]]) -> None:
        for kind, name in sorted(absent):
            if kind is Kind.WORKER:
                logs.get_logger().info("member.lost", worker_id=name, model=self._model)
                self._mark(name)
