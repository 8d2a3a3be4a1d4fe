"""What the gRPC face reads of a message: nothing one by one before it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from interlock.v1 import gateway_service_pb2 as pb

from services.common.errors import ArgumentInvalid
from services.gateway import servicer
from tests.fixtures.large_calls import LARGE_CALLS

COUNTED = ("turns", "stop strings", "biases", "choices")


def least_s(work: Callable[[], Any]) -> float:
    """The processor's time that something takes, whatever else the machine does."""
    taken_s = []
    for _ in range(3):
        begun_s = time.thread_time()
        work()
        taken_s.append(time.thread_time() - begun_s)
    return min(taken_s)


@pytest.mark.parametrize("name", COUNTED)
def test_too_much_is_refused_before_it_is_read(name: str) -> None:
    """In a small part of the time that its bytes alone have taken, which nobody can spare."""
    large = LARGE_CALLS[name]
    data = large.make()
    request = pb.GenerateRequest.FromString(data)

    def refuse() -> None:
        with pytest.raises(ArgumentInvalid) as refused:
            servicer.read_request(request)
        assert refused.value.message.startswith(large.words)

    assert least_s(refuse) < least_s(lambda: pb.GenerateRequest.FromString(data)) / 5
