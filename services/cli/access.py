"""The way to a mesh. Owns: how a command finds the one it is about, and how it enters."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from services.cli.door import TOKEN, URL, Door, Metadata, bearer, door_elsewhere
from services.cli.failure import CommandFailed
from services.cli.home_mesh import mesh_in
from services.common.channel import connect
from services.common.status import read_error
from services.local.home import Home, HomeUnusable
from services.local.owner_token import renewed_token
from services.local.state import MeshState

# A command's question to a mesh; generation has its own deadline. It outlasts a controller that stands still:
# Envoy gives that up after 9 s, and asks the other one.
ANSWER_TIMEOUT_S = 20.0


def rows_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What a table shows: one object a message, with every field, named as in the protos."""
    return [
        MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for message in messages
    ]


def find_door() -> Door:
    """The door of the mesh that the environment names, else of the one that runs in the home.

    Raises:
        CommandFailed: Nothing runs there, or the environment names no mesh that there can be.
    """
    elsewhere = door_elsewhere(os.environ)
    if elsewhere is not None:
        return elsewhere
    home = Home.of_environment(os.environ)
    return door_of(home, mesh_in(home, otherwise=f", or name one elsewhere by {URL} and {TOKEN}"))


def door_of(home: Home, mesh: MeshState) -> Door:
    """The door of the mesh that runs in a home, for its owner.

    Raises:
        CommandFailed: There is no token that opens it, and none can be made.
    """
    try:
        token = renewed_token(home)
    except HomeUnusable as error:
        raise CommandFailed(str(error)) from None
    return Door(
        address=mesh.http.removeprefix("http://"),
        metadata=bearer(token),
        hint="`interlock status` shows what runs.",
    )


@asynccontextmanager
async def entrance(door: Door) -> AsyncIterator[tuple[grpc.aio.Channel, Metadata]]:
    """A channel through Envoy, and the metadata that lets a call pass.

    Raises:
        CommandFailed: A call in the block failed.
    """
    async with connect(door.address, door.tls) as channel:
        try:
            yield channel, door.metadata
        except grpc.aio.AioRpcError as error:
            raise explained(error, door) from None


def explained(error: grpc.aio.AioRpcError, door: Door) -> CommandFailed:
    """What a command says of a call that failed."""
    told = read_error(error)
    words = told.message or told.code.value
    if told.retry_after_s is not None:
        words += f" Try again in {told.retry_after_s:.1f} s."
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        words += f" {door.hint}"
    return CommandFailed(words, reason=told.reason)
