"""`interlock status`. Owns: what a command sees of the local mesh from outside, and asks its controller.

A process that hangs listens all the same, so that only the controller knows of a worker that does.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from services.cli import table
from services.cli.failure import CommandFailed
from services.cli.home_mesh import mesh_in
from services.local.home import Home
from services.local.state import MeshState, Part

# On one machine a listener answers at once.
_CONNECT_TIMEOUT_S = 0.5
# What runs is told also while nobody can be asked for more.
_ASK_TIMEOUT_S = 2.0

# Of several controllers one leads; the others stand by, and are well. A worker drains as it was told to.
_WELL = {"running", "leading", "standby", "draining"}

_COLUMNS = {"kind": "KIND", "id": "ID", "state": "STATE", "address": "ADDRESS", "pid": "PID"}


def run(arguments: argparse.Namespace) -> int:
    """Prints one line a process. Returns 1 when one of them is not well. Breakers follow."""
    home = Home.of_environment(os.environ)
    if os.environ.get("INTERLOCK_URL"):
        # Of a mesh elsewhere the processes cannot be seen.
        print(f"interlock: status is of the mesh in {home.path}, not of INTERLOCK_URL.", file=sys.stderr)
    mesh = mesh_in(home)
    if arguments.watch:
        # Loaded late, as below.
        watch = importlib.import_module("services.cli.status_watch")
        code: int = watch.run(home, lambda: mesh_in(home), _rows, as_json=arguments.json)
        return code
    rows = _rows(mesh)
    workers, breakers = _ask(home, mesh)
    tell_workers(rows, workers)
    if not arguments.json:
        _headline(home, mesh)
    table.show([*rows, *breakers], _COLUMNS, as_json=arguments.json)
    return 0 if _is_well(rows) else 1


def _rows(mesh: MeshState) -> list[dict[str, str | int]]:
    rows = [_row(kind, part) for kind, part in mesh.parts()]
    if len(mesh.controllers) > 1:
        _tell_leader([row for row in rows if row["kind"] == "controller" and row["state"] == "running"])
    return rows


def _is_well(rows: list[dict[str, str | int]]) -> bool:
    """Whether everything runs, and of several controllers one leads."""
    states = {row["state"] for row in rows}
    return states <= _WELL and ("standby" not in states or "leading" in states)


def _tell_leader(rows: list[dict[str, str | int]]) -> None:
    """Says of several controllers which one leads: it alone is SERVING."""
    # Loaded late, as below.
    probes = importlib.import_module("services.local.probes")

    async def ask() -> list[object]:
        asked = (asyncio.wait_for(probes.serving(row["address"]), _ASK_TIMEOUT_S) for row in rows)
        return list(await asyncio.gather(*asked, return_exceptions=True))

    for row, serves in zip(rows, asyncio.run(ask()), strict=True):
        row["state"] = "leading" if serves is True else "standby" if serves is None else "unreachable"


def tell_workers(rows: list[dict[str, str | int]], workers: list[dict[str, Any]] | None) -> None:
    """Says of workers that run how they are to the controller.

    Args:
        rows: The processes.
        workers: The controller's, fields as in the protos; None: it could not be asked, and nothing changes.
    """
    if workers is None:
        return
    # Loaded late, as below.
    module = importlib.import_module("services.cli.workers")
    states = {worker["id"]: module.state_for_people(worker) for worker in workers}
    for row in rows:
        if row["kind"] == "worker" and row["state"] == "running":
            # It has not come to this controller, which may be new itself, or was lost so long ago that it is
            # forgotten.
            told = states.get(row["id"], "unattached")
            row["state"] = "running" if told == "serving" else told


def _headline(home: Home, mesh: MeshState) -> None:
    print(f"{mesh.model} at {mesh.http} (home {home.path}, supervisor {mesh.pid})\n")


def _ask(home: Home, mesh: MeshState) -> tuple[list[dict[str, Any]] | None, list[dict[str, str | int]]]:
    """The controller's workers, and a line a breaker; None and no lines where it cannot be asked."""
    # Loaded only where there is a mesh to ask: without one the command answers before gRPC would be there.
    access = importlib.import_module("services.cli.access")
    breakers = importlib.import_module("services.cli.breakers")
    workers = importlib.import_module("services.cli.workers")

    try:
        door = access.door_of(home, mesh)
    except CommandFailed:
        return None, []

    async def ask() -> list[Any]:
        asked = (
            read(door, timeout_s=_ASK_TIMEOUT_S) for read in (workers.read_workers, breakers.read_breakers)
        )
        # It can know its workers and not the breakers: those are in the store.
        return list(await asyncio.gather(*asked, return_exceptions=True))

    found, shown = (_unless_failed(told) for told in asyncio.run(ask()))
    return found, [
        {
            "kind": "breaker",
            "id": f"{row['gateway_id']}/{row['target']}",
            "state": str(breakers.for_people(row)["state"]),
            "address": "",
            "pid": "",
        }
        for row in shown or ()
    ]


def _unless_failed(told: Any) -> list[dict[str, Any]] | None:
    """What was told; None: the question failed."""
    if isinstance(told, CommandFailed):
        return None
    if isinstance(told, BaseException):
        raise told
    rows: list[dict[str, Any]] = told
    return rows


def _row(kind: str, part: Part) -> dict[str, str | int]:
    return {
        "kind": kind,
        "id": part.id,
        "state": _state(part),
        "address": part.address,
        "pid": part.pid,
    }


def _state(part: Part) -> str:
    if part.pid == 0:
        return "running" if _listens(part.address) else "unreachable"
    if not Path(f"/proc/{part.pid}").exists():
        return "restarting"
    return "running" if _listens(part.address) else "starting"


def _listens(address: str) -> bool:
    family, target = _target(address)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(target)
        except OSError:
            return False
    return True


def _target(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Where to knock: a Unix socket's path, or host and port of `host:port` or of a URL."""
    scheme, separator, rest = address.partition("://")
    if scheme == "unix":
        return socket.AF_UNIX, unquote(rest.partition("?")[0])
    place = (rest if separator else address).partition("/")[0]
    # A list of sentinels or cluster nodes: the first one stands for all.
    host, _, port = place.partition(",")[0].rpartition(":")
    return socket.AF_INET, (host or place, int(port) if port.isdecimal() else 6379)
