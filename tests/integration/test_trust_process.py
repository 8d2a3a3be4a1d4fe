"""Gateway and controller as processes compose them: published keys, and revocations in a real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from interlock.v1 import controller_service_pb2, gateway_service_pb2

from services.common import channel
from services.common.redis_client import connect
from services.common.redis_revocations import RedisRevocations
from tests.fakes.controller_process import write_model
from tests.fixtures.any_call import path_of, refusal
from tests.fixtures.gateway_world import bearer, reason_of
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.token_forge import key_set, signer, signing_key

# Two Python processes on a busy machine.
START_TIMEOUT_S = 30.0
MESH_TOKEN = "m" * 32
METHODS = {
    "gateway": gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods_by_name[
        "ListModels"
    ],
    "controller": controller_service_pb2.DESCRIPTOR.services_by_name["ControllerService"].methods_by_name[
        "ListWorkers"
    ],
}
SCOPE = "admin models:read"


def environment(tmp_path: Path, service: str, redis_url: str, jwks: str) -> dict[str, str]:
    """What a service is told at its start; keys by the variables that all services share."""
    own = {"BIND": "127.0.0.1:0", "ANNOUNCE_FILE": str(tmp_path / f"{service}.json")}
    if service == "controller":
        own |= {"MODEL_PATH": str(write_model(tmp_path / "model")), "MODEL_NAME": "m"}
        own["DATA_DIR"] = str(tmp_path / "data")
    shared = {
        "JWT_ALGORITHM": "EdDSA",
        "JWT_JWKS": jwks,
        "MESH_TOKEN": MESH_TOKEN,
        "REDIS_URL": redis_url,
    }
    named = {f"INTERLOCK_{service.upper()}_{name}": value for name, value in own.items()}
    return os.environ | named | {f"INTERLOCK_{name}": value for name, value in shared.items()}


async def start(service: str, environ: dict[str, str]) -> asyncio.subprocess.Process:
    """`python -m services.<service>`."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"services.{service}", env=environ, stderr=PIPE
    )


async def leading(connection: grpc.aio.Channel) -> None:
    """Returns when a controller leads: until then it refuses whoever may ask."""
    stub: Any = health_pb2_grpc.HealthStub(connection)
    async with asyncio.timeout(START_TIMEOUT_S):
        async for response in stub.Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


@asynccontextmanager
async def running(tmp_path: Path, service: str, redis_url: str, jwks: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a service that serves; killed at the end."""
    started = await start(service, environment(tmp_path, service, redis_url, jwks))
    try:
        assert started.stderr is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            async for line in started.stderr:
                if json.loads(line)["event"] == "process.started":
                    break
        address = json.loads((tmp_path / f"{service}.json").read_text())["address"]
        async with channel.connect(address) as connection:
            if service == "controller":
                await leading(connection)
            yield connection
    finally:
        started.kill()
        await started.communicate()


@pytest.mark.parametrize("service", METHODS)
async def test_published_keys_and_revocations_reach_the_process(
    tmp_path: Path, redis_server: RedisServer, service: str
) -> None:
    """A token of the issuer is believed; one of another family, or one that was revoked before, is not."""
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(key_set(signing_key("EdDSA")))
    store = connect(redis_server.url)
    await RedisRevocations(store).add({"taken-back": time.time() + 600}, time.time())
    await store.close()
    method = METHODS[service]
    async with running(tmp_path, service, redis_server.url, str(jwks)) as wire:
        call: Any = wire.unary_unary(path_of(method))
        # Made here: one that was made when the tests were collected may have expired before its turn.
        await call(b"", metadata=bearer(signer("EdDSA").token(scope=SCOPE)))
        taken_back = signer("EdDSA").token(scope=SCOPE, jti="taken-back")
        error = await refusal(wire, method, bearer(taken_back))
        assert reason_of(error) == "TOKEN_REVOKED"
        error = await refusal(wire, method, bearer(signer("HS256").token(scope=SCOPE)))
        assert reason_of(error) == "TOKEN_INVALID"


@pytest.mark.parametrize("service", METHODS)
async def test_a_start_without_usable_keys_ends_with_the_setting(
    tmp_path: Path, redis_server: RedisServer, service: str
) -> None:
    """One line that names it, and exit code 2."""
    started = await start(
        service, environment(tmp_path, service, redis_server.url, str(tmp_path / "absent.json"))
    )
    async with asyncio.timeout(START_TIMEOUT_S):
        _, told = await started.communicate()
    assert started.returncode == 2
    assert f"{service}: jwt_jwks: the file cannot be read".encode() in told
    assert b"Traceback" not in told
