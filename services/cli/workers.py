"""`interlock workers`. Owns: the list of workers as the controller sees them."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from interlock.v1.controller_service_pb2 import ListWorkersRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door, rows_of
from services.cli.door import Door

COLUMNS = {
    "id": "ID",
    "state": "STATE",
    "address": "ADDRESS",
    "revisions": "REVISIONS",
    "running": "RUNNING",
    "slots": "SLOTS",
}


def list_workers(arguments: argparse.Namespace) -> int:
    """Prints the workers of the mesh."""
    rows = asyncio.run(read_workers(find_door()))
    if not arguments.json:
        rows = [for_people(row) for row in rows]
    table.show(rows, COLUMNS, as_json=arguments.json)
    return 0


async def read_workers(door: Door, *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[dict[str, Any]]:
    """The workers of a mesh, one object each, fields as in the protos."""
    async with entrance(door) as (channel, metadata):
        reply = await ControllerServiceStub(channel).ListWorkers(
            ListWorkersRequest(), metadata=metadata, timeout=timeout_s
        )
    return rows_of(reply.workers)


def state_for_people(row: dict[str, Any]) -> str:
    """A worker's state as people say it."""
    return str(row["state"]).removeprefix("WORKER_STATE_").lower()


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    """A row with states and revisions as people say them."""
    load = row.get("load", {})
    revisions = (
        f"{found['model']}@{found['revision']} {found['phase'].removeprefix('REVISION_PHASE_').lower()}"
        for found in row["revisions"]
    )
    return {
        "id": row["id"],
        "state": state_for_people(row),
        "address": row["address"],
        "revisions": ", ".join(revisions),
        "running": load.get("running", 0),
        "slots": load.get("slots", 0),
    }
