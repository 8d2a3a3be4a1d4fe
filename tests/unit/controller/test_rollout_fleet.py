"""Whom a rollout counts when workers die, and what they load first when they are back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.controller.core.commands import SendPrepare
from services.controller.core.member import (
    Farewell,
    Goal,
    Kind,
    Member,
    Presence,
    Progress,
    Ready,
    Silence,
    StreamBroken,
)
from services.controller.core.membership import Rules, step
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_events import Standing, WorkerView
from services.controller.core.rollout_fleet import fleet, goal, keepers
from services.controller.core.rollout_record import Rollout, Spec, State
from tests.fixtures.rollout_world import World

RULES = Rules(lease_ttl_s=5.0, prepare_timeout_s=600.0, fence=3)
GOAL = Goal("m", {"old": 1, "new": 1}, "r")


def rollout(state: State = State.PREPARING) -> Rollout:
    """One from `old` to `new`."""
    return Rollout(id="r", spec=Spec(model="m", revision="new"), previous="old", state=state)


def worker(step_name: str = "load", phase: Phase = Phase.PREPARING) -> Member:
    """One that serves the old revision and prepares the new one."""
    residents = {"old": Resident(Phase.ACTIVE), "new": Resident(phase, step_name, due_s=900.0)}
    return Member(Kind.WORKER, "w", "i", slots=8, presence=Presence.ATTACHED, residents=residents)


def seen(member: Member, state: State = State.PREPARING) -> tuple[WorkerView, ...]:
    """How a rollout sees it."""
    return fleet(rollout(state), [member], {}).workers


@pytest.mark.parametrize("state", [State.PENDING, State.PREPARING, State.READY, State.BAKING])
def test_a_worker_whose_stream_broke_counts_until_its_lease_ends(state: State) -> None:
    """It holds nothing meanwhile; without it those that are left would be taken for all."""
    broken = step(worker("fetch"), StreamBroken(), GOAL, 1.0, RULES).member
    assert seen(broken, state) == (WorkerView("w"),)
    assert seen(step(broken, Silence(), GOAL, 6.0, RULES).member, state) == ()


@pytest.mark.parametrize("state", [State.ABORTING, State.ROLLING_BACK])
def test_the_way_back_waits_for_nobody_who_is_gone(state: State) -> None:
    """Neither for one that may come back, nor for one that will not."""
    broken = step(worker(), StreamBroken(), GOAL, 1.0, RULES).member
    assert seen(broken, state) == ()
    assert seen(step(broken, Silence(), GOAL, 6.0, RULES).member, state) == ()


@pytest.mark.parametrize("step_name", ["load", "warm"])
def test_a_worker_that_is_lost_while_it_loads_counts_as_failed(step_name: str) -> None:
    """In this rollout alone: one that begins later finds it gone."""
    lost = step(worker(step_name), Silence(), GOAL, 6.0, RULES).member
    (view,) = seen(lost)
    assert (view.new, view.old) == (Standing.FAILED, Standing.FAILED)
    assert "lost while it loaded" in view.failure
    later = Rollout(id="s", spec=Spec(model="m", revision="new"), previous="old", state=State.PREPARING)
    assert fleet(later, [lost], {}).workers == ()


def test_a_worker_that_leaves_or_had_loaded_does_not_fail_when_it_is_lost() -> None:
    """Only a load that was under way may have been its end."""
    assert seen(step(worker(), Farewell(), GOAL, 6.0, RULES).member) == ()
    assert seen(step(worker(phase=Phase.ACTIVE), Silence(), GOAL, 6.0, RULES).member) == ()


SERVING, LOADING = {"old": Resident(Phase.ACTIVE)}, {"old": Resident(Phase.PREPARING)}


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ({"residents": LOADING}, {"residents": SERVING}, "b"),
        ({"residents": {"old": Resident(Phase.RETIRING)}}, {"residents": LOADING}, "b"),
        ({"residents": {"new": Resident(Phase.ACTIVE)}}, {}, "b"),
        ({"residents": SERVING, "quiet": True}, {"residents": SERVING}, "b"),
        ({"residents": SERVING, "quiet": True}, {}, "a"),
        ({"residents": SERVING, "drain_grace_s": 9.0}, {}, "b"),
        ({"residents": SERVING, "presence": Presence.DETACHED}, {}, "b"),
        ({}, {}, "a"),
    ],
)
def test_who_has_a_revision_keeps_it_for_the_requests_that_need_it(
    first: dict[str, Any], second: dict[str, Any], chosen: str
) -> None:
    """Only one does, and nobody does for a revision of no rollout."""
    blank = Member(Kind.WORKER, "", slots=8, presence=Presence.ATTACHED)
    members = [replace(blank, id="a", **first), replace(blank, id="b", **second)]
    assert keepers(rollout(), members, frozenset({"old", "foreign"})) == {"old": chosen}
    assert keepers(rollout(), [], frozenset({"old"})) == {}


async def preparing(world: World) -> None:
    """Two workers that have been told to prepare the new revision; `a` loads it and dies, `b` gets ready."""
    await world.settle()
    for name in "ab":
        world.attach(name)
    await world.settle()
    world.lazy = {"a", "b"}
    await world.start()
    await world.settle()
    world.coordinator.hear(world.key("a"), world.workers["a"], Progress(world.new, "load", 1, 2))
    world.kill("a", farewell=False)
    world.held["b"].add(world.new)
    world.coordinator.hear(world.key("b"), world.workers["b"], Ready(world.new, 1))
    world.lazy = set()
    await world.settle(2)


async def test_the_others_do_not_go_on_alone_while_a_worker_restarts() -> None:
    """All must be ready, and one died of its load: the rollout hears of that, however fast the others are."""
    world = World()
    await preparing(world)
    assert world.states == [State.PENDING, State.PREPARING]
    world.attach("a")
    await world.settle(2)
    assert world.states[-1] is State.ABORTED
    assert world.rollout.history[-1].cause.startswith("a: Its process ended while it loaded the revision")
    assert world.held == {"a": {world.old}, "b": {world.old}}


async def test_a_quorum_goes_on_without_a_worker_that_restarts() -> None:
    """One is enough where an operator said so."""
    world = World()
    await world.settle()
    for name in "ab":
        world.attach(name)
    await world.settle()
    world.lazy = {"a"}
    await world.start(quorum=1, bake_s=600.0)
    world.kill("a", farewell=False)
    await world.settle(1)
    assert world.rollout.state is State.BAKING


@pytest.mark.parametrize(("bakes", "first"), [(False, "old"), (True, "new")])
async def test_workers_that_come_back_load_first_what_is_routed(*, bakes: bool, first: str) -> None:
    """All died, and requests wait for that one; whatever the revisions' names are."""
    for turned in (False, True):
        world = World()
        if turned:
            world.old, world.new = world.new, world.old
        await world.settle()
        world.attach("a")
        await world.settle()
        if turned:
            # The mesh was started with the other one.
            await world.coordinator.start_rollout("before", Spec(model="m", revision=world.old, bake_s=0.0))
            await world.settle(2)
        world.lazy = set() if bakes else {"a"}
        await world.start(revision=world.new, bake_s=600.0)
        await world.settle()
        assert world.rollout.state is (State.BAKING if bakes else State.PREPARING)
        world.kill("a", farewell=False)
        world.lazy = {"a"}
        world.told.clear()
        world.attach("a")
        await world.settle()
        asked = [command.revision for _, command in world.told if isinstance(command, SendPrepare)]
        wanted = {"old": world.old, "new": world.new}
        assert (asked[0], len(asked)) == (wanted[first], 2)


@pytest.mark.parametrize(("state", "first"), [(State.BAKING, "new"), (State.ROLLING_BACK, "old")])
def test_who_is_back_on_the_way_back_loads_first_what_that_leads_to(state: State, first: str) -> None:
    """The route leads to the new revision still: one that kills its workers would kill them again first."""
    whole = goal(rollout(state), worker(), (("new", 100),), epoch=2)
    assert (next(iter(whole.holds)), len(whole.holds)) == (first, 2)
