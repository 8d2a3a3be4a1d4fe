"""The life of a rollout: one table, three rules.

Owns: which events a rollout may meet in which state, and what follows. Must not know: clocks, members,
stores or wires. What is observed arrives as events, what must happen leaves as effects, and everything that
a successor needs is in the record: whoever reads it goes on where the last controller died.

1. Every rollout that began reaches exactly one terminal state; nothing leaves a terminal state.
2. An event that its state does not know raises `RolloutEventIllegal` and changes nothing.
3. The route names a revision only when a worker had it READY; a rollout that ends gives all to one revision.

    PENDING -> PREPARING -> READY -> SWITCHING -> BAKING -> COMPLETED
                  |           |          '-----------'-> ROLLING_BACK -> ROLLED_BACK
                  '-----------'-> ABORTING -> ABORTED

From ROLLING_BACK an operator's word leads to BAKING again; and where no worker can load the old revision any
more, what serves stays: COMPLETED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from services.controller.core import rollout_swap
from services.controller.core.rollout_events import (
    Begun,
    Cancelled,
    Effect,
    Enter,
    Event,
    FellShort,
    Fleet,
    Observed,
    Paused,
    Promoted,
    Resumed,
    RouteWritten,
    SetRoute,
    Standing,
    Swap,
    TakenBack,
    Weights,
    WorkerView,
)
from services.controller.core.rollout_moment import FAILURES, Moment
from services.controller.core.rollout_record import (
    NEXT,
    SHARE_ALL,
    Rollout,
    State,
    Strategy,
    Transition,
)


class RolloutEventIllegal(Exception):
    """The state does not know the event; the message says both, for people."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rollout after an event, and what must be done, in this order."""

    rollout: Rollout
    effects: tuple[Effect, ...]


def step(rollout: Rollout, event: Event, fleet: Fleet | None, now_ms: int, findings: str = "") -> Step:
    """What follows from `event`.

    Args:
        rollout: The rollout before it.
        event: What happened.
        fleet: Who is attached now; None: that is not known yet, and only the event itself counts.
        now_ms: The time since the epoch.
        findings: What is to be said for the new revision so far, for people; empty: nothing.

    Raises:
        RolloutEventIllegal: The table has no such entry; nothing changed.
    """
    take = TABLE.get((rollout.state, type(event)))
    if take is None:
        name = type(event).__name__
        raise RolloutEventIllegal(f"A rollout that is {rollout.state} does not take the event {name}.")
    now = Moment(fleet or Fleet(), now_ms, findings)
    after = take(rollout, event, now)
    if fleet is not None:
        after = _advance(after, now)
    return Step(after, _effects(rollout, after))


def _effects(before: Rollout, after: Rollout) -> tuple[Effect, ...]:
    entered = after.history[len(before.history) :]
    effects: list[Effect] = [Enter(one.state.value, one.cause) for one in entered]
    if after.route != before.route:
        effects.append(SetRoute(after.route))
    gave_up = after.swapping[len(before.swapping) :]
    return (*effects, *(Swap(worker_id) for worker_id in gave_up))


# --- what events do by themselves ---------------------------------------------------------------------------


def _begin(rollout: Rollout, _: Begun, now: Moment) -> Rollout:
    strategy = rollout.spec.strategy
    if strategy is Strategy.AUTO:
        fits = all(worker.fits for worker in now.fleet.workers)
        strategy = Strategy.SIDE_BY_SIDE if fits else Strategy.SWAP
    due_ms = now.after(rollout.spec.prepare_timeout_s)
    cause = f"{strategy.value} on {_count(len(now.fleet.workers))}."
    if strategy is Strategy.SWAP and rollout.spec.canary_percent < SHARE_ALL:
        cause += " Memory holds one copy only, so the new revision gets all requests and not a share of them."
    return _enter(replace(rollout, strategy=strategy, due_ms=due_ms), State.PREPARING, cause, now)


def _look(rollout: Rollout, _: Observed, __: Moment) -> Rollout:
    return rollout


def _note_route(rollout: Rollout, event: RouteWritten, _: Moment) -> Rollout:
    # An answer about an earlier route says nothing about this one.
    return replace(rollout, written=event.weights) if event.weights == rollout.route else rollout


def _pause(rollout: Rollout, _: Paused, __: Moment) -> Rollout:
    return replace(rollout, paused=True)


def _resume(rollout: Rollout, _: Resumed, __: Moment) -> Rollout:
    return replace(rollout, paused=False)


def _release(rollout: Rollout, _: Resumed | Promoted, now: Moment) -> Rollout:
    # Meanwhile workers may have gone; they get the time to come back that they had at first.
    return replace(rollout, paused=False, due_ms=now.after(rollout.spec.prepare_timeout_s))


def _end_judgement(rollout: Rollout, _: Promoted, now: Moment) -> Rollout:
    return replace(rollout, due_ms=now.ms, paused=False)


def _drop(rollout: Rollout, _: TakenBack | Cancelled, now: Moment) -> Rollout:
    return _enter(rollout, State.ABORTED, "An operator ended it before it began.", now)


