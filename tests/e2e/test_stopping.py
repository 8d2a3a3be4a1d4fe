"""A mesh that is stopped ends what it began: streams get their end before their mesh does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc

from tests.fixtures.mesh import started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_running_stream_ends_with_its_finish_when_the_mesh_is_stopped(model_path: Path) -> None:
    """SIGTERM in the middle of an answer: every token and the finish arrive, then everything is gone."""
    request = pb.GenerateRequest(text="Tell me a long story about a fox.", max_tokens=100)
    with started(model_path) as mesh, grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        metadata = (("authorization", f"Bearer {mesh.token}"),)
        children = psutil.Process(mesh.process.pid).children(recursive=True)
        told, finished, stopped = 0, False, False
        for event in stub.Generate(request, metadata=metadata):
            if event.HasField("chunk"):
                told += len(event.chunk.token_ids)
            if told > 5 and not stopped:
                mesh.process.send_signal(signal.SIGTERM)
                stopped = True
            finished = finished or event.HasField("finished")
        assert stopped
        assert finished
        assert told > 50
        assert mesh.process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
        assert not (mesh.home / "state.json").exists()


def test_a_second_signal_does_not_wait_for_streams(model_path: Path) -> None:
    """Whoever asks twice means now: a stream that has long to run is cut, and nothing is left."""
    request = pb.GenerateRequest(text="Tell me a long story about a bear.", max_tokens=1_500)
    with started(model_path) as mesh, grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        metadata = (("authorization", f"Bearer {mesh.token}"),)
        children = psutil.Process(mesh.process.pid).children(recursive=True)
        stream = stub.Generate(request, metadata=metadata)
        next(stream)
        mesh.process.send_signal(signal.SIGTERM)
        # Signals of one kind are merged while one is pending; another kind is not.
        mesh.process.send_signal(signal.SIGINT)
        assert mesh.process.wait(timeout=20) == 0
        with pytest.raises(grpc.RpcError):
            list(stream)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
