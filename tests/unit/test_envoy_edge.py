"""What clients meet at the edge: the generated configuration in a real Envoy, before stand-ins."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from interlock.http.v1 import http_service_pb2

from deploy.envoy.generate import DESCRIPTORS
from deploy.envoy.listener import HEADERS_BYTES_MAX, HEADERS_MAX
from deploy.envoy.replies import HEADERS_MESSAGE
from deploy.envoy.routes import BODY_BYTES_MAX, MESSAGE_BYTES_MAX
from services.common import allowance, channel
from services.common.allowance import Allowance
from services.local import probes
from tests.fixtures.edge import Edge, started_edge

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
GENERATE = "/interlock.v1.GatewayService/Generate"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Envoy with the local configuration on free ports."""
    with started_edge(tmp_path_factory.mktemp("edge")) as edge:
        yield edge


def _line_of_a_service() -> dict[str, Any]:
    """What a service logs of a call, as it stands in its log."""
    code = (
        "from services.common import logs\n"
        "logs.configure('gateway', 'gateway-1')\n"
        "logs.annotate(request_id='log-1')\n"
        "logs.get_logger().info('rpc.finished', duration_ms=1.5, method='x')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=20)
    line: dict[str, Any] = json.loads(done.stderr)
    return line


def _error(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"code", "reason", "message", "request_id"}
    return error


def test_rest_reaches_the_gateway_with_its_exact_bytes(edge: Edge) -> None:
    """`POST /v1/generate` and its short form arrive as HttpBody, whatever the content type."""
    for path in ("/v1/generate", "/generate"):
        status, headers, body = edge.ask("POST", path, b"\x00\xff {", {"content-type": "text/odd"})
        assert (status, body) == (200, b"gateway 4")
        assert headers["content-type"] == "text/plain"


def test_admin_rest_reaches_the_controller(edge: Edge) -> None:
    """`/v1/admin/` is transcoded and then routed by the method that it became."""
    assert edge.ask("GET", "/v1/admin/workers")[2] == b"controller 0"
    assert "/interlock.http.v1.AdminHttpService/ListWorkers" in edge.controller.seen


def test_names_in_a_path_and_a_query_become_fields(edge: Edge) -> None:
    """The request id of a resumption and the model of a listing arrive; unknown parameters are left out."""
    assert edge.ask("GET", "/v1/generate/some-id?beta=true")[0] == 200
    assert edge.ask("GET", "/v1/admin/revisions/m/r@1")[0] == 200
    assert edge.ask("POST", "/v1/generate?beta=true", b"abc")[2] == b"gateway 3"
    http = "/interlock.http.v1"
    assert edge.gateway.requests[f"{http}.GatewayHttpService/Resume"] == b"\x0a\x07some-id"
    assert edge.controller.requests[f"{http}.AdminHttpService/GetRevision"] == b"\x0a\x01m\x12\x03r@1"
    for path, method in (("cancel", "CancelRollout"), ("pause", "PauseRollout"), ("events", "WatchRollout")):
        edge.ask("GET" if path == "events" else "POST", f"/v1/admin/rollouts/r1/{path}")
        request = edge.controller.requests[f"{http}.AdminHttpService/{method}"]
        assert http_service_pb2.OneRollout.FromString(request).rollout_id == "r1"


def test_a_status_that_the_gateway_names_becomes_the_status(edge: Edge) -> None:
    """The header becomes `:status` and is gone; the body stays the gateway's own."""
    status, headers, body = edge.ask("POST", "/v1/generate", "status 429")
    assert (status, body) == (429, b'{"error":{}}')
    assert not [name for name in headers if name.startswith(("x-interlock-status", "x-envoy-"))]


def test_events_stream_through(edge: Edge) -> None:
    """Server-sent events arrive byte for byte, `id:` lines too."""
    status, headers, body = edge.ask("POST", "/v1/generate", "events")
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert body == b"".join(f"id: {number}\ndata: {{}}\n\n".encode() for number in range(3))


def test_internal_headers_are_stripped_and_the_deadline_passes(edge: Edge) -> None:
    """A client cannot pretend to be of the mesh; its deadline and its request id arrive as sent."""
    sent = {
        "x-interlock-status": "200",
        "x-interlock-mesh-token": "guess",
        "x-interlock-gateway-id": "gateway-9",
        "x-interlock-deadline": "3",
        "x-request-id": "mine",
        "authorization": "Bearer t",
    }
    edge.ask("POST", "/v1/generate", "x", sent)
    edge.call(GENERATE, metadata=sent)
    for method in ("/interlock.http.v1.GatewayHttpService/Generate", GENERATE):
        seen = edge.gateway.seen[method]
        assert {"x-interlock-status", "x-interlock-mesh-token", "x-interlock-gateway-id"}.isdisjoint(seen)
        assert (seen["x-interlock-deadline"], seen["x-request-id"]) == ("3", "mine")
        assert seen["authorization"] == "Bearer t"


def test_a_body_at_the_limit_passes_and_one_byte_more_is_413(edge: Edge) -> None:
    """The limit is exact, and the reply has the API's shape."""
    assert edge.ask("POST", "/v1/generate", b"a" * BODY_BYTES_MAX)[2] == f"gateway {BODY_BYTES_MAX}".encode()
    status, _, body = edge.ask("POST", "/v1/generate", b"a" * (BODY_BYTES_MAX + 1))
    assert status == 413
    assert _error(body)["reason"] == "ERROR_REASON_MESSAGE_TOO_LARGE"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nowhere"),
        ("GET", "/v1/generate"),
        ("POST", "/interlock.v1.WorkerService/GetState"),
        ("POST", "/interlock.v1.ControllerService/Attach"),
        ("POST", "/interlock.v1.ControllerService//Attach"),
        ("POST", "/x/../interlock.v1.ControllerService/DownloadRevision"),
    ],
)
def test_what_is_not_there_is_404_in_our_shape(edge: Edge, method: str, path: str) -> None:
    """Unknown paths, wrong methods and the mesh's own methods answer alike, with the caller's request id."""
    status, headers, body = edge.ask(method, path, headers={"x-request-id": "mine"})
    assert status == 404
    assert _error(body)["code"] == "NOT_FOUND"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == "mine"