def _abort(rollout: Rollout, _: TakenBack | Cancelled, now: Moment) -> Rollout:
    return _enter(rollout, State.ABORTING, "An operator ended it.", now)


def _take_back(rollout: Rollout, _: TakenBack | Cancelled, now: Moment) -> Rollout:
    return _enter(rollout, State.ROLLING_BACK, "An operator took it back.", now)


def _fall_short(rollout: Rollout, event: FellShort, now: Moment) -> Rollout:
    return _enter(rollout, State.ROLLING_BACK, event.reason, now)


def _keep(rollout: Rollout, _: Promoted, now: Moment) -> Rollout:
    # It is judged no longer than until it serves everywhere, which it may do already.
    kept = replace(rollout, due_ms=now.ms)
    return _enter(kept, State.BAKING, "An operator keeps the new revision.", now)


# --- what follows from the state, the fleet and the time ----------------------------------------------------


def _prepare(rollout: Rollout, now: Moment) -> Rollout:
    obstacle = _obstacle(rollout, now)
    if obstacle:
        return _enter(rollout, State.ABORTING, obstacle, now)
    rollout = rollout_swap.first(rollout, now) if rollout.strategy is Strategy.SWAP else rollout
    ready = _ready(rollout, now)
    if ready < _needed(rollout, now.fleet) or now.fleet.gateways_pending:
        return rollout
    cause = f"{ready} of {_count(len(now.fleet.workers))} ready."
    # The time to become ready is over; how long an operator holds it is not part of it.
    return _enter(replace(rollout, due_ms=0), State.READY, cause, now)


def _switch(rollout: Rollout, now: Moment) -> Rollout:
    if rollout.paused:
        return rollout
    obstacle = _obstacle(rollout, now)
    if obstacle:
        return _enter(rollout, State.ABORTING, obstacle, now)
    if not _ready(rollout, now):
        return rollout
    # A swapped worker has nothing else to serve: a share for the old revision would wait for the others.
    percent = SHARE_ALL if rollout.strategy is Strategy.SWAP else rollout.spec.canary_percent
    rollout = _routed(rollout, _shares(rollout, percent))
    return _enter(rollout, State.SWITCHING, f"{percent} % of new requests go to the new revision.", now)


def _await_route(rollout: Rollout, now: Moment) -> Rollout:
    if rollout.written != rollout.route:
        return rollout
    judged = replace(rollout, due_ms=now.after(rollout.spec.bake_s))
    return _enter(judged, State.BAKING, "The route is written.", now)


def _bake(rollout: Rollout, now: Moment) -> Rollout:
    failures = now.failures
    if failures and rollout.strategy is Strategy.SWAP:
        return _enter(rollout, State.ROLLING_BACK, failures[0], now)
    # Where both are given up for good nothing comes of waiting, and another rollout must be able to begin.
    if now.nothing_left or (not now.ready and now.old_is_ready):
        none_left = f"No worker holds the new revision any more. {now.findings}".rstrip()
        cause = failures[0] if failures else none_left
        return _enter(rollout, State.ROLLING_BACK, cause, now)
    if rollout.strategy is Strategy.SWAP:
        # Where an operator kept it on the way back the route may have left it.
        rollout = _routed(rollout, _shares(rollout, SHARE_ALL)) if now.ready else rollout
        rollout = rollout_swap.one_more(rollout, now)
    is_everywhere = now.ready == len(now.fleet.workers)
    is_swapping = rollout.strategy is Strategy.SWAP and not is_everywhere
    if rollout.paused or now.ms < rollout.due_ms or not now.ready or is_swapping:
        return rollout
    rollout = _routed(rollout, _shares(rollout, SHARE_ALL))
    if rollout.written != rollout.route:
        return rollout
    return _enter(rollout, State.COMPLETED, f"It serves for good. {now.findings}".rstrip(), now)


def _return(rollout: Rollout, now: Moment) -> Rollout:
    rollout = rollout_swap.led_back(rollout, now) if rollout.strategy is Strategy.SWAP else rollout
    old, new = ((rollout.previous, SHARE_ALL),), ((rollout.spec.revision, SHARE_ALL),)
    obstacle = now.no_way_back
    # A route to a revision that nobody holds would let requests wait that can be answered now.
    if now.old_is_ready or now.nothing_left:
        rollout = _routed(rollout, old)
    elif obstacle and now.ready:
        rollout = _routed(rollout, new)
    if rollout.written == old:
        neither = f"Neither revision can be loaded any more. {obstacle}"
        served = "The old revision serves again." if now.old_is_ready else "The route is on the old revision."
        cause = neither if now.nothing_left else served
        return _enter(rollout, State.ROLLED_BACK, cause, now)
    if rollout.written == new and obstacle and now.ready:
        cause = f"It stays, for the old revision cannot be loaded any more. {obstacle}"
        return _enter(rollout, State.COMPLETED, cause, now)
    return rollout


def _clear(rollout: Rollout, now: Moment) -> Rollout:
    if not all(_is_clear(worker) for worker in now.fleet.workers):
        return rollout
    return _enter(rollout, State.ABORTED, rollout.history[-1].cause, now)


