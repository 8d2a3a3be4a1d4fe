"""`interlock models`. Owns: the list of what is served, and the fetch of what may be."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from interlock.v1.controller_service_pb2 import ControllerServiceListModelsRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub

from services.cli import table
from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door, rows_of
from services.cli.failure import CommandFailed
from services.local import progress_bar
from services.local.home import Home, HomeUnusable
from services.local.model_store import ModelStore, ModelUnavailable
from services.local.process_toolbox import ProcessToolbox
from services.local.session import ended_by_signals

COLUMNS = {
    "name": "NAME",
    "revision": "REVISION",
    "quantization": "QUANTIZATION",
    "context_tokens": "CONTEXT",
    "ready_workers": "READY WORKERS",
}


def list_models(arguments: argparse.Namespace) -> int:
    """Prints the models of the mesh."""
    rows = asyncio.run(_models())
    if not arguments.json:
        rows = [for_people(row) for row in rows]
    table.show(rows, COLUMNS, as_json=arguments.json)
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Fetches one model and prints where it is."""
    home = Home.of_environment(os.environ)
    store = ModelStore(home.models, ProcessToolbox())
    try:
        store.check_known(arguments.name)
        home.prepare()
        path = store.find(arguments.name)
        if path is None:
            with ended_by_signals(), progress_bar.shown(arguments.name, home.models) as progress:
                path = store.fetch(arguments.name, progress)
    except (ModelUnavailable, HomeUnusable) as error:
        raise CommandFailed(str(error)) from None
    print(path)
    return 0


async def _models() -> list[dict[str, Any]]:
    async with entrance(find_door()) as (channel, metadata):
        reply = await ControllerServiceStub(channel).ListModels(
            ControllerServiceListModelsRequest(), metadata=metadata, timeout=ANSWER_TIMEOUT_S
        )
    return rows_of(reply.models)


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `QUANTIZATION_INT8` as it was asked for: `int8`; what the worker chose itself is `auto`."""
    quantization = str(row["quantization"]).removeprefix("QUANTIZATION_").lower()
    return {**row, "quantization": quantization.replace("unspecified", "auto")}
