"""Wrong, early, late and too much: each is told clearly, and the next request works."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as controller_pb
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub

from services.common.tokens import mint
from tests.fixtures.mesh import Mesh

# Keeps a compiler of grammars busy for minutes.
ENDLESS = {"type": "string", "allOf": [{"pattern": f".*{number}.{{5}}x.*"} for number in range(1_500)]}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def stub(mesh: Mesh) -> Iterator[Any]:
    """A blocking gRPC client through Envoy."""
    with grpc.insecure_channel(mesh.address) as channel:
        yield gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def reason_of(error: Any) -> str:
    """The machine-readable reason of a failed call, without its prefix."""
    return str(dict(error.trailing_metadata())["interlock-reason"]).removeprefix("ERROR_REASON_")


def secret(mesh: Mesh) -> str:
    """The signing secret of the mesh, which its owner can read."""
    return next(path for path in mesh.home.rglob("*jwt*") if path.is_file()).read_text().strip()


def test_a_wrong_expired_or_missing_token_is_unauthenticated(mesh: Mesh, stub: Any) -> None:
    """401 and UNAUTHENTICATED with a reason, and the right token works right after."""
    expired = mint(secret(mesh), subject="a", scopes=["generate"], ttl_s=60, now_s=time.time() - 3600)
    foreign = mint("another-secret-of-thirty-two-bytes!!", subject="a", scopes=["generate"], ttl_s=60)
    for token, reason in ((None, "TOKEN_MISSING"), (foreign, "TOKEN_INVALID"), (expired, "TOKEN_EXPIRED")):
        reply = mesh.post("/v1/generate", {"text": "Hi"}, token=token)
        assert (reply.status, reply.json["error"]["reason"]) == (401, f"ERROR_REASON_{reason}")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="Hi"), metadata=bearer(token) if token else ()))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(error.trailing_metadata())["interlock-reason"] == f"ERROR_REASON_{reason}"
    assert mesh.ask("Hi", max_tokens=1)


def test_a_token_without_the_scope_is_forbidden(mesh: Mesh) -> None:
    """403 for a valid token that does not allow the call; admin calls want the admin scope."""
    reader = mint(secret(mesh), subject="a", scopes=["models:read"], ttl_s=60)
    assert mesh.post("/v1/generate", {"text": "Hi"}, token=reader).status == 403
    assert mesh.get("/v1/admin/workers", token=reader).status == 403
    assert mesh.get("/v1/admin/workers").status == 200


@pytest.mark.parametrize(
    ("body", "status", "reason", "named"),
    [
        ({"text": "word " * 9000}, 400, "CONTEXT_EXCEEDED", "context"),
        ({"text": "Hi", "max_tokens": 0}, 400, "ARGUMENT_INVALID", "max_tokens"),
        ({"text": "Hi", "max_tokens": -1}, 400, "ARGUMENT_INVALID", "max_tokens"),
        ({"text": "Hi", "model": "no-such-model"}, 404, "MODEL_UNKNOWN", "no-such-model"),
        ({"text": "Hi", "temperature": 99}, 400, "ARGUMENT_INVALID", "temperature"),
        ({"text": "Hi", "format": {"regex": "["}}, 400, "ARGUMENT_INVALID", "format.regex"),
        ({"text": "Hi", "format": {"json_schema": ENDLESS}}, 400, "ARGUMENT_INVALID", "too complex"),
        (
            {"text": "Hi", "format": {"json_schema": {"title": "x" * 900_000}}},
            400,
            "ARGUMENT_INVALID",
            "format",
        ),
        ({"text": "Hi", "colour": "red"}, 400, "ARGUMENT_INVALID", "colour"),
        ({"text": 7}, 400, "ARGUMENT_INVALID", "text"),
        ({}, 400, "ARGUMENT_INVALID", "text"),
        (b"{", 400, "ARGUMENT_INVALID", "JSON"),
        (b"", 400, "ARGUMENT_INVALID", "JSON"),
        (b"[]", 400, "ARGUMENT_INVALID", "object"),
        (b'{"text": "a", "text": "b"}', 400, "ARGUMENT_INVALID", "text"),
        (b'{"text": "a", "temperature": NaN}', 400, "ARGUMENT_INVALID", ""),
        (b"[" * 100_000, 400, "ARGUMENT_INVALID", ""),
        (b"\xff\xfe", 400, "ARGUMENT_INVALID", ""),
    ],
    ids=range(18),
)
def test_each_bad_body_gets_a_typed_error_and_the_next_request_works(
    mesh: Mesh, body: Any, status: int, reason: str, named: str
) -> None:
    """The error has a code, a reason and a message that names what is wrong."""
    reply = mesh.post("/v1/generate", body)
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert error["reason"] == f"ERROR_REASON_{reason}"
    assert named in error["message"]
    assert mesh.ask("Hi", max_tokens=1)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.GenerateRequest(text="word " * 9000), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="Hi", max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="Hi", max_tokens=-5), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="Hi", model="no-such-model"), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="Hi", request_id="a b"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="Hi", n=5), grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=range(7),
)
def test_each_bad_grpc_request_gets_a_typed_error(
    mesh: Mesh, stub: Any, request_: pb.GenerateRequest, code: grpc.StatusCode
) -> None:
    """The same rules by native gRPC, as status codes."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_, metadata=bearer(mesh.token)))
    error: Any = caught.value
    assert error.code() is code
    assert dict(error.trailing_metadata())["interlock-reason"].startswith("ERROR_REASON_")