def _posted() -> list[str]:
    """Every path that takes a body, by the descriptor set that Envoy transcodes with."""
    files = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file
    rules = [
        method.options.Extensions[annotations_pb2.http]
        for file in files
        for service in file.service
        for method in service.method
    ]
    bindings = [binding for rule in rules for binding in (rule, *rule.additional_bindings)]
    return sorted(re.sub(r"\{[^}]*\}", "x", binding.post) for binding in bindings if binding.post)


def _check_shape(path: str, headers: dict[str, str], body: bytes, *, anthropic: bool = False) -> None:
    """The error stands where the path's own clients look for it, with the caller's request id."""
    told = json.loads(body)
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == 'm"ine'
    if path.startswith("/v1/messages") or (anthropic and path.startswith("/v1/models")):
        assert set(told) == {"type", "error", "request_id"}
        assert (told["type"], told["request_id"]) == ("error", 'm"ine')
        assert set(told["error"]) == {"type", "message"}
    elif path.startswith(("/v1/chat/", "/v1/completions", "/v1/responses", "/v1/models", "/v1/embeddings")):
        assert set(told) == {"error"}
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert (told["error"]["param"], told["error"]["code"]) == (None, None)
    else:
        assert _error(body)["request_id"] == 'm"ine'


@pytest.mark.parametrize("path", _posted())
def test_a_body_that_is_too_large_is_told_in_the_shape_of_its_api(edge: Edge, path: str) -> None:
    """413 from one byte over the limit on, at every path; the gateway never sees it."""
    sent = {"x-request-id": 'm"ine', "content-type": "application/json"}
    status, headers, body = edge.ask("POST", path, b"a" * (BODY_BYTES_MAX + 1), sent)
    assert status == 413
    _check_shape(path, headers, body)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/none",
        "/v1/messages/none/at/all",
        "/v1/models/none/x",
        "/v1/other",
        "/v1/responses/a/b",
        "/v1/embeddings",
    ],
)
def test_an_unknown_path_is_told_in_the_shape_of_its_api(edge: Edge, path: str) -> None:
    """404, whatever the query, and a quotation mark in the request id breaks no JSON."""
    status, headers, body = edge.ask("POST", f"{path}?a=b", b"{}", {"x-request-id": 'm"ine'})
    assert status == 404
    _check_shape(path, headers, body)


def test_a_path_that_two_vendors_have_is_told_in_the_shape_of_who_asks(edge: Edge) -> None:
    """One of them names its version; where only one of them has the path, that changes nothing."""
    for path in ("/v1/models/none/x", "/v1/chat/none", "/v1/other"):
        sent = {"x-request-id": 'm"ine', "anthropic-version": "2023-06-01"}
        status, headers, body = edge.ask("GET", path, headers=sent)
        assert status == 404
        _check_shape(path, headers, body, anthropic=True)


