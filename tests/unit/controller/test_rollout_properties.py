"""Rollouts under random events: whatever happens, the rules hold, and a calm fleet brings an end."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.core.rollout import TABLE, RolloutEventIllegal, step
from services.controller.core.rollout_events import (
    Begun,
    Cancelled,
    Event,
    FellShort,
    Fleet,
    Observed,
    Paused,
    Promoted,
    Resumed,
    RouteWritten,
    Standing,
    TakenBack,
    WorkerView,
)
from services.controller.core.rollout_goals import worker_goal
from services.controller.core.rollout_record import NEXT, Rollout, Spec, State, Strategy, create

# `make soak` asks for a hundred thousand.
EXAMPLES = int(os.environ.get("INTERLOCK_ROLLOUT_EXAMPLES", "500"))
# A calm fleet needs one look a step: stage, swap and load each worker, then write, judge and tidy up.
CALM_LOOKS_MAX = 60

standings = st.sampled_from(list(Standing))
workers = st.lists(
    st.builds(
        WorkerView,
        st.sampled_from(["w1", "w2", "w3"]),
        new=standings,
        old=standings,
        fits=st.booleans(),
        failure=st.sampled_from(["", "It is corrupt."]),
    ),
    max_size=3,
    unique_by=lambda worker: worker.worker_id,
)
fleets = st.builds(Fleet, workers.map(tuple), st.integers(0, 1))
weights = st.sampled_from([(), (("old", 100),), (("new", 100),), (("new", 10), ("old", 90))])
events: st.SearchStrategy[Event] = st.one_of(
    st.just(Observed()),
    st.builds(RouteWritten, weights),
    st.sampled_from([Begun(), Promoted(), TakenBack(), Cancelled(), Paused(), Resumed()]),
    st.just(FellShort("It is slow.")),
)
specs = st.builds(
    Spec,
    model=st.just("demo"),
    revision=st.just("new"),
    strategy=st.sampled_from(list(Strategy)),
    canary_percent=st.sampled_from([10, 100]),
    bake_s=st.sampled_from([0.0, 5.0]),
    quorum=st.sampled_from([None, 1, 2]),
    prepare_timeout_s=st.just(30.0),
)
stories = st.lists(st.tuples(events, fleets, st.integers(0, 20_000)), max_size=25)


def _check(before: Rollout, after: Rollout, fleet: Fleet) -> None:
    states = [one.state for one in after.history]
    assert all(following in NEXT[state] for state, following in pairwise(states))
    assert states[-1] is after.state
    names = {name for name, _ in after.route}
    assert sum(share for _, share in after.route) == 100
    if "new" in names and "new" not in {name for name, _ in before.route}:
        assert any(worker.new is Standing.READY for worker in fleet.workers)
    if after.state is State.COMPLETED:
        assert after.route == after.written == (("new", 100),)
    if after.state in {State.ROLLED_BACK, State.PENDING, State.PREPARING, State.ABORTING, State.ABORTED}:
        assert after.route == (("old", 100),)
    assert not (after.ended and after.paused)


@settings(max_examples=EXAMPLES)
@given(specs, stories)
def test_no_sequence_of_events_breaks_a_rule(spec: Spec, story: list[tuple[Event, Fleet, int]]) -> None:
    """Illegal events change nothing; legal ones follow the diagram; the route never names what nobody had."""
    rollout, now_ms = create("r1", spec, "old", 0), 0
    for event, fleet, passed_ms in story:
        now_ms += passed_ms
        before = rollout
        try:
            rollout = step(before, event, fleet, now_ms).rollout
        except RolloutEventIllegal:
            assert (before.state, type(event)) not in TABLE
            continue
        _check(before, rollout, fleet)


def _obeyed(worker: WorkerView, rollout: Rollout) -> WorkerView:
    """The worker one step nearer to its goal; nothing fails any more."""
    goal = worker_goal(rollout, worker.worker_id)
    old = _towards(wanted="old" in goal.holds, staged=goal.stages == "old")
    # Where there is no room for both, what is not wanted goes before the other is loaded.
    blocked = worker.old is Standing.READY and "old" not in goal.holds
    new = worker.new if blocked else _towards(wanted="new" in goal.holds, staged=goal.stages == "new")
    return replace(worker, old=old, new=new, failure="")


def _towards(*, wanted: bool, staged: bool) -> Standing:
    if wanted:
        return Standing.READY
    return Standing.STAGED if staged else Standing.ABSENT


@settings(max_examples=EXAMPLES)
@given(specs, stories, workers.filter(bool))
def test_a_calm_fleet_brings_every_rollout_to_its_end(
    spec: Spec, story: list[tuple[Event, Fleet, int]], left: list[WorkerView]
) -> None:
    """After any story: once workers obey and the store takes writes, it ends within a bounded time."""
    rollout, now_ms = create("r1", spec, "old", 0), 0
    for event, fleet, passed_ms in story:
        now_ms += passed_ms
        rollout = _tried(rollout, event, fleet, now_ms)
    fleet = Fleet(tuple(left))
    for event in (Begun(), Resumed()):
        rollout = _tried(rollout, event, fleet, now_ms)
    for _ in range(CALM_LOOKS_MAX):
        if rollout.ended:
            break
        now_ms += 1_000
        fleet = Fleet(tuple(_obeyed(worker, rollout) for worker in fleet.workers))
        for event in (Observed(), RouteWritten(rollout.route)):
            rollout = _tried(rollout, event, fleet, now_ms)
    assert rollout.ended, (rollout.state, rollout.route, fleet)


def _tried(rollout: Rollout, event: Event, fleet: Fleet, now_ms: int) -> Rollout:
    try:
        return step(rollout, event, fleet, now_ms).rollout
    except RolloutEventIllegal:
        return rollout


def test_goals_hold_what_the_route_names() -> None:
    """While a share of the requests goes to a revision, workers are asked to hold it."""
    fleet = Fleet((WorkerView("w1", Standing.READY, Standing.READY),))
    spec = Spec(model="demo", revision="new", canary_percent=10)
    rollout = create("r1", spec, "old", 0)
    forth: tuple[Event, ...] = (Begun(), RouteWritten((("new", 10), ("old", 90))))
    for event in forth:
        rollout = step(rollout, event, fleet, 0).rollout
        assert worker_goal(rollout, "w1").holds == {"old", "new"}
    assert rollout.state is State.BAKING
    back: tuple[Event, ...] = (TakenBack(), RouteWritten((("old", 100),)))
    for event in back:
        rollout = step(rollout, event, fleet, 0).rollout
    assert rollout.state is State.ROLLED_BACK
    assert worker_goal(rollout, "w1").holds == {"old"}