def test_envoys_own_replies_have_our_shape(mesh: Mesh) -> None:
    """An unknown path and a body over the limit never reach the gateway; their errors look like ours."""
    assert (mesh.get("/nowhere").status, mesh.get("/nowhere").json["error"]["code"] != "") == (404, True)
    reply = mesh.post("/v1/generate", b'{"text": "' + b"x" * (1 << 20) + b'"}')
    assert reply.status == 413
    assert reply.json["error"]["message"]


def test_internal_headers_of_a_client_change_nothing(mesh: Mesh) -> None:
    """Headers that services speak among themselves are stripped at the door."""
    forged = {"x-interlock-status": "204", "x-interlock-mesh-token": "x", "x-interlock-gateway-id": "x"}
    assert mesh.post("/v1/generate", {"text": "Hi", "max_tokens": 1}, headers=forged).status == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grpc-timeout", "soon"),
        ("grpc-timeout", "1n"),
        ("grpc-encoding", "none"),
        ("x-mine-bin", "%"),
        ("x-city", "Z\u00fc"),
    ],
)
def test_a_header_that_grpc_cannot_carry_ends_no_request(mesh: Mesh, name: str, value: str) -> None:
    """What comes by HTTP is answered by its body, whatever such a header would mean to gRPC."""
    assert mesh.post("/v1/generate", {"text": "Hi", "max_tokens": 1}, headers={name: value}).status == 200


def test_internal_metadata_over_grpc_changes_nothing(mesh: Mesh, stub: Any) -> None:
    """The same by gRPC: a forged credential lets nobody in, and a forged status reaches no answer."""
    forged = (("x-interlock-mesh-token", "m" * 32), ("x-interlock-status", "204"))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(text="Hi"), metadata=forged))
    assert reason_of(caught.value) == "TOKEN_MISSING"
    request = pb.GenerateRequest(text="Hi", max_tokens=1)
    call = stub.Generate(request, metadata=(*bearer(mesh.token), *forged))
    assert [event for event in call if event.HasField("finished")]
    assert "x-interlock-status" not in dict(call.initial_metadata())


