"""The way to the local mesh. Owns: how a command finds it, and with which token and channel it calls."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.cli.failure import CommandFailed
from services.common.channel import connect
from services.common.status import read_error
from services.local import state
from services.local.home import Home
from services.local.owner_token import renewed_token
from services.local.state import MeshState

# A command's question to a mesh on the same machine; generation has its own deadline. It outlasts a
# controller that stands still: Envoy gives that up after 9 s, and asks the other one.
ANSWER_TIMEOUT_S = 20.0

Metadata = tuple[tuple[str, str], ...]


def rows_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What a table shows: one object a message, with every field, named as in the protos."""
    return [
        MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for message in messages
    ]


def running_mesh() -> tuple[Home, MeshState]:
    """The home and what runs in it.

    Raises:
        CommandFailed: Nothing runs.
    """
    home = Home.of_environment(os.environ)
    found = state.read(home.state_file)
    if found is None or home.holder() is None:
        raise CommandFailed(f"no mesh runs in {home.path}. Start one with `interlock up`.")
    return home, found


@asynccontextmanager
async def entrance(home: Home, mesh: MeshState) -> AsyncIterator[tuple[grpc.aio.Channel, Metadata]]:
    """A channel through Envoy, and the metadata that lets a call pass.

    Raises:
        CommandFailed: A call in the block failed.
    """
    metadata = (("authorization", f"Bearer {renewed_token(home)}"),)
    async with connect(mesh.http.removeprefix("http://")) as channel:
        try:
            yield channel, metadata
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from None


def _explained(error: grpc.aio.AioRpcError) -> CommandFailed:
    told = read_error(error)
    words = told.message or told.code.value
    if told.retry_after_s is not None:
        words += f" Try again in {told.retry_after_s:.1f} s."
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        words += " `interlock status` shows what runs."
    return CommandFailed(words, reason=told.reason)
