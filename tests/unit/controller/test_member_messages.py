"""What gateways report of their counts, as it comes by the wire."""

from __future__ import annotations

import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid
from services.common.ttft_buckets import BUCKETS
from services.controller.adapters.member_messages import TALLIES_MAX, read_report
from services.controller.core.judgement import Tally
from services.controller.core.member import Load, LoadReport


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