def test_a_users_token_opens_no_admin_call(mesh: Mesh) -> None:
    """Through Envoy as well: PERMISSION_DENIED, and nothing happened."""
    user = mint(secret(mesh), subject="a", scopes=["generate", "models:read"], ttl_s=60)
    with grpc.insecure_channel(mesh.address) as channel:
        admin: Any = ControllerServiceStub(channel)  # type: ignore[arg-type]
        for call, request in (
            (admin.DrainWorker, controller_pb.DrainWorkerRequest(worker_id="worker-1")),
            (admin.RevokeToken, controller_pb.RevokeTokenRequest(token_id="a")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=bearer(user), timeout=10)
            assert reason_of(caught.value) == "SCOPE_MISSING"
    assert mesh.ask("Hi", max_tokens=1)


def test_a_revoked_token_is_refused_everywhere(mesh: Mesh) -> None:
    """By the controller at once, by the gateway within its five seconds; other tokens of the subject work."""
    stolen, other = (
        mint(secret(mesh), subject="a", scopes=["generate", "admin"], ttl_s=60) for _ in range(2)
    )
    ask = {"text": "Hi", "max_tokens": 1}
    assert mesh.post("/v1/generate", ask, token=stolen).status == 200
    assert mesh.run("token", "revoke", stolen).returncode == 0
    refused = mesh.get("/v1/admin/workers", token=stolen)
    assert (refused.status, refused.json["error"]["reason"]) == (401, "ERROR_REASON_TOKEN_REVOKED")
    # Five seconds, and what a busy machine adds.
    deadline = time.monotonic() + 8
    while (reply := mesh.post("/v1/generate", ask, token=stolen)).status == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (reply.status, reply.json["error"]["reason"]) == (401, "ERROR_REASON_TOKEN_REVOKED")
    assert mesh.post("/v1/generate", ask, token=other).status == 200


def test_inner_calls_cannot_be_made_from_outside(mesh: Mesh) -> None:
    """Envoy routes neither the worker's service nor a member's calls to the controller."""
    with grpc.insecure_channel(mesh.address) as channel:
        for method in (
            "interlock.v1.WorkerService/GetState",
            "interlock.v1.ControllerService/DownloadRevision",
        ):
            call: Any = channel.unary_unary(f"/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", metadata=bearer(mesh.token), timeout=10)
            error: Any = caught.value
            assert error.code() in {
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAUTHENTICATED,
            }


def running_jobs(mesh: Mesh) -> int:
    """Sequences on all workers, as they report it."""
    workers = json.loads(mesh.run("workers", "list", "--json").stdout)
    return sum(int(worker["load"].get("running", 0)) for worker in workers)


def test_a_client_that_leaves_frees_its_slot(mesh: Mesh, stub: Any) -> None:
    """Cancelled after the first chunk, the request is gone from the worker: 16 new ones fit at once."""
    calls = [
        stub.Generate(
            pb.GenerateRequest(text=f"Tell a very long story, number {number}.", max_tokens=4000),
            metadata=bearer(mesh.token),
        )
        for number in range(16)
    ]
    for call in calls:
        next(event for event in call if event.HasField("chunk"))
    for call in calls:
        call.cancel()
    started_s = time.monotonic()
    call = stub.Generate(pb.GenerateRequest(text="Hi", max_tokens=1), metadata=bearer(mesh.token))
    first = next(event for event in call if event.HasField("started"))
    list(call)
    assert first.started.queue_time.ToMilliseconds() < 5_000
    assert time.monotonic() - started_s < 10
    deadline = time.monotonic() + 10
    while running_jobs(mesh):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_full_queue_refuses_at_once_with_a_delay(mesh: Mesh) -> None:
    """16 slots and 8 places: of 40 at once some are refused with 429 and retry-after, the rest answered."""
    gate = threading.Barrier(40)

    def ask(number: int) -> Any:
        gate.wait(timeout=30)
        return mesh.post("/v1/generate", {"text": f"Tell story {number}.", "max_tokens": 40})

    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(ask, range(40)))
    refused = [reply for reply in replies if reply.status == 429]
    assert {reply.status for reply in replies} == {200, 429}
    assert len(refused) <= 16
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json["error"]["reason"] == "ERROR_REASON_QUEUE_FULL"
    assert mesh.ask("Hi", max_tokens=1)
