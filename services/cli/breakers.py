"""`interlock breakers`. Owns: the list of breakers, and how an operator holds one or lets it go."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from interlock.v1.controller_service_pb2 import ForceBreakerRequest, ListBreakersRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from interlock.v1.worker_pb2 import (
    BREAKER_STATE_CLOSED,
    BREAKER_STATE_FORCED_CLOSED,
    BREAKER_STATE_FORCED_OPEN,
    BreakerState,
)

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door, rows_of
from services.cli.door import Door

COLUMNS = {
    "gateway_id": "GATEWAY",
    "target": "TARGET",
    "state": "STATE",
    "calls": "CALLS",
    "failures": "FAILURES",
    "change_time": "SINCE",
}

_HOLDS = {"open": BREAKER_STATE_FORCED_OPEN, "closed": BREAKER_STATE_FORCED_CLOSED}


def list_breakers(arguments: argparse.Namespace) -> int:
    """Prints the breakers of all gateways."""
    _show(asyncio.run(read_breakers(find_door())), as_json=arguments.json)
    return 0


def force(arguments: argparse.Namespace) -> int:
    """Holds the breakers of one target open or closed."""
    _show(asyncio.run(_force(arguments.target, _HOLDS[arguments.state])), as_json=arguments.json)
    return 0


def release(arguments: argparse.Namespace) -> int:
    """Lets the breakers of one target go."""
    _show(asyncio.run(_force(arguments.target, BREAKER_STATE_CLOSED)), as_json=arguments.json)
    return 0


async def read_breakers(door: Door, *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[dict[str, Any]]:
    """The breakers of a mesh, one object each, fields as in the protos."""
    async with entrance(door) as (channel, metadata):
        reply = await ControllerServiceStub(channel).ListBreakers(
            ListBreakersRequest(), metadata=metadata, timeout=timeout_s
        )
    return rows_of(reply.breakers)


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a state as people say it."""
    state = str(row["state"]).removeprefix("BREAKER_STATE_").lower().replace("_", " ")
    return {**row, "state": state}


async def _force(target: str, state: BreakerState.ValueType) -> list[dict[str, Any]]:
    async with entrance(find_door()) as (channel, metadata):
        reply = await ControllerServiceStub(channel).ForceBreaker(
            ForceBreakerRequest(target=target, state=state), metadata=metadata, timeout=ANSWER_TIMEOUT_S
        )
    return rows_of(reply.breakers)


def _show(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    table.show(rows if as_json else [for_people(row) for row in rows], COLUMNS, as_json=as_json)
