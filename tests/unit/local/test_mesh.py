"""The mesh: it describes itself truly after a restart, and ends whatever its disk does."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from services.local import mesh as local_mesh
from services.local import state
from services.local.child import Event, Started
from services.local.home import Home
from services.local.mesh import LocalMesh, PartReady
from services.local.parts import MeshPlan
from services.local.ports import Ports
from services.local.state import MeshState
from tests.fakes.local import FakeClock, mesh_state


def _mesh(tmp_path: Path) -> tuple[LocalMesh, Path]:
    home = Home(tmp_path / "home", {})
    home.prepare()

    def tell(_: Event | PartReady) -> None:
        raise BrokenPipeError

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
