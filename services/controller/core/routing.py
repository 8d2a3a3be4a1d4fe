"""Where new requests of one model go. Owns: when the route changes, and which epoch it then bears.

Every change of the route bears a higher epoch than anything that the store or a member has ever reported,
so that it wins wherever it meets an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from services.controller.core.member import Goal, Kind, Member, Presence
from services.controller.core.records import Route
from services.controller.core.residency import Phase

# The whole share; weights are parts of their sum.
WEIGHT_ALL = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """What the route of a model shall be, and what comes next.

    Attributes:
        wanted: The revision that shall serve.
        epoch: The epoch of the route as it shall be now.
        weights: Its weights; those of an earlier controller until a worker is ready for `wanted`.
    """

    wanted: str
    epoch: int
    weights: Mapping[str, int]

    @property
    def switched(self) -> bool:
        """Whether new requests go to the wanted revision."""
        return dict(self.weights) == {self.wanted: WEIGHT_ALL}

    @property
    def serving_epoch(self) -> int:
        """The epoch from which on the wanted revision serves; members hear of it before the switch."""
        return self.epoch if self.switched else self.epoch + 1


def next_epoch(stored: int, reported: int, now_ms: int) -> int:
    """An epoch above all that was seen. The wall clock covers those whom nobody reports any more."""
    return max(stored + 1, reported + 1, now_ms)


def claim(wanted: str, stored: Route | None, reported: int, now_ms: int) -> Plan:
    """The plan of a controller that begins to lead: it keeps the weights, so that serving goes on."""
    epoch = next_epoch(stored.epoch if stored else 0, reported, now_ms)
    return Plan(wanted, epoch, dict(stored.weights) if stored else {})


def may_switch(plan: Plan, members: Iterable[Member]) -> bool:
    """Whether a worker serves the wanted revision and no gateway is still fetching its tokenizer."""
    if plan.switched:
        return False
    served = False
    for member in members:
        if member.kind is Kind.WORKER:
            listing = member.listing
            served = served or (listing is not None and plan.wanted in listing.revisions)
        elif member.presence is Presence.ATTACHED:
            resident = member.residents.get(plan.wanted)
            # A gateway that failed must not hold up the others.
            if resident is None or resident.phase is Phase.PREPARING:
                return False
    return served


def switch(plan: Plan) -> Plan:
    """The plan once a worker serves the wanted revision."""
    return replace(plan, epoch=plan.serving_epoch, weights={plan.wanted: WEIGHT_ALL})


def raised(plan: Plan, stored: Route | None, reported: int, now_ms: int) -> Plan:
    """The same route with an epoch above what the store, the plan and the members know."""
    known = max(stored.epoch if stored else 0, plan.serving_epoch)
    return replace(plan, epoch=next_epoch(known, reported, now_ms))


def goal(model: str, plan: Plan, member: Member, known: Callable[[str], bool]) -> Goal:
    """What a member shall hold while no rollout is under way.

    Args:
        model: The model.
        plan: The route. What it still names is kept beside what shall serve, while it is named and known.
        member: The member.
        known: Whether a revision is registered.
    """
    named = plan.epoch if member.kind is Kind.WORKER else 0
    holds = {name: named for name in plan.weights if known(name)}
    return Goal(model, {**holds, plan.wanted: plan.serving_epoch})


def agrees(plan: Plan, fence: int, stored: Route | None) -> bool:
    """Whether the store says what the plan says."""
    if stored is None or stored.fence != fence or stored.epoch != plan.epoch:
        return False
    return dict(stored.weights) == dict(plan.weights)
