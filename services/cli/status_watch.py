"""`interlock status --watch`. Owns: a picture of the mesh that renews itself, for people or as JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from interlock.v1.controller_service_pb2 import (
    ControllerServiceListModelsRequest,
    ListBreakersRequest,
    ListWorkersRequest,
)
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.cli import breakers, models, status, workers
from services.cli.access import door_of, entrance, rows_of
from services.cli.failure import CommandFailed
from services.local import metrics_reading
from services.local.home import Home
from services.local.state import MeshState

# Members report each second; looking more often shows nothing new.
RENEW_S = 1.0
# What does not answer within this is shown as unknown, not waited for.
_ASK_TIMEOUT_S = 2.0
_LIVE = "interlock_gateway_live"

Rows = list[dict[str, Any]]
Processes = Callable[[MeshState], Rows]


def run(home: Home, read: Callable[[], MeshState], processes: Processes, *, as_json: bool) -> int:
    """Shows the mesh until Ctrl-C, or until it ends.

    Args:
        home: Where the mesh lives.
        read: Returns what runs now, and raises CommandFailed once nothing does.
        processes: Its processes, a row each.
        as_json: One object a line, rather than a picture.
    """
    try:
        asyncio.run(_show(home, read, processes, as_json=as_json))
    except KeyboardInterrupt:
        # This is how people end it.
        return 0
    return 0


async def _show(home: Home, read: Callable[[], MeshState], processes: Processes, *, as_json: bool) -> None:
    task = asyncio.current_task()
    assert task is not None
    # A library may swallow the cancellation that Ctrl-C is; the task still knows of it.
    if as_json:
        while not task.cancelling():
            print(json.dumps(await look(home, read(), processes)), flush=True)
            await asyncio.sleep(RENEW_S)
        return
    console = Console()
    if not console.is_terminal:
        # In a pipe nothing can be drawn over: one picture follows the other.
        while not task.cancelling():
            mesh = read()
            console.print(_picture(mesh, await look(home, mesh, processes)))
            await asyncio.sleep(RENEW_S)
        return
    with Live(console=console, auto_refresh=False) as live:
        while not task.cancelling():
            mesh = read()
            live.update(_picture(mesh, await look(home, mesh, processes)), refresh=True)
            await asyncio.sleep(RENEW_S)


async def look(home: Home, mesh: MeshState, processes: Processes) -> dict[str, Any]:
    """All that can be seen now: `processes`, `queue`, `models`, `workers`, `breakers`.

    What the controller knows is null while it cannot be asked. `queue` counts the requests that the gateways
    have, and how many of them wait for a slot: those that no worker runs.
    """
    asked, rows, live = await asyncio.gather(
        _ask(home, mesh), asyncio.to_thread(processes, mesh), _live_requests(mesh)
    )
    known = asked or {"models": None, "workers": None, "breakers": None}
    status.tell_workers(rows, known["workers"])
    waiting = None
    if live is not None and known["workers"] is not None:
        waiting = max(0, live - sum(row.get("load", {}).get("running", 0) for row in known["workers"]))
    return {"processes": rows, "queue": {"requests": live, "waiting": waiting}, **known}


async def _ask(home: Home, mesh: MeshState) -> dict[str, Rows] | None:
    try:
        async with entrance(door_of(home, mesh)) as (channel, metadata):
            stub = ControllerServiceStub(channel)
            found, attached, held = await asyncio.gather(
                stub.ListModels(
                    ControllerServiceListModelsRequest(), metadata=metadata, timeout=_ASK_TIMEOUT_S
                ),
                stub.ListWorkers(ListWorkersRequest(), metadata=metadata, timeout=_ASK_TIMEOUT_S),
                stub.ListBreakers(ListBreakersRequest(), metadata=metadata, timeout=_ASK_TIMEOUT_S),
            )
    except CommandFailed:
        return None
    return {
        "models": rows_of(found.models),
        "workers": rows_of(attached.workers),
        "breakers": rows_of(held.breakers),
    }


async def _live_requests(mesh: MeshState) -> int | None:
    """Requests that have not ended, of all gateways; None where one cannot be asked."""
    read = await asyncio.gather(*(metrics_reading.read(gateway.metrics) for gateway in mesh.gateways))
    told = [numbers[_LIVE] for numbers in read if numbers is not None and _LIVE in numbers]
    return int(sum(told)) if len(told) == len(read) else None


def _picture(mesh: MeshState, seen: Mapping[str, Any]) -> Group:
    queue = seen["queue"]
    told = {name: "?" if queue[name] is None else str(queue[name]) for name in queue}
    parts: list[RenderableType] = [
        Text(f"{mesh.model} at {mesh.http}", style="bold"),
        Text(f"{told['requests']} requests, {told['waiting']} of them wait for a slot\n"),
        _table(seen["processes"], {"kind": "PROCESS", "id": "ID", "state": "STATE", "address": "ADDRESS"}),
    ]
    if seen["models"] is None:
        return Group(*parts, Text("\nThe controller cannot be asked now; requests are served as before."))
    return Group(
        *parts,
        _table([models.for_people(row) for row in seen["models"]], models.COLUMNS),
        _table([workers.for_people(row) for row in seen["workers"]], workers.COLUMNS),
        _table([breakers.for_people(row) for row in seen["breakers"]], breakers.COLUMNS),
    )


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="dim")
    for heading in columns.values():
        table.add_column(heading)
    for row in rows:
        table.add_row(*(Text(str(row.get(field, ""))) for field in columns))
    return table
