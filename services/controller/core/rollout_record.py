"""The record of a rollout. Owns: all that a controller must know of one to go on with it. Data alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from services.controller.core.rollout_events import Weights

# The whole share of new requests.
SHARE_ALL = 100


class State(StrEnum):
    """Where a rollout is; the names are those of the contract."""

    PENDING = "PENDING"
    PREPARING = "PREPARING"
    READY = "READY"
    SWITCHING = "SWITCHING"
    BAKING = "BAKING"
    COMPLETED = "COMPLETED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"
    ABORTING = "ABORTING"
    ABORTED = "ABORTED"


# Where each state leads. The diagram in the documentation is drawn from this.
NEXT = MappingProxyType(
    {
        State.PENDING: frozenset({State.PREPARING, State.ABORTED}),
        State.PREPARING: frozenset({State.READY, State.ABORTING}),
        State.READY: frozenset({State.SWITCHING, State.ABORTING}),
        State.SWITCHING: frozenset({State.BAKING, State.ROLLING_BACK}),
        State.BAKING: frozenset({State.COMPLETED, State.ROLLING_BACK}),
        State.ROLLING_BACK: frozenset({State.ROLLED_BACK, State.BAKING, State.COMPLETED}),
        State.ABORTING: frozenset({State.ABORTED}),
        State.COMPLETED: frozenset(),
        State.ROLLED_BACK: frozenset(),
        State.ABORTED: frozenset(),
    }
)

TERMINAL = frozenset(state for state, following in NEXT.items() if not following)


class Strategy(StrEnum):
    """How the new revision takes the old one's place on a worker."""

    AUTO = "auto"
    SIDE_BY_SIDE = "side-by-side"
    SWAP = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What was asked for.

    Attributes:
        model: The model.
        revision: The revision that shall serve.
        strategy: How.
        canary_percent: Its share of new requests while it is judged, 1 to 100.
        bake_s: How long it is judged.
        quorum: Workers that must be ready before the switch; None: all.
        prepare_timeout_s: Most time until they are; a swap's first drain is part of it.
        drain_timeout_s: By swap, most time of it for what runs on the first worker to end.
        failed_percent_max: How many of its attempts may fail beyond the old revision's share; 100: any.
        ttft_ratio_max: How many times as long as before first tokens may take; 0: any.
    """

    model: str
    revision: str
    strategy: Strategy = Strategy.AUTO
    canary_percent: int = SHARE_ALL
    bake_s: float = 60.0
    quorum: int | None = None
    prepare_timeout_s: float = 600.0
    drain_timeout_s: float = 600.0
    failed_percent_max: int = 5
    ttft_ratio_max: int = 3


@dataclass(frozen=True, slots=True)
class Transition:
    """A state that was entered, when, and why for people."""

    state: State
    time_ms: int
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The record of one rollout.

    Attributes:
        id: Its id.
        spec: What was asked for.
        previous: The revision that served before.
        origin: The revision that the mesh was started with.
        strategy: How it is done; AUTO until it began.
        state: Where it is.
        route: The weights that the store shall hold now.
        written: The weights that the store is known to hold since `route` was set; empty: not known.
        due_ms: When the time of the state is over, since the epoch; 0: it has no bound.
        drain_due_ms: When the first worker of a swap shall have ended what ran on the old revision.
        away_due_ms: When another one takes its place, since it went before it served; 0: it is there.
        swapping: Workers that gave up the old revision for the new one, or held that already, in this order.
        paused: Whether an operator holds it.
        history: Every state that it entered, oldest first.
    """

    id: str
    spec: Spec
    previous: str
    origin: str = ""
    strategy: Strategy = Strategy.AUTO
    state: State = State.PENDING
    route: Weights = ()
    written: Weights = ()
    due_ms: int = 0
    drain_due_ms: int = 0
    away_due_ms: int = 0
    swapping: tuple[str, ...] = ()
    paused: bool = False
    history: tuple[Transition, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it has reached its terminal state."""
        return self.state in TERMINAL


def create(
    id: str,  # noqa: A002 - the field's name
    spec: Spec,
    previous: str,
    now_ms: int,
    origin: str = "",
) -> Rollout:
    """A rollout that has not begun."""
    pending = Transition(State.PENDING, now_ms, "It was asked for.")
    route = ((previous, SHARE_ALL),)
    return Rollout(id=id, spec=spec, previous=previous, origin=origin, route=route, history=(pending,))


def forsaken(rollout: Rollout, cause: str, now_ms: int) -> Rollout:
    """The end of a rollout that nothing can be done for: a revision that it names is gone.

    Args:
        rollout: One that has not ended.
        cause: Why, for people.
        now_ms: The time since the epoch.
    """
    while not rollout.ended:
        state = _WAYS_BACK[rollout.state]
        history = (*rollout.history, Transition(state, now_ms, cause))
        rollout = replace(rollout, state=state, paused=False, history=history)
    return rollout


# Out of each state the way that leads back.
_WAYS_BACK = {
    State.PENDING: State.ABORTED,
    State.PREPARING: State.ABORTING,
    State.READY: State.ABORTING,
    State.ABORTING: State.ABORTED,
    State.SWITCHING: State.ROLLING_BACK,
    State.BAKING: State.ROLLING_BACK,
    State.ROLLING_BACK: State.ROLLED_BACK,
}
