"""`interlock rollouts`. Owns: how an operator starts, watches and steers the replacement of a revision."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import rollout_pb2
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door, rows_of
from services.cli.door import Metadata
from services.cli.failure import CommandFailed

_COLUMNS = {
    "id": "ID",
    "model": "MODEL",
    "revision": "REVISION",
    "previous_revision": "BEFORE",
    "strategy": "STRATEGY",
    "state": "STATE",
    "cause": "BECAUSE",
}

_STRATEGIES = {
    "auto": rollout_pb2.ROLLOUT_STRATEGY_AUTO,
    "side-by-side": rollout_pb2.ROLLOUT_STRATEGY_SIDE_BY_SIDE,
    "swap": rollout_pb2.ROLLOUT_STRATEGY_SWAP,
}

# How a call ends whose controller died, stands still, or does not lead any more.
_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# A standby leads within ten seconds of a death, a restarted controller sooner.
_PATIENCE_S = 30.0
_RETRY_S = 0.5

_GOOD, _BAD = "COMPLETED", {"ABORTED", "ROLLED_BACK"}


def start(arguments: argparse.Namespace) -> int:
    """Starts a rollout, and shows it to its end on request; 1 when it does not complete."""
    spec = rollout_pb2.RolloutSpec(
        model=arguments.model,
        revision=arguments.revision,
        strategy=_STRATEGIES[arguments.strategy],
        canary_percent=arguments.canary,
        quorum=arguments.quorum,
        failed_percent_max=arguments.max_failed,
        ttft_ratio_max=arguments.max_ttft,
    )
    spec.bake.FromMilliseconds(round(arguments.bake * 1000))
    made = asyncio.run(_create(spec))
    if arguments.watch:
        return asyncio.run(_watch(made.id, as_json=arguments.json))
    _show([made], as_json=arguments.json)
    return 0


def list_rollouts(arguments: argparse.Namespace) -> int:
    """Prints the rollouts of the mesh."""
    _show(asyncio.run(_list()), as_json=arguments.json)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    """Shows a rollout until its end; 1 when it does not complete."""
    return asyncio.run(_watch(arguments.id, as_json=arguments.json))


def promote(arguments: argparse.Namespace) -> int:
    """Lets the new revision stay."""
    return _tell("PromoteRollout", pb.PromoteRolloutRequest(rollout_id=_chosen(arguments.id)), arguments)


def rollback(arguments: argparse.Namespace) -> int:
    """Gives the route back to the old revision."""
    return _tell("RollBackRollout", pb.RollBackRolloutRequest(rollout_id=_chosen(arguments.id)), arguments)


def cancel(arguments: argparse.Namespace) -> int:
    """Ends a rollout."""
    return _tell("CancelRollout", pb.CancelRolloutRequest(rollout_id=_chosen(arguments.id)), arguments)


def pause(arguments: argparse.Namespace) -> int:
    """Holds a rollout where it is."""
    return _tell("PauseRollout", pb.PauseRolloutRequest(rollout_id=_chosen(arguments.id)), arguments)


def resume(arguments: argparse.Namespace) -> int:
    """Lets a rollout that was held go on."""
    return _tell("ResumeRollout", pb.ResumeRolloutRequest(rollout_id=_chosen(arguments.id)), arguments)


def _tell(method: str, request: Any, arguments: argparse.Namespace) -> int:
    async def call() -> rollout_pb2.Rollout:
        async with entrance(find_door()) as (channel, metadata):
            ask = getattr(ControllerServiceStub(channel), method)
            reply = await ask(request, metadata=metadata, timeout=ANSWER_TIMEOUT_S)
        found: rollout_pb2.Rollout = reply.rollout
        return found

    _show([asyncio.run(call())], as_json=arguments.json)
    return 0


def _chosen(rollout_id: str | None) -> str:
    """The rollout that was named, or the newest."""
    return rollout_id or _newest(asyncio.run(_list()))


def _newest(found: list[rollout_pb2.Rollout]) -> str:
    if not found:
        raise CommandFailed("there is no rollout yet. Start one with `interlock rollouts start`.")
    return found[0].id


async def _create(spec: rollout_pb2.RolloutSpec) -> rollout_pb2.Rollout:
    async with entrance(find_door()) as (channel, metadata):
        reply = await ControllerServiceStub(channel).CreateRollout(
            pb.CreateRolloutRequest(spec=spec), metadata=metadata, timeout=ANSWER_TIMEOUT_S
        )
    return reply.rollout


async def _list() -> list[rollout_pb2.Rollout]:
    async with entrance(find_door()) as (channel, metadata):
        return await _listed(ControllerServiceStub(channel), metadata)


async def _listed(stub: ControllerServiceStub, metadata: Metadata) -> list[rollout_pb2.Rollout]:
    reply = await stub.ListRollouts(pb.ListRolloutsRequest(), metadata=metadata, timeout=ANSWER_TIMEOUT_S)
    return list(reply.rollouts)


async def _watch(rollout_id: str | None, *, as_json: bool) -> int:
    state, console = "", Console(stderr=True)
    if as_json:
        async for found in _changes(rollout_id):
            print(json.dumps(MessageToDict(found, preserving_proto_field_name=True)), flush=True)
            state = _state(found.state)
    else:
        with Live(console=console, refresh_per_second=8) as live:
            async for found in _changes(rollout_id):
                live.update(_drawn(found))
                state = _state(found.state)
    return 0 if state == _GOOD else 1


async def _changes(rollout_id: str | None) -> AsyncIterator[rollout_pb2.Rollout]:
    """A rollout, or the newest, at each of its changes; outlives a controller until the next one leads."""
    lost_s: float | None = None
    async with entrance(find_door()) as (channel, metadata):
        stub = ControllerServiceStub(channel)
        while True:
            try:
                rollout_id = rollout_id or _newest(await _listed(stub, metadata))
                request = pb.WatchRolloutRequest(rollout_id=rollout_id)
                async for response in stub.WatchRollout(request, metadata=metadata):
                    lost_s = None
                    yield response.rollout
            except grpc.aio.AioRpcError as error:
                lost_s = time.monotonic() if lost_s is None else lost_s
                if error.code() not in _LOST or time.monotonic() - lost_s > _PATIENCE_S:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                return


def _drawn(found: rollout_pb2.Rollout) -> Group:
    """A rollout as people watch it: its way so far, and each worker's part."""
    way = Table.grid(padding=(0, 2))
    for entered in found.history:
        name = _state(entered.state)
        style = "green" if name == _GOOD else "red" if name in _BAD else "bold"
        way.add_row(entered.time.ToDatetime().strftime("%H:%M:%S"), Text(name, style), Text(entered.cause))
    workers = Table.grid(padding=(0, 2))
    for worker in found.workers:
        workers.add_row(worker.worker_id, Text(_phase(worker)), Text(worker.failure, "red"))
    head = Text(f"{found.spec.model}: {found.previous_revision} -> {found.spec.revision} ({found.id})")
    return Group(head, way, workers)


def _phase(worker: rollout_pb2.WorkerProgress) -> str:
    name = MessageToDict(worker, preserving_proto_field_name=True).get("phase", "")
    phase = str(name).removeprefix("REVISION_PHASE_").lower().replace("unspecified", "") or "waits"
    if not worker.total_bytes or phase not in {"fetch", "load"}:
        return phase
    return f"{phase} {100 * worker.done_bytes // worker.total_bytes} %"


def _state(number: rollout_pb2.RolloutState.ValueType) -> str:
    return rollout_pb2.RolloutState.Name(number).removeprefix("ROLLOUT_STATE_")


def _show(found: list[rollout_pb2.Rollout], *, as_json: bool) -> None:
    rows = rows_of(found)
    table.show(rows if as_json else [_for_people(row) for row in rows], _COLUMNS, as_json=as_json)


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    spec = row["spec"]
    return {
        **row,
        "model": spec["model"],
        "revision": spec["revision"],
        "strategy": str(spec["strategy"]).removeprefix("ROLLOUT_STRATEGY_").lower().replace("_", "-"),
        "state": str(row["state"]).removeprefix("ROLLOUT_STATE_"),
        "cause": row["history"][-1]["cause"] if row["history"] else "",
    }
