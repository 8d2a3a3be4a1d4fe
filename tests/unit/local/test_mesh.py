"""The mesh: it describes itself truly after a restart, and ends whatever its disk does."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from services.local import mesh as local_mesh
from services.local import probes, state
from services.local.child import Child, Event, Launch, Started
from services.local.home import Home
from services.local.mesh import LocalMesh, ModelRead, PartReady
from services.local.parts import MeshPlan
from services.local.ports import Ports
from services.local.state import MeshState
from services.local.supervisor import PartFailed
from tests.fakes.local import FakeClock, mesh_state

Notice = Event | PartReady | ModelRead


def _broken(_: Notice) -> None:
    raise BrokenPipeError


def _mesh(tmp_path: Path, tell: Callable[[Notice], None] = _broken) -> tuple[LocalMesh, Path]:
    home = Home(tmp_path / "home", {})
    home.prepare()
    plan = MeshPlan(model_path=tmp_path, model_name="tiny")
    mesh = LocalMesh(home, plan, Ports(0, (0,), (0,), (0,)), FakeClock(), tell, environ={})
    mesh._state = mesh_state()
    return mesh, home.state_file


async def test_the_state_file_names_a_restarted_process_once_the_disk_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk only delays it, and a listener that fails changes nothing."""
    mesh, file = _mesh(tmp_path)
    write, tries = state.write, 0

    def refusing(path: Path, found: MeshState) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, found)

    monkeypatch.setattr(state, "write", refusing)
    monkeypatch.setattr(local_mesh, "_STATE_RETRY_S", 0.001)
    with pytest.raises(BrokenPipeError):
        mesh._on_event(Started("redis", 77))
    (refreshing,) = mesh._refreshing
    await asyncio.wait_for(refreshing, 10)
    found = state.read(file)
    assert found is not None
    assert found.redis.pid == 77
    assert tries == 2


async def test_a_state_file_that_cannot_be_removed_does_not_keep_the_processes_from_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that became read-only is no reason to kill streams."""
    mesh, file = _mesh(tmp_path)
    file.mkdir()
    stages: list[object] = []

    async def stop(*told: object) -> None:
        stages.extend(told)

    monkeypatch.setattr(mesh._supervisor, "stop", stop)
    await mesh.stop(asyncio.Event())
    assert stages


def _children(mesh: LocalMesh) -> dict[str, Child]:
    """The processes of its state, none of which runs."""
    for id_ in ("controller-1", "gateway-1", "worker-1", "envoy"):
        log = mesh._home.logs / f"{id_}.log"
        mesh._children[id_] = Child(id_, lambda: Launch((), {}), log, FakeClock(), lambda _: None)
    return mesh._children


async def test_a_controller_has_as_long_for_a_model_as_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells how far it is; the members' time begins when it leads."""
    told: list[Notice] = []
    mesh, _ = _mesh(tmp_path, told.append)
    controller, found = _children(mesh)["controller-1"], mesh_state()
    patience: list[tuple[str, int, float]] = []
    looks = 0

    async def ready(child: Child, waiting: Awaitable[Any], timeout_s: float) -> Any:
        patience.append((child.id, looks, timeout_s))
        return await waiting

    async def serving(address: str) -> bool | None:
        nonlocal looks
        if address == found.controllers[0].address:
            looks += 1
            line = {"event": "hashing.advanced", "read_bytes": looks, "size_bytes": 3}
            controller.log.write_text(json.dumps(line) + "\n")
        return True if looks == 3 else None

    async def answers(*_: object) -> bytes:
        return b""

    async def never(*_: object) -> None:
        return None

    monkeypatch.setattr(mesh._supervisor, "ready", ready)
    monkeypatch.setattr(probes, "serving", serving)
    monkeypatch.setattr(probes, "http_ok", answers)
    monkeypatch.setattr(probes, "worker_failure", never)
    starting = mesh._all_serving(found.workers, found.gateways, found.envoy, found.controllers)
    await asyncio.wait_for(starting, 10)
    as_long = local_mesh._WORKER_TIMEOUT_S
    assert patience[:-1] == [
        ("controller-1", 0, as_long),
        ("worker-1", 3, as_long),
        ("gateway-1", 3, as_long),
    ]
    assert [one for one in told if isinstance(one, ModelRead)] == [
        ModelRead("controller-1", read, 3) for read in (1, 2)
    ]


async def test_a_controller_that_cannot_serve_its_model_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the processes that would follow."""
    mesh, _ = _mesh(tmp_path)
    controller = _children(mesh)["controller-1"]
    controller.log.write_text("the model has no config.json\n")
    controller._crashed.set()

    async def redis() -> object:
        return mesh_state().redis

    async def controllers() -> object:
        return mesh_state().controllers

    async def others(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(mesh, "_start_redis", redis)
    monkeypatch.setattr(mesh, "_start_controllers", controllers)
    monkeypatch.setattr(mesh, "_start_others", others)
    with pytest.raises(PartFailed, match=r"(?s)controller-1 ended at its start.*no config\.json"):
        await asyncio.wait_for(mesh.start(), 10)
