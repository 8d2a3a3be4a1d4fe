"""What a rollout asks of each worker. Owns: which revisions a worker shall hold while a rollout lasts.

Goals are derived from the record, never stored: a controller that takes over, and a worker that comes back,
find the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.core.rollout_record import Rollout, State, Strategy


@dataclass(frozen=True, slots=True)
class WorkerGoal:
    """What one worker shall come to.

    Attributes:
        holds: The revisions that it shall have ready. One that it has and is not named goes as soon as
            nothing runs on it.
        stages: A revision whose files it shall fetch and verify, and not load yet; empty: none.
    """

    holds: frozenset[str]
    stages: str = ""


def worker_goal(rollout: Rollout, worker_id: str) -> WorkerGoal:
    """What the worker shall come to now."""
    if rollout.strategy is Strategy.SWAP:
        return _swap_goal(rollout, worker_id)
    held = _SIDE_BY_SIDE.get(rollout.state, _OLD)
    names = {_OLD: {rollout.previous}, _NEW: {rollout.spec.revision}}
    return WorkerGoal(frozenset(names.get(held, {rollout.previous, rollout.spec.revision})))


def _swap_goal(rollout: Rollout, worker_id: str) -> WorkerGoal:
    old, new = frozenset({rollout.previous}), frozenset({rollout.spec.revision})
    swapped = worker_id in rollout.swapping
    match rollout.state:
        case State.COMPLETED:
            return WorkerGoal(new)
        case State.PREPARING | State.READY | State.SWITCHING | State.BAKING:
            return WorkerGoal(new) if swapped else WorkerGoal(old, stages=rollout.spec.revision)
        case State.ROLLING_BACK:
            # One worker goes back first; the others serve until the route has left them.
            behind = worker_id in rollout.swapping[1:]
            return WorkerGoal(new, stages=rollout.previous) if behind else WorkerGoal(old)
        case _:
            return WorkerGoal(old)


_OLD, _NEW, _BOTH = "old", "new", "both"

_SIDE_BY_SIDE = {
    State.PREPARING: _BOTH,
    State.READY: _BOTH,
    State.SWITCHING: _BOTH,
    State.BAKING: _BOTH,
    # Requests that began on the new revision end there; it goes when the route has left it.
    State.ROLLING_BACK: _BOTH,
    State.COMPLETED: _NEW,
}
