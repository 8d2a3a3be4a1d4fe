"""Requests that do not come to their end, in a real Envoy that waits for less long than a real one."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from deploy.envoy import listener
from tests.fixtures.edge import Edge, started_edge

TIMEOUT_S = 1
GENERATE = "/interlock.v1.GatewayService/Generate"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Envoy before stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listener, "REQUEST_TIMEOUT_S", TIMEOUT_S)
        with started_edge(tmp_path_factory.mktemp("edge")) as edge:
            yield edge


def half_sent(edge: Edge, path: str) -> tuple[bytes, Any]:
    """The first line and the JSON of the reply to a body of which half was sent; the connection ends."""
    host, _, port = edge.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        headers = "host: x\r\ncontent-type: application/json\r\ncontent-length: 9"
        connection.sendall(f'POST {path} HTTP/1.1\r\n{headers}\r\n\r\n{{"a"'.encode())
        told = b"".join(iter(lambda: connection.recv(65_536), b""))
    answered, _, body = told.partition(b"\r\n\r\n")
    return answered.split(b"\r\n")[0], json.loads(body)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", ("type", "timeout")),
        ("/v1/messages", ("type", "timeout_error")),
        ("/v1/generate", ("code", "DEADLINE_EXCEEDED")),
        ("/v1/admin/rollouts", ("code", "DEADLINE_EXCEEDED")),
    ],
)
def test_half_a_body_is_waited_for_no_longer(edge: Edge, path: str, kind: tuple[str, str]) -> None:
    """408 in the shape of the API, and the connection is free."""
    began_s = time.monotonic()
    line, told = half_sent(edge, path)
    assert line == b"HTTP/1.1 408 Request Timeout"
    assert told["error"][kind[0]] == kind[1]
    assert time.monotonic() - began_s < TIMEOUT_S + 5


def test_half_a_call_is_waited_for_no_longer(edge: Edge) -> None:
    """By gRPC what is late is told as late: a message that has no end, and a call that has none."""
    with grpc.insecure_channel(edge.address) as channel:
        open_end: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        open_end.put(b"x")
        begin: Any = channel.stream_unary(GENERATE)
        with pytest.raises(grpc.RpcError) as late:
            begin(iter(open_end.get, None), timeout=10)
        open_end.put(None)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "request timeout" in (late.value.details() or "")


def test_an_answer_takes_as_long_as_it_takes(edge: Edge) -> None:
    """What was all there is waited for: a stream, and a call without a word for longer than that."""
    assert edge.ask("POST", "/v1/generate", "slow events")[2].count(b"data:") == 3
    edge.gateway.hold = threading.Event()
    timer = threading.Timer(2 * TIMEOUT_S, edge.gateway.hold.set)
    timer.start()
    try:
        assert edge.call(GENERATE, b"late") == b"late"
    finally:
        timer.cancel()
        edge.gateway.hold = None
