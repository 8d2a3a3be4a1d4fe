"""What the processes of a local mesh are told, and how the mesh describes itself."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from redis.asyncio import Redis

from services.common import config
from services.controller.config import ControllerConfig
from services.gateway.config import GatewayConfig
from services.local import parts, probes, redis_server, state
from services.local.child import Child, Launch
from services.local.home import Home
from services.local.mesh import _without_secrets
from services.local.parts import MeshPlan, ServicePart
from services.local.state import MeshState, Part
from services.worker.config import WorkerConfig
from tests.fakes.local import FakeClock

SHARED = {
    "INTERLOCK_REDIS_URL": "unix:///tmp/redis.sock?db=0",
    "INTERLOCK_JWT_SECRET": "s" * 40,
    "INTERLOCK_MESH_TOKEN": "m" * 40,
}
CONTROLLERS = '["127.0.0.1:50052"]'


def _plan(workers: int = 1) -> MeshPlan:
    return MeshPlan(model_path=Path("/models/tiny"), model_name="tiny", workers=workers, dtype="bf16")


def _home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home", {})
    home.prepare()
    return home


def test_every_service_understands_what_it_is_told(tmp_path: Path) -> None:
    """The variables of each part make a valid configuration: no unknown key, none missing."""
    home = _home(tmp_path)
    controller = parts.controller(home, 1, "127.0.0.1:0", _plan(), SHARED)
    gateway = parts.gateway(home, 2, "127.0.0.1:0", CONTROLLERS, SHARED)
    worker = parts.worker(home, 1, "127.0.0.1:0", CONTROLLERS, _plan(2), SHARED)

    def told(part: ServicePart) -> dict[str, str]:
        return dict(part.launch().environment)

    controlling = config.load(ControllerConfig, "controller", file=None, environ=told(controller))
    assert (controlling.model_name, controlling.compute_dtype) == ("tiny", "bf16")
    serving = config.load(GatewayConfig, "gateway", file=None, environ=told(gateway))
    assert (serving.id, serving.controllers) == ("gateway-2", ("127.0.0.1:50052",))
    working = config.load(WorkerConfig, "worker", file=None, environ=told(worker))
    assert working.announce_file == home.run / "worker-1.json"
    assert working.threads >= 1


def test_the_callers_settings_reach_a_service_and_the_meshs_own_win(tmp_path: Path) -> None:
    """`INTERLOCK_WORKER_SLOTS` of the caller arrives; a name of the caller's does not replace the part's."""
    part = parts.worker(_home(tmp_path), 1, "127.0.0.1:0", CONTROLLERS, _plan(), SHARED)
    part.environ = {"INTERLOCK_WORKER_SLOTS": "3", "INTERLOCK_WORKER_ID": "stranger"}
    environment = part.launch().environment
    assert environment["INTERLOCK_WORKER_SLOTS"] == "3"
    assert environment["INTERLOCK_WORKER_ID"] == "worker-1"


def test_a_worker_is_told_no_secret_that_it_does_not_need(tmp_path: Path) -> None:
    """Neither the signing secret nor the store's URL, not even where the caller's environment has them."""
    part = parts.worker(_home(tmp_path), 1, "127.0.0.1:0", CONTROLLERS, _plan(), SHARED)
    part.environ = {"PATH": "/bin", "INTERLOCK_GATEWAY_JWT_SECRET": "g" * 40, **SHARED}
    environment = part.launch().environment
    assert environment["PATH"] == "/bin"
    assert environment["INTERLOCK_MESH_TOKEN"] == SHARED["INTERLOCK_MESH_TOKEN"]
    assert not [name for name in environment if "JWT" in name or "REDIS" in name]
    assert parts.plain(part.environ) == {"PATH": "/bin"}


def test_a_start_removes_the_announcement_of_the_last_one(tmp_path: Path) -> None:
    """A restarted process is not taken for the one that announced itself before."""
    part = parts.gateway(_home(tmp_path), 1, "127.0.0.1:0", CONTROLLERS, SHARED)
    part.announce_file.write_text("{}")
    launch = part.launch()
    assert not part.announce_file.exists()
    assert launch.argv == (sys.executable, "-P", "-m", "services.gateway")


async def test_an_announcement_of_another_process_does_not_count(tmp_path: Path) -> None:
    """Only what the process itself wrote says where it listens."""
    file = tmp_path / "worker-1.json"
    assert await probes.announced(file, 7) is None
    file.write_text(json.dumps({"id": "worker-1", "address": "127.0.0.1:1", "pid": 7}))
    assert await probes.announced(file, 8) is None
    assert await probes.announced(file, None) is None
    assert await probes.announced(file, 7) == Part("worker-1", "127.0.0.1:1", 7)


def test_the_state_survives_its_file(tmp_path: Path) -> None:
    """What is written is read again, with the documented keys, and a restart changes one pid."""
    file = tmp_path / "state.json"
    assert state.read(file) is None
    written = MeshState(
        http="http://127.0.0.1:8080",
        gateways=(Part("gateway-1", "127.0.0.1:50051", 1),),
        controllers=(Part("controller-1", "127.0.0.1:50052", 2),),
        workers=(Part("worker-1", "127.0.0.1:50061", 3), Part("worker-2", "127.0.0.1:50062", 4)),
        envoy=Part("envoy", "127.0.0.1:8080", 5),
        redis=Part("redis", "unix:///run/redis.sock", 6),
        token_file="/home/token",
        pid=7,
        model="tiny",
        admin="unix:///run/envoy-admin.sock",
    )
    state.write(file, written)
    assert state.read(file) == written
    documented = {"http", "gateways", "controllers", "workers", "envoy", "redis", "token_file"}
    assert documented <= set(json.loads(file.read_text()))
    restarted = written.with_pid("worker-2", 40)
    assert [part.pid for _, part in restarted.parts()] == [6, 2, 3, 40, 1, 5]


def test_the_state_holds_no_password() -> None:
    """A store's URL loses user and password before it is written where others read it."""
    assert _without_secrets("rediss://user:word@store:6380/1") == "rediss://store:6380/1"
    assert _without_secrets("redis://store:6379?password=word") == "redis://store:6379"


async def test_the_store_answers_on_its_socket_alone(tmp_path: Path) -> None:
    """The bundled server comes up on a private Unix socket, and writes nothing beside it.

    Also in a home whose path has what a URL reads otherwise.
    """
    home = Home(tmp_path / "C# b?%41", {})
    home.prepare()
    socket = home.socket_path()

    def launch() -> Launch:
        return Launch(redis_server.command(socket), {})

    child = Child("redis", launch, tmp_path / "redis.log", FakeClock(), lambda _: None)
    await child.start()
    try:
        assert await asyncio.wait_for(probes.until(lambda: probes.redis_answers(socket)), 20)
        assert socket.stat().st_mode & 0o077 == 0
        async with Redis.from_url(redis_server.url(socket)) as store:
            assert await store.ping()
    finally:
        await child.stop(10)
    assert [path.name for path in socket.parent.iterdir() if path != socket] == []
