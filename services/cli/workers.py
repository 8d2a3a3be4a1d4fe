"""`interlock workers`. Owns: the list of workers, and how one is taken out of service."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from interlock.v1.controller_service_pb2 import DrainWorkerRequest, ListWorkersRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door, rows_of
from services.cli.door import Door
from services.cli.failure import CommandFailed
from services.common.errors import WorkerUnknown

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
    _show(asyncio.run(read_workers(find_door())), as_json=arguments.json)
    return 0


def drain(arguments: argparse.Namespace) -> int:
    """Takes one worker out of service, and prints it as it is then."""
    _show(asyncio.run(_drain(arguments.id)), as_json=arguments.json)
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


async def _drain(worker_id: str) -> list[dict[str, Any]]:
    try:
        async with entrance(find_door()) as (channel, metadata):
            reply = await ControllerServiceStub(channel).DrainWorker(
                DrainWorkerRequest(worker_id=worker_id), metadata=metadata, timeout=ANSWER_TIMEOUT_S
            )
    except CommandFailed as failure:
        if failure.reason != WorkerUnknown.reason:
            raise
        raise CommandFailed(
            f"no worker {worker_id!r} is here; `interlock workers list` shows them."
        ) from None
    return rows_of([reply.worker])


def _show(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    table.show(rows if as_json else [for_people(row) for row in rows], COLUMNS, as_json=as_json)
