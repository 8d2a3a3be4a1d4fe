"""What a worker of a swap holds while somebody waits for the other revision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.controller.core.member import Goal, Kind, Member, Presence
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_fleet import goal_after
from services.controller.core.rollout_record import Rollout, Spec, State, Strategy, create

OLD, NEW = "old", "new"
EPOCH = 7
WANTED, AWAITED = Goal("m", {OLD: EPOCH}), frozenset({NEW})


def rolled_back() -> Rollout:
    """A swap that ended where it began."""
    made = create("r", Spec(model="m", revision=NEW), OLD, 1)
    return replace(made, strategy=Strategy.SWAP, state=State.ROLLED_BACK, swapping=("b", "a"))


def member(old: Phase, new: Phase) -> Member:
    """A worker that is here."""
    residents = {OLD: Resident(phase=old), NEW: Resident(phase=new)}
    return Member(Kind.WORKER, "a", presence=Presence.ATTACHED, residents=residents)


@pytest.mark.parametrize("leaving", [Phase.RETIRING, Phase.ABORTING])
def test_what_is_awaited_is_loaded_when_what_was_wanted_is_gone(leaving: Phase) -> None:
    """Memory is for one copy: it is still taken by what is on its way out."""
    goal = goal_after(rolled_back(), member(leaving, Phase.STAGED), WANTED, AWAITED)
    assert not goal.holds
    assert goal.quiet
    assert goal.stages == {OLD}
    goal = goal_after(rolled_back(), member(Phase.ABSENT, Phase.STAGED), WANTED, AWAITED)
    assert dict(goal.holds) == {NEW: EPOCH}


def test_what_is_awaited_stays_while_the_other_one_leaves() -> None:
    """Who waits for it finds it."""
    goal = goal_after(rolled_back(), member(Phase.RETIRING, Phase.ACTIVE), WANTED, AWAITED)
    assert dict(goal.holds) == {NEW: EPOCH}
