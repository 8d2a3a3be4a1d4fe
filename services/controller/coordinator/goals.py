"""What members shall hold. Owns: that a goal follows from the rollout, or from the route, and from who waits.

Requests that have said something already must go on with the revision that said it. Where the worker that
ran one is gone, and the revision is about to go from everybody, or gone, one worker has it until nobody waits
for it any more. Goals are derived, never stored. Must not know: streams, or when anybody is told.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.controller.coordinator.conductor import Conductor
from services.controller.core import rollout_fleet, routing
from services.controller.core.catalog import Catalog
from services.controller.core.member import Goal, Kind, Member
from services.controller.core.ports import RouteStore
from services.controller.core.rollout_events import Fleet
from services.controller.core.rollout_record import Rollout
from services.controller.core.routing import Plan


class Goals:
    """Tells what each member of a model shall hold.

    Args:
        model: The model.
        catalog: The registered revisions.
        rollouts: The rollouts of the model.
        store: Where requests wait.

    Attributes:
        awaited: The revisions that requests must go on with, as the store told last.
    """

    def __init__(self, model: str, catalog: Catalog, rollouts: Conductor, store: RouteStore) -> None:
        self._model = model
        self._catalog = catalog
        self._rollouts = rollouts
        self._store = store
        self._keepers: dict[str, str] = {}
        self.awaited: frozenset[str] = frozenset()

    async def look(self, members: Iterable[Member]) -> bool:
        """Asks the store who waits, and chooses who keeps what for them; returns whether goals have changed.

        Raises:
            StoreUnavailable: It cannot be reached.
        """
        rollout, before = self._rollouts.newest, self._keepers
        if rollout is None:
            # There was never another revision.
            return False
        self.awaited = await self._store.read_awaited(self._model)
        self._keepers = rollout_fleet.keepers(rollout, members, self.awaited) if self.awaited else {}
        return before != self._keepers

    def of(self, member: Member, plan: Plan, stored_epoch: int) -> Goal:
        """What a member shall hold.

        Args:
            member: The member.
            plan: What the route shall be.
            stored_epoch: The epoch of the route that the store is known to hold.
        """
        rollout, bound = self._rollouts.newest, self._bound(member)
        if rollout is not None and not rollout.ended:
            return rollout_fleet.goal(rollout, member, plan.weights.items(), stored_epoch, bound)
        whole = routing.goal(self._model, plan, member, self._knows)
        if rollout is None or not rollout.ended or member.kind is not Kind.WORKER:
            return whole
        return rollout_fleet.goal_after(rollout, member, whole, bound)

    def fleet(self, rollout: Rollout, members: Iterable[Member]) -> Fleet:
        """The members as a rollout sees them."""
        names = (rollout.spec.revision, rollout.previous)
        sizes = {
            name: self._catalog.revision(self._model, name).manifest.weights_bytes
            for name in names
            if self._knows(name)
        }
        return rollout_fleet.fleet(rollout, members, sizes)

    def _bound(self, member: Member) -> frozenset[str]:
        """The revisions that a member shall have for the sake of requests."""
        if not self._keepers or member.kind is not Kind.WORKER:
            return frozenset()
        keeps = (name for name, keeper in self._keepers.items() if keeper == member.id)
        return frozenset(name for name in keeps if self._knows(name))

    def _knows(self, revision: str) -> bool:
        return self._catalog.knows(self._model, revision)