@pytest.mark.parametrize("path", _posted())
def test_headers_that_are_too_large_or_too_many_are_told_in_the_shape_of_its_api(
    edge: Edge, path: str
) -> None:
    """431 from one over the limits on, with the request's id; below them the gateway is asked."""
    sent = {"x-request-id": 'm"ine', "content-type": "application/json"}
    # HTTP/1.1 has the host among them, and this client the encoding and the length.
    room = HEADERS_MAX - len(sent) - 3
    status, _, _ = edge.ask("POST", path, "x", sent | {f"x-{number}": "v" for number in range(room)})
    assert status == 200
    for more in ({f"x-{number}": "v" for number in range(room + 9)}, {"x-large": "v" * HEADERS_BYTES_MAX}):
        status, headers, body = edge.ask("POST", path, "x", sent | more)
        assert status == 431
        _check_shape(path, headers, body)


def test_headers_of_a_grpc_call_have_the_same_bounds(edge: Edge) -> None:
    """The call ends with words for it, and the next one is answered."""
    with pytest.raises(grpc.RpcError) as refused:
        edge.call(GENERATE, metadata={"x-large": "v" * HEADERS_BYTES_MAX})
    assert refused.value.details() == HEADERS_MESSAGE
    assert edge.call(GENERATE) == b"x"


@pytest.mark.parametrize(
    "method",
    [
        "/interlock.v1.WorkerService/GetState",
        "/interlock.v1.ControllerService/Attach",
        "/interlock.v1.ControllerService/DownloadRevision",
    ],
)
def test_the_mesh_methods_do_not_exist_for_grpc(edge: Edge, method: str) -> None:
    """gRPC clients get UNIMPLEMENTED with a message for people, and nothing arrives behind."""
    with pytest.raises(grpc.RpcError) as caught:
        edge.call(method)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "{" not in (caught.value.details() or "")
    assert method not in edge.gateway.seen | edge.controller.seen


def test_native_grpc_goes_to_its_service(edge: Edge) -> None:
    """GatewayService goes to the gateway, admin RPCs to the controller, untouched."""
    listing = "/interlock.v1.ControllerService/ListWorkers"
    assert edge.call(GENERATE, b"\x08\x01") == b"\x08\x01"
    assert edge.call(listing, b"\x08\x02") == b"\x08\x02"
    assert GENERATE in edge.gateway.seen
    assert listing in edge.controller.seen


