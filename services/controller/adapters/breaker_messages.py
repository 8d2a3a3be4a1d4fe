"""Breakers as operators see them. Owns: the translation between records and messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid
from services.common.ids import is_valid_id
from services.controller.core.records import BreakerRecord

_STATES = MappingProxyType(
    {
        "closed": worker_pb2.BREAKER_STATE_CLOSED,
        "open": worker_pb2.BREAKER_STATE_OPEN,
        "half_open": worker_pb2.BREAKER_STATE_HALF_OPEN,
        "forced_open": worker_pb2.BREAKER_STATE_FORCED_OPEN,
        "forced_closed": worker_pb2.BREAKER_STATE_FORCED_CLOSED,
    }
)
# What an operator may ask for.
_HOLDS = MappingProxyType(
    {_STATES[name]: name for name in ("closed", "forced_open", "forced_closed")},
)


def read_hold(request: pb.ForceBreakerRequest) -> tuple[str, str]:
    """The target and the state that is asked for.

    Raises:
        ArgumentInvalid: One of them cannot be.
    """
    if not is_valid_id(request.target):
        raise ArgumentInvalid("target: must be a worker's id, or `store`.")
    if request.state not in _HOLDS:
        raise ArgumentInvalid("state: must be FORCED_OPEN, FORCED_CLOSED, or CLOSED to let it go.")
    return request.target, _HOLDS[request.state]


def breaker_messages(records: Iterable[BreakerRecord]) -> list[worker_pb2.Breaker]:
    """One message a record."""
    return [_message(record) for record in records]


def _message(record: BreakerRecord) -> worker_pb2.Breaker:
    changed = Timestamp()
    changed.FromMilliseconds(round(record.changed_s * 1000))
    return worker_pb2.Breaker(
        gateway_id=record.gateway_id,
        target=record.target,
        state=_STATES.get(record.state, worker_pb2.BREAKER_STATE_UNSPECIFIED),
        calls=record.calls,
        failures=record.failures,
        change_time=changed,
    )
