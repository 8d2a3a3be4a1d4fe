"""The route's epochs, and when a revision is switched to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.controller.core import routing
from services.controller.core.member import Kind, Member, Presence
from services.controller.core.records import Route
from services.controller.core.residency import Phase, Resident

NUMBERS = st.integers(min_value=0, max_value=2**60)


def member(kind: Kind, phase: Phase, presence: Presence = Presence.ATTACHED) -> Member:
    """A member with the revision `new` in a phase."""
    return Member(kind, "x", presence=presence, residents={"new": Resident(phase)})


@given(NUMBERS, NUMBERS, NUMBERS)
def test_epoch_is_above_everything_seen(stored: int, reported: int, now_ms: int) -> None:
    """A new epoch is higher than those of store and members, and never behind the clock."""
    epoch = routing.next_epoch(stored, reported, now_ms)
    assert epoch > stored
    assert epoch > reported
    assert epoch >= now_ms


def test_claim_keeps_what_serves() -> None:
    """A controller that begins keeps the weights it finds, and announces the switch one epoch above."""
    plan = routing.claim("new", Route(7, 1, {"old": 100}), 0, 5)
    assert plan == routing.Plan("new", 8, {"old": 100})
    assert plan.serving_epoch == 9
    assert routing.switch(plan) == routing.Plan("new", 9, {"new": 100})


def test_claim_of_the_same_revision_is_switched() -> None:
    """A restart with the same model serves on at the claimed epoch."""
    plan = routing.claim("new", Route(7, 1, {"new": 100}), 0, 1_000)
    assert plan.switched
    assert plan.serving_epoch == plan.epoch == 1_000


def test_raised_is_above_what_members_heard() -> None:
    """An epoch that was announced but not yet written is not used for another route."""
    plan = routing.Plan("new", 8, {})
    assert routing.raised(plan, None, 0, 0).epoch > plan.serving_epoch


def test_no_switch_without_a_worker() -> None:
    """Until a worker serves the revision the route stays."""
    plan = routing.Plan("new", 8, {})
    assert not routing.may_switch(plan, [])
    assert not routing.may_switch(plan, [member(Kind.WORKER, Phase.READY)])
    assert not routing.may_switch(plan, [member(Kind.WORKER, Phase.ACTIVE, Presence.LOST)])
    assert routing.may_switch(plan, [member(Kind.WORKER, Phase.ACTIVE)])


def test_no_switch_before_gateways_can_render() -> None:
    """A gateway that still fetches the tokenizer holds the switch up; one that failed or left does not."""
    plan, worker = routing.Plan("new", 8, {}), member(Kind.WORKER, Phase.ACTIVE)
    assert not routing.may_switch(plan, [worker, member(Kind.GATEWAY, Phase.PREPARING)])
    assert not routing.may_switch(plan, [worker, Member(Kind.GATEWAY, "g", presence=Presence.ATTACHED)])
    assert routing.may_switch(plan, [worker, member(Kind.GATEWAY, Phase.READY)])
    assert routing.may_switch(plan, [worker, member(Kind.GATEWAY, Phase.FAILED)])
    assert routing.may_switch(plan, [worker, member(Kind.GATEWAY, Phase.PREPARING, Presence.DETACHED)])