def test_a_message_of_grpc_has_the_bound_that_gateways_have(edge: Edge) -> None:
    """Up to it a message arrives; one byte more is told as a gateway would tell it."""
    assert len(edge.call(GENERATE, b"x" * MESSAGE_BYTES_MAX)) == MESSAGE_BYTES_MAX
    with pytest.raises(grpc.RpcError) as caught:
        edge.call(GENERATE, b"x" * (MESSAGE_BYTES_MAX + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert MESSAGE_BYTES_MAX == channel.MESSAGE_BYTES_MAX


def test_grpc_web_is_spoken(edge: Edge) -> None:
    """A gRPC-Web call gets its message and a trailer frame back."""
    framed = struct.pack(">BI", 0, 2) + b"\x08\x01"
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    status, reply, body = edge.ask("POST", GENERATE, framed, headers)
    assert (status, reply["content-type"]) == (200, "application/grpc-web+proto")
    assert body.startswith(framed)
    assert b"grpc-status:0" in body


# What clients in a browser send beside what every page may: gRPC-Web's, and the vendors' libraries for it.
_STAINLESS = [
    f"x-stainless-{name}"
    for name in (
        "arch",
        "lang",
        "os",
        "package-version",
        "retry-count",
        "runtime",
        "runtime-version",
        "timeout",
    )
]
SENT = {
    GENERATE: ["authorization", "content-type", "grpc-timeout", "x-grpc-web", "x-user-agent"],
    "/v1/generate": ["authorization", "content-type", "last-event-id", "x-interlock-deadline"],
    "/v1/chat/completions": [
        "authorization",
        "content-type",
        "idempotency-key",
        "openai-organization",
        "openai-project",
        "x-stainless-helper-method",
        *_STAINLESS,
    ],
    "/v1/messages?beta=true": [
        "anthropic-beta",
        "anthropic-dangerous-direct-browser-access",
        "anthropic-version",
        "content-type",
        "idempotency-key",
        "user-agent",
        "x-api-key",
        "x-stainless-helper",
        *_STAINLESS,
    ],
}


@pytest.mark.parametrize("path", SENT)
def test_pages_of_the_machine_may_call_and_others_may_not(edge: Edge, path: str) -> None:
    """A preflight is answered for localhost on any port, with every header that clients send, by name."""
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": ",".join(SENT[path]),
    }
    status, headers, _ = edge.ask("OPTIONS", path, headers={"origin": "http://localhost:3000", **asked})
    assert status == 200
    assert headers["access-control-allow-origin"] == "http://localhost:3000"
    assert set(SENT[path]) <= set(headers["access-control-allow-headers"].split(", "))
    _, headers, _ = edge.ask("OPTIONS", path, headers={"origin": "http://localhost.evil.example", **asked})
    assert "access-control-allow-origin" not in headers


def test_a_page_may_read_the_reply(edge: Edge) -> None:
    """The reply to a page names its origin and exposes status, reason, ids, delays, advice, what is left."""
    _, headers, _ = edge.ask("POST", "/v1/generate", "x", {"origin": "http://127.0.0.1:5173"})
    assert headers["access-control-allow-origin"] == "http://127.0.0.1:5173"
    left = (name for name, _ in allowance.headers(Allowance(9, 9, 1.0, 9, 9)))
    exposed = set(headers["access-control-expose-headers"].split(", "))
    assert {
        "interlock-reason",
        "request-id",
        "x-request-id",
        "retry-after",
        "x-should-retry",
        *left,
    } <= exposed


def test_headers_that_could_fool_a_server_are_dropped_or_refused(edge: Edge) -> None:
    """`x_interlock_mesh_token` would be `x-interlock-mesh-token` to some servers; too many are too many."""
    assert edge.ask("POST", "/v1/generate", "x", {"x_interlock_mesh_token": "t"})[0] == 200
    seen = edge.gateway.seen["/interlock.http.v1.GatewayHttpService/Generate"]
    assert not [name for name in seen if "mesh" in name]
    # What the codec refuses, it refuses before it has read anything.
    assert edge.ask("POST", "/v1/generate", "x", {f"x-{number}": "v" for number in range(300)})[0] == 431
    assert edge.ask("POST", "/v1/generate", "x", {"x-large": "v" * 80_000})[0] == 431


def test_headers_that_grpc_cannot_carry_are_left_out(edge: Edge) -> None:
    """HTTP allows more characters in names and values; the request itself passes, and so do the others."""
    strange = {"x+y$": "v", "x-odd": "caf\u00e9", "x-data-bin": "no base64!", "x-plain": "v"}
    assert edge.ask("POST", "/v1/generate", "x", strange)[2] == b"gateway 1"
    seen = edge.gateway.seen["/interlock.http.v1.GatewayHttpService/Generate"]
    assert {name for name in seen if name.startswith("x-") and name in strange} == {"x-plain"}


def test_a_client_cannot_shorten_or_retry_by_header(edge: Edge) -> None:
    """Headers that steer Envoy are not taken from clients, also not from loopback."""
    edge.ask("POST", "/v1/generate", "x", {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-retry-on": "5xx"})
    seen = edge.gateway.seen["/interlock.http.v1.GatewayHttpService/Generate"]
    assert seen.get("x-envoy-expected-rq-timeout-ms") is None


def test_a_gateway_that_cannot_serve_still_speaks_for_itself(edge: Edge) -> None:
    """With nobody healthy calls go on: the gateway's error is better than Envoy's."""
    edge.gateway.set_serving(serving=False)
    try:
        assert edge.ask("POST", "/v1/generate", "status 503")[2] == b'{"error":{}}'
    finally:
        edge.gateway.set_serving(serving=True)


def test_the_access_log_is_json_without_query_or_token(edge: Edge) -> None:
    """One line a request with the names of the services' logs; secrets in headers and query stay out."""
    edge.ask(
        "GET",
        "/v1/admin/models?key=hidden",
        headers={"authorization": "Bearer hidden", "x-request-id": "log-1"},
    )
    # What was not transcoded has the path that was asked for, whatever the client says that it was.
    edge.ask("GET", "/no/such", headers={"x-envoy-original-path": "/healthz", "x-request-id": "log-2"})

    async def line(request_id: str) -> dict[str, Any] | None:
        # Envoy writes its log every second or so.
        lines = (json.loads(text) for text in edge.log.read_text().splitlines() if text.startswith("{"))
        return next((found for found in lines if found.get("request_id") == request_id), None)

    found, other = (
        asyncio.run(asyncio.wait_for(probes.until(partial(line, request_id)), 15))
        for request_id in ("log-1", "log-2")
    )
    assert (found["path"], other["path"]) == ("/v1/admin/models", "/no/such")
    assert found["event"] == "http.finished"
    assert isinstance(found["status"], int)
    assert "hidden" not in edge.log.read_text()
    line_of_a_service = _line_of_a_service()
    # One index and one time filter serve both: same names, same types, same form of a moment.
    assert set(line_of_a_service) <= set(found)
    for name, value in line_of_a_service.items():
        assert isinstance(found[name], int | float if isinstance(value, float) else type(value)), name
    assert re.fullmatch(MOMENT, found["timestamp"])
    assert re.fullmatch(MOMENT, line_of_a_service["timestamp"])
