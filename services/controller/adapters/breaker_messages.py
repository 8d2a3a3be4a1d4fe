"""Breakers as operators see them. Owns: the translation between records and messages of the contract."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid, WorkerUnknown
from services.common.ids import is_valid_id
from services.controller.core.records import BreakerRecord

_STORE = "store"
_FORCED = frozenset({"forced_open", "forced_closed"})
# A mesh may have a thousand workers; a message names some.
_TARGETS_TOLD = 16

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


def check_target(
    target: str, shown: Iterable[BreakerRecord], workers: Iterable[str], holds: Collection[str]
) -> None:
    """Raises unless there is such a target.

    One that is held is a target, also where nobody shows it any more: it can be let go.

    Raises:
        WorkerUnknown: It is no breaker's, no worker's and not held.
    """
    targets = {_STORE, *workers, *(one.target for one in shown)}
    if target not in targets and target not in holds:
        there = ", ".join(sorted(targets)[:_TARGETS_TOLD])
        more = ", …" if len(targets) > _TARGETS_TOLD else ""
        raise WorkerUnknown(f"target: there is no {target!a}; there are {there}{more}.")


def obeyed(shown: Iterable[BreakerRecord], holds: Mapping[str, str]) -> list[BreakerRecord]:
    """The breakers as they are once their gateways have read `holds`, which takes them a second."""
    return [replace(one, state=_obeying(one.state, holds.get(one.target, "closed"))) for one in shown]


def _obeying(state: str, hold: str) -> str:
    """What a gateway does with a breaker: what is neither held nor was it goes its own way."""
    return hold if _FORCED & {state, hold} else state


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
