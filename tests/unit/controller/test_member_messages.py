"""What gateways report of their counts, as it comes by the wire."""

from __future__ import annotations

import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid
from services.common.ttft_buckets import BUCKETS
from services.controller.adapters.member_messages import (
    TALLIES_MAX,
    command_message,
    read_hello,
    read_report,
)
from services.controller.core.catalog import Catalog, Manifest, Revision
from services.controller.core.commands import SendPrepare, SendStage
from services.controller.core.judgement import Tally
from services.controller.core.member import Load, LoadReport, Staged
from services.controller.core.residency import Phase


def report(*tallies: pb.RevisionTally) -> pb.AttachRequest:
    """A gateway's sign of life."""
    return pb.AttachRequest(load=worker_pb2.WorkerLoad(), tallies=tallies)


def test_counts_come_with_the_sign_of_life() -> None:
    """By model and revision; a gateway that counts nothing says nothing."""
    counts = [0] * BUCKETS
    counts[-1] = 2
    one = pb.RevisionTally(model="m", revision="r1", finished=2, failed=1, ttft_counts=counts)
    heard = read_report(report(one, pb.RevisionTally(model="m", revision="r2")))
    assert heard == LoadReport(Load(), {"m": {"r1": Tally(2, 1, tuple(counts)), "r2": Tally()}})
    assert read_report(report()) == LoadReport(Load())


@pytest.mark.parametrize(
    ("phase", "staging", "held"),
    [
        (worker_pb2.REVISION_PHASE_FETCH, True, Phase.STAGING),
        (worker_pb2.REVISION_PHASE_VERIFY, False, Phase.PREPARING),
        (worker_pb2.REVISION_PHASE_STAGED, True, Phase.STAGED),
        (worker_pb2.REVISION_PHASE_FAILED, True, Phase.FAILED),
    ],
)
def test_a_worker_says_whether_it_loads_what_it_fetches(
    phase: worker_pb2.RevisionPhase.ValueType, held: Phase, *, staging: bool
) -> None:
    """A new controller must not take the old revision from a worker that only fetches the new one's files."""
    found = worker_pb2.ResidentRevision(model="m", revision="r1", phase=phase, staging=staging)
    hello = pb.Hello(
        kind=pb.MEMBER_KIND_WORKER, id="w", incarnation="i", address="h:1", slots=1, revisions=[found]
    )
    assert read_hello(pb.AttachRequest(hello=hello)).residents["r1"].phase is held


def test_files_alone_are_asked_for_and_answered() -> None:
    """By the message that asks for all of it, with one word more."""
    catalog = Catalog()
    manifest = Manifest("m", "", (), "none", "auto", 64, "t").named()
    catalog.register(Revision(manifest, "", 0.0))
    sent = command_message(SendStage("m", manifest.revision, "roll"), catalog).prepare
    assert (sent.manifest.revision, sent.stage_only) == (manifest.revision, True)
    assert not command_message(SendPrepare("m", manifest.revision, ""), catalog).prepare.stage_only
    assert read_report(pb.AttachRequest(staged=pb.Staged(revision="r1"))) == Staged("r1")


@pytest.mark.parametrize(
    "tallies",
    [
        [pb.RevisionTally(model="m", revision="r")] * (TALLIES_MAX + 1),
        [pb.RevisionTally(model="m", revision="r", ttft_counts=[0] * (BUCKETS + 1))],
        [pb.RevisionTally(model="m", revision="no name")],
    ],
)
def test_more_than_there_can_be_is_refused(tallies: list[pb.RevisionTally]) -> None:
    """What a gateway cannot mean ends its stream."""
    with pytest.raises(ArgumentInvalid):
        read_report(report(*tallies))
