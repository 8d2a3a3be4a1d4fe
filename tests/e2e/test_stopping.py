"""A mesh that is stopped ends what it began, and then nothing is left of it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc

from tests.fixtures.mesh import Mesh, started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


# `down` sends SIGTERM, and waits for the end.
@pytest.mark.parametrize("way", ["SIGINT", "down"])
def test_a_stopped_mesh_ends_its_streams_and_leaves_nothing_behind(model_path: Path, way: str) -> None:
    """By `down` and Ctrl-C alike, in the middle of an answer: every token and the finish arrive.

    Then there is no process, no socket, no lock and no state.
    """
    with started(model_path) as mesh, ThreadPoolExecutor(1) as pool:
        children = psutil.Process(mesh.process.pid).children(recursive=True)
        assert len(children) >= 5
        told, finished = 0, False
        stopping: Future[int] | None = None
        for event in streamed(mesh, "Tell me a long story about a fox.", 100):
            if event.HasField("chunk"):
                told += len(event.chunk.token_ids)
            if told > 5 and stopping is None:
                stopping = pool.submit(stop, mesh, way)
            finished = finished or event.HasField("finished")
        assert stopping is not None
        assert finished
        assert told > 50
        assert mesh.process.wait(timeout=60) == 0
        assert stopping.result(60) == 0
        assert_nothing_left(mesh, children)


def test_a_second_signal_does_not_wait_for_streams(model_path: Path) -> None:
    """Whoever asks twice means now: a stream that has long to run is cut, and nothing is left."""
    with started(model_path) as mesh:
        children = psutil.Process(mesh.process.pid).children(recursive=True)
        stream = streamed(mesh, "Tell me a long story about a bear.", 1_500)
        next(stream)
        mesh.process.send_signal(signal.SIGTERM)
        # Signals of one kind are merged while one is pending; another kind is not.
        mesh.process.send_signal(signal.SIGINT)
        assert mesh.process.wait(timeout=20) == 0
        with pytest.raises(grpc.RpcError):
            list(stream)
        assert_no_process(children)


def stop(mesh: Mesh, way: str) -> int:
    """Asks a mesh to stop; returns the exit code of the command, 0 for a signal."""
    if way == "down":
        return mesh.run("down").returncode
    mesh.process.send_signal(signal.SIGINT)
    return 0


def streamed(mesh: Mesh, text: str, max_tokens: int) -> Iterator[pb.GenerateResponse]:
    """The events of an answer."""
    request = pb.GenerateRequest(text=text, max_tokens=max_tokens)
    with grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        yield from stub.Generate(request, metadata=(("authorization", f"Bearer {mesh.token}"),))


def assert_no_process(children: list[psutil.Process]) -> None:
    """Each of them is gone, or about to be."""
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def assert_nothing_left(mesh: Mesh, children: list[psutil.Process]) -> None:
    """Of a mesh that has ended."""
    assert_no_process(children)
    left = [path for path in mesh.home.rglob("*") if path.is_socket() or path.name.endswith(".lock")]
    assert not left
    assert not (mesh.home / "state.json").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(mesh.url.rstrip("/").rpartition(":")[2]))) != 0
