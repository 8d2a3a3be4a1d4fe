"""What is asked of a rollout, as it comes by the wire."""

from __future__ import annotations

import pytest
from interlock.v1 import rollout_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid
from services.controller.adapters.rollout_messages import read_spec, rollout_message
from services.controller.core.member import Kind, Member, Presence
from services.controller.core.residency import Phase, Resident
from services.controller.core.rollout_record import create


def test_what_is_absent_is_as_the_contract_says() -> None:
    """A spec of two names is judged for a minute, by the usual rules."""
    spec = read_spec(pb.RolloutSpec(model="m", revision="r"))
    assert (spec.canary_percent, spec.bake_s, spec.failed_percent_max, spec.ttft_ratio_max) == (
        100,
        60.0,
        5,
        3,
    )


@pytest.mark.parametrize(("failed", "ratio"), [(0, 0), (100, 100)])
def test_how_much_worse_it_may_be(failed: int, ratio: int) -> None:
    """Both ends of each range are taken, and told again as they were asked for."""
    asked = pb.RolloutSpec(model="m", revision="r", failed_percent_max=failed, ttft_ratio_max=ratio)
    spec = read_spec(asked)
    assert (spec.failed_percent_max, spec.ttft_ratio_max) == (failed, ratio)
    told = rollout_message(create("id", spec, "old", 0), ()).spec
    assert (told.failed_percent_max, told.ttft_ratio_max) == (failed, ratio)


@pytest.mark.parametrize("field", ["bake", "prepare_timeout", "drain_timeout"])
def test_times_are_taken_and_told(field: str) -> None:
    """As they were asked for; more than a day is a mistake in the unit."""
    asked = pb.RolloutSpec(model="m", revision="r")
    getattr(asked, field).FromMilliseconds(61_500)
    spec = read_spec(asked)
    assert getattr(spec, f"{field}_s") == 61.5
    assert getattr(rollout_message(create("id", spec, "old", 0), ()).spec, field) == getattr(asked, field)
    getattr(asked, field).FromSeconds(86_401)
    with pytest.raises(ArgumentInvalid, match=field):
        read_spec(asked)


def test_a_worker_that_has_the_files_is_shown_as_such() -> None:
    """By swap it may wait long for its turn; until it has them it is shown where it is."""
    rollout = create("id", read_spec(pb.RolloutSpec(model="m", revision="r")), "old", 0)
    shown = []
    for resident in (Resident(Phase.STAGING, "verify"), Resident(Phase.STAGED, "verify")):
        worker = Member(Kind.WORKER, "w", presence=Presence.ATTACHED, residents={"r": resident})
        shown.append(rollout_message(rollout, (worker,)).workers[0].phase)
    assert shown == [worker_pb2.REVISION_PHASE_VERIFY, worker_pb2.REVISION_PHASE_STAGED]


@pytest.mark.parametrize(("percent", "refused"), [(99, True), (100, False)])
def test_a_swap_has_no_canary(percent: int, *, refused: bool) -> None:
    """A worker that was swapped has nothing else to serve, so what was asked for would not be done."""
    spec = pb.RolloutSpec(model="m", revision="r", strategy=pb.ROLLOUT_STRATEGY_SWAP, canary_percent=percent)
    if not refused:
        assert read_spec(spec).canary_percent == percent
        return
    with pytest.raises(ArgumentInvalid, match="canary_percent: by swap"):
        read_spec(spec)


@pytest.mark.parametrize("field", ["failed_percent_max", "ttft_ratio_max", "canary_percent"])
def test_more_than_the_most_is_refused(field: str) -> None:
    """The refusal names the field."""
    spec = pb.RolloutSpec(model="m", revision="r")
    setattr(spec, field, 101)
    with pytest.raises(ArgumentInvalid, match=field):
        read_spec(spec)
