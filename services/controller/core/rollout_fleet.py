"""The fleet as a rollout sees it. Owns: what members hold means for it, and what it asks of each.

Pure over members and the record. Must not know: the route's store, streams, time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from services.controller.core.member import Goal, Kind, Member, Presence
from services.controller.core.membership import is_given_up
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_events import Fleet, Standing, WorkerView
from services.controller.core.rollout_goals import WorkerGoal, worker_goal
from services.controller.core.rollout_record import Rollout, State, Strategy

# Weights are not all that a load needs: buffers of a layer on its way, and the first KV cache.
LOAD_OVERHEAD = 1.1

_STANDINGS = {
    Phase.STAGING: Standing.PREPARING,
    Phase.STAGED: Standing.STAGED,
    Phase.PREPARING: Standing.PREPARING,
    Phase.READY: Standing.PREPARING,
    Phase.ACTIVATING: Standing.PREPARING,
    # Gateways see it, so that a grant can name it.
    Phase.ACTIVE: Standing.READY,
    Phase.FAILED: Standing.FAILED,
}


def fleet(rollout: Rollout, members: Iterable[Member], sizes: Mapping[str, int]) -> Fleet:
    """Who is there, and how far each is.

    Args:
        rollout: The rollout that looks.
        members: Workers and gateways, those that are gone included.
        sizes: Bytes of weights that the new revision and the previous one will take, as far as files tell.
    """
    views: list[WorkerView] = []
    pending = 0
    for member in members:
        if member.draining:
            continue
        if member.kind is Kind.WORKER:
            if (view := _view(rollout, member, sizes)) is not None:
                views.append(view)
        elif member.presence is Presence.ATTACHED:
            resident = member.residents.get(rollout.spec.revision)
            # A gateway that failed must not hold up the others.
            pending += resident is None or resident.phase is Phase.PREPARING
    return Fleet(tuple(sorted(views, key=lambda view: view.worker_id)), pending)


def keepers(rollout: Rollout, members: Iterable[Member], awaited: frozenset[str]) -> dict[str, str]:
    """For each revision that requests must go on with, the worker that shall have it for their sake.

    What such a request has said came from it, and the worker that ran it is gone. One that has it keeps it;
    where nobody has, one that came back with nothing comes first. One that is out of the line for a swap
    would come back into it, so that it is chosen only where it alone has the revision.

    Args:
        rollout: The one that is under way, or that ended last.
        members: Everybody.
        awaited: The revisions that requests must go on with.
    """
    names = {rollout.previous, rollout.spec.revision}
    able = [
        one
        for one in members
        if one.kind is Kind.WORKER and one.presence is Presence.ATTACHED and not one.draining
    ]
    if not able:
        return {}
    return {name: min(able, key=lambda one: _farness(one, name, names)).id for name in awaited & names}


def _farness(member: Member, revision: str, names: set[str]) -> tuple[bool, bool, bool, int, str]:
    """Sorts first who serves a revision, then who is about to, then who is in line and holds the least."""
    resident = member.residents.get(revision, Resident())
    leaving = resident.phase in {Phase.RETIRING, Phase.ABORTING}
    absent = leaving or not _is_held(member, revision)
    weight = sum(_is_held(member, one) for one in names)
    return (resident.phase is not Phase.ACTIVE, absent, member.quiet, weight, member.id)


def goal(
    rollout: Rollout,
    member: Member,
    weights: Iterable[tuple[str, int]],
    epoch: int,
    bound: frozenset[str] = frozenset(),
) -> Goal:
    """What a member shall hold while the rollout lasts.

    Args:
        rollout: The rollout.
        member: The member.
        weights: The route as the store has it.
        epoch: The epoch of that route.
        bound: Revisions that it shall have for the sake of requests; see `keepers`.
    """
    patience_s = rollout.spec.prepare_timeout_s
    if member.kind is Kind.GATEWAY:
        leading = max(weights, key=lambda one: one[1], default=("", 0))[0]
        names = (rollout.previous, rollout.spec.revision)
        holds = {name: epoch if name == leading else 0 for name in names}
        return Goal(rollout.spec.model, holds, rollout.id, prepare_timeout_s=patience_s)
    asked = _kept(rollout, member) or worker_goal(rollout, member.id)
    wanted, stages = asked.holds, frozenset({asked.stages} if asked.stages else ())
    # A worker that comes back with nothing loads first what most requests wait for; on the way back, what
    # that leads to: a revision that kills its workers would kill it again before it had the other one.
    shares = dict(weights)
    first = rollout.previous if rollout.state is State.ROLLING_BACK else ""
    ordered = sorted(wanted, key=lambda name: (name != first, -shares.get(name, 0), name))
    whole = Goal(
        rollout.spec.model,
        dict.fromkeys(ordered, epoch),
        rollout.id,
        stages=stages,
        prepare_timeout_s=patience_s,
    )
    return _one_copy(rollout, member, whole, bound) if rollout.strategy is Strategy.SWAP else whole


def goal_after(rollout: Rollout, member: Member, whole: Goal, bound: frozenset[str]) -> Goal:
    """What a worker shall hold after a rollout: `whole`, which serves, and what is bound to it."""
    if rollout.strategy is not Strategy.SWAP:
        epoch = max(whole.holds.values())
        return replace(whole, holds={**whole.holds, **dict.fromkeys(bound - whole.holds.keys(), epoch)})
    return _one_copy(rollout, member, whole, bound)


def _one_copy(rollout: Rollout, member: Member, whole: Goal, bound: frozenset[str]) -> Goal:
    """A goal for a worker that has room for one revision at a time."""
    wanted = frozenset(whole.holds)
    # It goes on with that, whatever else is still on its way out: only what comes next waits for memory.
    if any(_has(member, name) for name in wanted):
        return whole
    # One that an earlier rollout left for the sake of requests counts, too.
    others = ({rollout.previous, rollout.spec.revision} | member.residents.keys()) - wanted
    if others & bound:
        # They end first: it takes the other revision's place when nobody waits for that any more.
        held = dict.fromkeys(others & bound, max(whole.holds.values()))
        leaving = any(_is_held(member, name) for name in member.residents.keys() - held.keys())
        if leaving and not any(_has(member, name) for name in held):
            # What was wanted is on its way out, and still in memory: that one is loaded when it is gone.
            return replace(whole, holds={}, quiet=True, stages=wanted)
        return replace(whole, holds=held, stages=wanted)
    # The next is loaded when the last one's memory is free. Its files come before.
    if any(_is_held(member, name) for name in others):
        return replace(whole, holds={}, quiet=True, stages=wanted)
    return whole


def _kept(rollout: Rollout, member: Member) -> WorkerGoal | None:
    """What a worker of a swap that goes back serves until it can load the old revision; None: it can, or may.

    It gives up what serves only when the files of what takes its place are here, as on the way forth; and it
    comes back to that where it has tried the other one in vain. One that serves the old one goes on with it.
    """
    if rollout.state is not State.ROLLING_BACK or rollout.strategy is not Strategy.SWAP:
        return None
    new, old = rollout.spec.revision, member.residents.get(rollout.previous, Resident())
    serves = member.residents.get(new, Resident()).phase in _SERVING
    if old.phase in _SERVING:
        # It was about to change. Nobody else may have the old revision, to which the route goes back.
        return WorkerGoal(frozenset({rollout.previous}))
    if is_given_up(old) or (serves and old.phase in _UNSTAGED):
        return WorkerGoal(frozenset({new}), stages=rollout.previous)
    return None


_SERVING = frozenset({Phase.READY, Phase.ACTIVATING, Phase.ACTIVE})

_UNSTAGED = frozenset({Phase.ABSENT, Phase.STAGING, Phase.FAILED})

_WEIGHTLESS = frozenset({Phase.ABSENT, Phase.STAGING, Phase.STAGED, Phase.FAILED})


def _has(member: Member, revision: str) -> bool:
    """Whether a worker has a revision, or loads it; one that is on its way out is not had any more."""
    phase = member.residents.get(revision, Resident()).phase
    return phase is Phase.PREPARING or phase in _SERVING


def _is_held(member: Member, revision: str) -> bool:
    """Whether a revision takes memory, or is about to."""
    resident = member.residents.get(revision)
    return resident is not None and resident.phase not in _WEIGHTLESS


# Who leads back waits for nobody: what is gone holds nothing that would have to go.
_LEADS_BACK = frozenset({State.ROLLING_BACK, State.ABORTING})

_FALLEN = "It was lost while it loaded the revision; there may not be enough memory for it."


def _view(rollout: Rollout, member: Member, sizes: Mapping[str, int]) -> WorkerView | None:
    """A worker that counts; None: it does not.

    One whose stream broke may be on its way back. Until its lease ends it counts as one that holds nothing:
    the others are not the whole fleet. One that was lost in the middle of a load counts as one that failed.
    """
    new, old = rollout.spec.revision, rollout.previous
    if member.presence is not Presence.ATTACHED:
        if rollout.state in _LEADS_BACK:
            return None
        if member.presence is Presence.DETACHED:
            return WorkerView(member.id, fits=_fits(rollout, member, sizes))
        resident = member.residents.get(new)
        fell = member.lost_during == rollout.id and resident is not None and resident.loading
        return WorkerView(member.id, Standing.FAILED, Standing.FAILED, failure=_FALLEN) if fell else None
    residents = {name: member.residents.get(name, Resident()) for name in (new, old)}
    return WorkerView(
        member.id,
        _standing(residents[new]),
        _standing(residents[old]),
        _fits(rollout, member, sizes),
        failure=residents[new].failure if residents[new].phase is Phase.FAILED else "",
        old_failure=residents[old].failure if residents[old].phase is Phase.FAILED else "",
    )


def _standing(resident: Resident) -> Standing:
    return Standing.GIVEN_UP if is_given_up(resident) else _STANDINGS.get(resident.phase, Standing.ABSENT)


def _fits(rollout: Rollout, member: Member, sizes: Mapping[str, int]) -> bool:
    """Whether the new revision fits beside the weights that a worker holds, by what it has measured.

    What its process takes says nothing: libraries and KV cache are no weights, and those may lie elsewhere.
    One that came back with nothing will hold the previous revision again.
    """
    new, old = rollout.spec.revision, rollout.previous
    total = sum(device.memory_bytes for device in member.devices)
    held = {name: one.weights_bytes for name, one in member.residents.items() if name != new}
    held[old] = held.get(old) or sizes.get(old, 0)
    return not total or sum(held.values()) + sizes.get(new, 0) * LOAD_OVERHEAD <= total