def _advance(rollout: Rollout, now: Moment) -> Rollout:
    """Lets the rollout go as far as it can by itself; every state but terminal ones has a way."""
    while (move := _MOVES.get(rollout.state)) is not None:
        if rollout.strategy is Strategy.SWAP and rollout.state in _LEADS_FORTH:
            rollout = rollout_swap.taken_in(rollout, now)
        after = move(rollout, now)
        if after.state is rollout.state:
            return after
        rollout = after
    return rollout


def _obstacle(rollout: Rollout, now: Moment) -> str:
    """Why it cannot become ready any more; empty while it can."""
    failures = now.failures
    able = len(now.fleet.workers) - len(failures)
    if failures and (rollout.strategy is Strategy.SWAP or able < _needed(rollout, now.fleet)):
        return failures[0]
    if 0 < rollout.due_ms <= now.ms:
        return f"It was not ready within {rollout.spec.prepare_timeout_s:g} s."
    return rollout_swap.undrained(rollout, now) if rollout.state is State.PREPARING else ""


def _ready(rollout: Rollout, now: Moment) -> int:
    """Workers that the switch may count on."""
    return rollout_swap.ready(rollout, now) if rollout.strategy is Strategy.SWAP else now.ready


def _needed(rollout: Rollout, fleet: Fleet) -> int:
    """Workers that must be ready before the switch."""
    if rollout.strategy is Strategy.SWAP:
        return 1
    workers = len(fleet.workers)
    return max(1, workers if rollout.spec.quorum is None else min(rollout.spec.quorum, workers))


def _is_clear(worker: WorkerView) -> bool:
    """Whether nothing of the rollout is left on a worker that serves the old revision, or never will."""
    rid = worker.new in {Standing.ABSENT, Standing.STAGED, *FAILURES}
    return rid and worker.old in {Standing.READY, *FAILURES}


def _shares(rollout: Rollout, percent: int) -> Weights:
    shares = {rollout.spec.revision: percent, rollout.previous: SHARE_ALL - percent}
    return tuple(sorted((name, share) for name, share in shares.items() if share))


def _routed(rollout: Rollout, weights: Weights) -> Rollout:
    return rollout if rollout.route == weights else replace(rollout, route=weights, written=())


def _count(workers: int) -> str:
    return f"{workers} worker" if workers == 1 else f"{workers} workers"


def _enter(rollout: Rollout, state: State, cause: str, now: Moment) -> Rollout:
    assert state in NEXT[rollout.state], f"{rollout.state} does not lead to {state}"
    # Held is where it stood; an end that was asked for is not.
    paused = rollout.paused and state in _HELD
    history = (*rollout.history, Transition(state, now.ms, cause))
    return replace(rollout, state=state, paused=paused, history=history)


_LEADS_FORTH = frozenset({State.PREPARING, State.READY, State.SWITCHING, State.BAKING})

_HELD = frozenset({State.PREPARING, State.READY, State.BAKING})

_MOVES: dict[State, Callable[[Rollout, Moment], Rollout]] = {
    State.PREPARING: _prepare,
    State.READY: _switch,
    State.SWITCHING: _await_route,
    State.BAKING: _bake,
    State.ROLLING_BACK: _return,
    State.ABORTING: _clear,
}

Take = Callable[[Rollout, Any, Moment], Rollout]

TABLE: dict[tuple[State, type], Take] = {
    (State.PENDING, Begun): _begin,
    (State.PENDING, Observed): _look,
    (State.PENDING, RouteWritten): _note_route,
    (State.PENDING, Cancelled): _drop,
    (State.PENDING, TakenBack): _drop,
    (State.PREPARING, Observed): _look,
    (State.PREPARING, RouteWritten): _note_route,
    (State.PREPARING, Cancelled): _abort,
    (State.PREPARING, TakenBack): _abort,
    (State.PREPARING, Paused): _pause,
    (State.PREPARING, Resumed): _release,
    (State.READY, Observed): _look,
    (State.READY, RouteWritten): _note_route,
    (State.READY, Cancelled): _abort,
    (State.READY, TakenBack): _abort,
    (State.READY, Paused): _pause,
    (State.READY, Resumed): _release,
    (State.READY, Promoted): _release,
    (State.SWITCHING, Observed): _look,
    (State.SWITCHING, RouteWritten): _note_route,
    (State.SWITCHING, Cancelled): _take_back,
    (State.SWITCHING, TakenBack): _take_back,
    (State.BAKING, Observed): _look,
    (State.BAKING, RouteWritten): _note_route,
    (State.BAKING, FellShort): _fall_short,
    (State.BAKING, Promoted): _end_judgement,
    (State.BAKING, Cancelled): _take_back,
    (State.BAKING, TakenBack): _take_back,
    (State.BAKING, Paused): _pause,
    (State.BAKING, Resumed): _resume,
    (State.ROLLING_BACK, Observed): _look,
    (State.ROLLING_BACK, RouteWritten): _note_route,
    (State.ROLLING_BACK, Promoted): _keep,
    (State.ABORTING, Observed): _look,
    (State.ABORTING, RouteWritten): _note_route,
}
