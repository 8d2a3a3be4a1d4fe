"""The controller as a process of its own: how it starts, what it says when it cannot, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import controller_service_pb2 as pb

from services.common import channel
from tests.fakes.controller_ports import FakeMember
from tests.fakes.controller_process import JWT_SECRET, MESH_TOKEN, WEIGHTS, write_model
from tests.fixtures.redis_server import RedisServer

# Starting Python and importing grpc on a busy machine.
START_TIMEOUT_S = 30.0


@asynccontextmanager
async def process(tmp_path: Path, redis_url: str, **settings: str) -> AsyncIterator[Process]:
    """`python -m services.controller`; killed at the end if it still runs."""
    values = {
        "ID": "c-1",
        "BIND": "127.0.0.1:0",
        "ANNOUNCE_FILE": str(tmp_path / "announce.json"),
        "REDIS_URL": redis_url,
        "MESH_TOKEN": MESH_TOKEN,
        "JWT_SECRET": JWT_SECRET,
        "MODEL_PATH": str(write_model(tmp_path / "model")),
        "MODEL_NAME": "m",
        "DATA_DIR": str(tmp_path / "data"),
        **settings,
    }
    environment = {f"INTERLOCK_CONTROLLER_{name}": value for name, value in values.items()}
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.controller", env={**os.environ, **environment}, stderr=PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def logged(started: Process, event: str) -> dict[str, Any]:
    """The next log line of that event."""
    assert started.stderr is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        async for line in started.stderr:
            fields: dict[str, Any] = json.loads(line)
            if fields["event"] == event:
                return fields
    raise AssertionError(f"the process ended without {event}")


async def test_life_of_the_process(tmp_path: Path, redis_server: RedisServer) -> None:
    """It announces where it listens, serves once it leads, and ends with 0 at SIGTERM, members attached."""
    async with process(tmp_path, redis_server.url) as controller:
        await logged(controller, "route.written")
        announced = json.loads((tmp_path / "announce.json").read_text())
        assert (announced["id"], announced["pid"]) == ("c-1", controller.pid)
        async with (
            channel.connect(announced["address"]) as connection,
            FakeMember(announced["address"], MESH_TOKEN) as worker,
        ):
            stub: Any = health_pb2_grpc.HealthStub(connection)
            for service in ("", "interlock.v1.ControllerService", "interlock.http.v1.AdminHttpService"):
                response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert response.status == health_pb2.HealthCheckResponse.SERVING
            await worker.become_active(pb.MEMBER_KIND_WORKER, "w", "1")
            line = await logged(controller, "member.attached")
            assert (line["worker_id"], line["model"], line["service"]) == ("w", "m", "controller")
            controller.send_signal(signal.SIGTERM)
            error = await worker.end()
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            _, told = await asyncio.wait_for(controller.communicate(), START_TIMEOUT_S)
            assert b"process.stopped" in told
            assert controller.returncode == 0


async def test_taken_port_is_named(tmp_path: Path, redis_server: RedisServer) -> None:
    """A second controller on the port of the first ends with a message that names it."""
    (tmp_path / "second").mkdir()
    async with process(tmp_path, redis_server.url) as first:
        await logged(first, "process.started")
        address = json.loads((tmp_path / "announce.json").read_text())["address"]
        async with process(tmp_path / "second", redis_server.url, BIND=address) as second:
            _, told = await asyncio.wait_for(second.communicate(), START_TIMEOUT_S)
            assert second.returncode == 2
            assert f"Port {address.rpartition(':')[2]} " in told.decode()
            assert "Traceback" not in told.decode()


async def test_a_process_whose_model_cannot_be_read_yet_listens_and_ends(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """A file that never comes holds up neither the port nor the end at SIGTERM."""
    model = write_model(tmp_path / "slow")
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    async with process(tmp_path, redis_server.url, MODEL_PATH=str(model)) as controller:
        line = await logged(controller, "hashing.started")
        assert (line["service"], line["instance"]) == ("controller", "c-1")
        assert line["size_bytes"] > len(WEIGHTS)
        announced = json.loads((tmp_path / "announce.json").read_text())
        async with channel.connect(announced["address"]) as connection:
            stub: Any = health_pb2_grpc.HealthStub(connection)
            response = await stub.Check(health_pb2.HealthCheckRequest())
            assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
        controller.send_signal(signal.SIGTERM)
        _, told = await asyncio.wait_for(controller.communicate(), START_TIMEOUT_S)
        assert b"process.stopped" in told
        assert controller.returncode == 0


async def test_unusable_model_is_told(tmp_path: Path) -> None:
    """A model that cannot be served ends the start with the reason; no Redis is needed to learn it."""
    async with process(tmp_path, "unix:///nowhere", CONTEXT_TOKENS="65") as controller:
        _, told = await asyncio.wait_for(controller.communicate(), START_TIMEOUT_S)
        assert controller.returncode == 2
        assert "context_tokens is 65" in told.decode()
        assert "Traceback" not in told.decode()
