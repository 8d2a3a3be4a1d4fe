"""Who may not call the controller, on every method that it has, and what must not be left out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2
from interlock.v1 import controller_service_pb2 as pb

from services.common import channel
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import JWT_SECRET, Controller, bearer, started
from tests.fixtures.any_call import methods_of, path_of, refusal
from tests.fixtures.gateway_world import read_reply, reason_of
from tests.fixtures.token_forge import BAD_TOKENS, BadToken, Signer

METHODS = methods_of(pb, "ControllerService")
# Members' calls carry the mesh credential; a token is none.
MESH = {"Attach", "DownloadRevision"}
READABLE = {"ListModels"}
# Bytes that are no message of any method.
NOISE = b"\xff\xff"


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    """A controller with one model and no member."""
    async with started(tmp_path, MemoryRouteStore()) as running:
        await running.serving()
        yield running


@pytest.fixture
async def wire(controller: Controller) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to it."""
    async with channel.connect(controller.address) as connection:
        yield connection


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_a_user_token_opens_no_admin_call(wire: grpc.aio.Channel, method: Any) -> None:
    """UNAUTHENTICATED without a token, PERMISSION_DENIED with a user's; members' calls take no token.

    What the message is nobody has looked at: one of 4 MiB would hold up the leader for as long as it is read.
    """
    scopes = ["generate", "priority:system", *([] if method.name in READABLE else ["models:read"])]
    for metadata, reason in (((), "TOKEN_MISSING"), (bearer(*scopes), "SCOPE_MISSING")):
        error = await refusal(wire, method, metadata, NOISE)
        assert reason_of(error) == ("MESH_CREDENTIAL_INVALID" if method.name in MESH else reason)
    if method.name in MESH:
        error = await refusal(wire, method, (*bearer("admin"), ("x-interlock-mesh-token", "x" * 32)), NOISE)
        assert reason_of(error) == "MESH_CREDENTIAL_INVALID"


@pytest.mark.parametrize("method", [m for m in METHODS if m.name in READABLE], ids=lambda m: m.name)
async def test_what_more_than_operators_may_ask_has_nothing_to_read(
    wire: grpc.aio.Channel, method: Any
) -> None:
    """Only an operator's message is decoded, so a field here would be empty for everybody else."""
    assert not method.input_type.fields
    call: Any = wire.unary_unary(path_of(method))
    await call(b"", metadata=bearer("models:read"))


@pytest.mark.parametrize(
    "method", methods_of(http_service_pb2, "AdminHttpService"), ids=lambda method: method.name
)
async def test_a_user_token_opens_no_admin_path(wire: grpc.aio.Channel, method: Any) -> None:
    """401 and 403 in JSON on every path, whatever the message is."""
    call: Any = wire.unary_stream(path_of(method), response_deserializer=HttpBody.FromString)
    for metadata, expected in (((), 401), (bearer("generate"), 403)):
        reply = await read_reply(call(NOISE, metadata=metadata))
        assert reply.status == expected
        assert reply.headers["x-request-id"]


# What was revoked is in the controller's own list, which has a test of its own.
BAD_HERE = [bad for bad in BAD_TOKENS if bad.reason != "TOKEN_REVOKED"]


@pytest.mark.parametrize("bad", BAD_HERE, ids=lambda bad: bad.name)
async def test_a_bad_token_is_no_operators(wire: grpc.aio.Channel, bad: BadToken) -> None:
    """The rules are the gateway's."""
    token = bad.make(Signer("HS256", JWT_SECRET))
    method = next(method for method in METHODS if method.name == "ListWorkers")
    error = await refusal(wire, method, (("authorization", f"Bearer {token}"),))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, bad.reason)
    call: Any = wire.unary_unary(path_of(method))
    await call(b"", metadata=bearer("admin"))


@pytest.mark.parametrize(
    ("name", "request_", "named"),
    [
        ("ListRevisions", pb.ListRevisionsRequest(), "model"),
        ("GetRevision", pb.GetRevisionRequest(revision="r"), "model"),
        ("GetRevision", pb.GetRevisionRequest(model="m"), "revision"),
        ("DrainWorker", pb.DrainWorkerRequest(), "worker_id"),
        ("RevokeToken", pb.RevokeTokenRequest(), "token_id"),
    ],
    ids=str,
)
async def test_a_name_that_is_left_out_is_named(
    wire: grpc.aio.Channel, name: str, request_: Any, named: str
) -> None:
    """INVALID_ARGUMENT, not "there is no such thing": nothing was asked for."""
    method = next(method for method in METHODS if method.name == name)
    error = await refusal(wire, method, bearer("admin"), request_.SerializeToString())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(named)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name not in MESH], ids=lambda method: method.name)
async def test_bytes_that_are_no_message_are_refused(wire: grpc.aio.Channel, method: Any) -> None:
    """INVALID_ARGUMENT on every method that an operator may call; never INTERNAL."""
    error = await refusal(wire, method, bearer("admin"), NOISE)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
