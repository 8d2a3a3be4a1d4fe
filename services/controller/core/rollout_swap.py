"""The order of a swap. Owns: which worker gives up a revision for the other one, and when. Pure.

Memory holds one copy only, so that a worker serves nothing while it changes: one goes after the other.
"""

from __future__ import annotations

from dataclasses import replace

from services.controller.core.rollout_events import Standing
from services.controller.core.rollout_moment import Moment
from services.controller.core.rollout_record import Rollout, State

# A worker that was restarted is back by then. Until then nobody else gives up what serves.
RETURN_S = 60.0


def taken_in(rollout: Rollout, now: Moment) -> Rollout:
    """Counts in the workers that hold the new revision already, from an earlier rollout say.

    Without a word they would give it up for the old one. One that holds both is asked in its turn: until the
    route leads to the new revision it may be the one that serves.
    """
    leads = rollout.state in {State.SWITCHING, State.BAKING}
    names = tuple(
        worker.worker_id
        for worker in now.fleet.workers
        if worker.new is Standing.READY
        and worker.worker_id not in rollout.swapping
        and (leads or worker.old is not Standing.READY)
    )
    return replace(rollout, swapping=(*rollout.swapping, *names)) if names else rollout


def ready(rollout: Rollout, now: Moment) -> int:
    """Workers that have the new revision ready, and keep it."""
    workers = now.fleet.workers
    return sum(one.new is Standing.READY and one.worker_id in rollout.swapping for one in workers)


def first(rollout: Rollout, now: Moment) -> Rollout:
    """Lets one worker give up the old revision, once all have the files; another where that stays away."""
    if any(worker.worker_id in rollout.swapping for worker in now.fleet.workers):
        return replace(rollout, away_due_ms=0)
    if rollout.swapping and not rollout.away_due_ms:
        return replace(rollout, away_due_ms=now.after(RETURN_S))
    if now.ms < rollout.away_due_ms or not now.all_staged:
        return rollout
    after = one_more(rollout, now)
    # With nobody there it stays as it is: a record that changes with each look would never be at rest.
    if after.swapping == rollout.swapping:
        return rollout
    return replace(after, drain_due_ms=now.after(rollout.spec.drain_timeout_s), away_due_ms=0)


def one_more(rollout: Rollout, now: Moment) -> Rollout:
    """Lets one more worker give up the old revision, once all before it serve the new one."""
    standing = {worker.worker_id: worker.new for worker in now.fleet.workers}
    if any(standing.get(worker_id, Standing.READY) is not Standing.READY for worker_id in rollout.swapping):
        return rollout
    able = {Standing.STAGED, Standing.READY}
    # One that could not load the old revision, say, gives up nothing; another may be the only one that has.
    order = sorted(now.fleet.workers, key=lambda one: one.old is Standing.READY)
    waiting = (one.worker_id for one in order if one.new in able and one.worker_id not in rollout.swapping)
    chosen = next(waiting, None)
    return rollout if chosen is None else replace(rollout, swapping=(*rollout.swapping, chosen))


def undrained(rollout: Rollout, now: Moment) -> str:
    """Why a swap whose first worker still runs what the old revision began cannot go on; else empty."""
    # Those before it are gone.
    asked = next((worker for worker in now.fleet.workers if worker.worker_id in rollout.swapping[-1:]), None)
    if asked is None or asked.old is not Standing.READY or not 0 < rollout.drain_due_ms <= now.ms:
        return ""
    after_s = rollout.spec.drain_timeout_s
    return (
        f"{asked.worker_id}: requests still run on the old revision after {after_s:g} s, "
        "and none is cut. Ask again when they have ended, or with a longer drain_timeout."
    )


def led_back(rollout: Rollout, now: Moment) -> Rollout:
    """Lets another worker go back first, where the one that should is gone, or cannot."""
    able = (worker for worker in now.fleet.workers if worker.old is not Standing.GIVEN_UP)
    names = [worker.worker_id for worker in sorted(able, key=lambda one: one.new is Standing.READY)]
    behind = rollout.swapping[1:]
    if not names or not all(name in behind for name in names):
        return rollout
    others = (name for name in rollout.swapping if name != names[0])
    return replace(rollout, swapping=(names[0], *others))
