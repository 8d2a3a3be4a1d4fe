"""What commands make of the state of a mesh that died, or of one of another version."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest

from services.cli.__main__ import main
from services.local import state
from services.local.home import Home
from tests.fakes.cli_mesh import FakeMesh
from tests.fakes.local import mesh_state

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["status", "chat hello", "models list"], ids=str.split)
def test_what_a_dead_mesh_left_is_not_read(command: str, home: Home, capsys: Capture) -> None:
    """Its state may be cut, or of an earlier version; what matters is that nothing runs."""
    home.prepare()
    home.state_file.write_text('{"http": ')
    assert main(command.split()) == 1
    assert "no mesh runs" in capsys.readouterr().err


class Ended:
    """A supervisor that ends before it is ready."""

    pid = 77

    def __init__(self, *_: object, **__: object) -> None:
        self._looks = iter((None, 1))

    def poll(self) -> int | None:
        """See `Popen.poll`."""
        return next(self._looks)


def test_up_in_the_background_minds_nothing_that_a_dead_mesh_left(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Neither a state that is cut, nor one of a process whose number the new one has by chance."""
    home.prepare()
    monkeypatch.setattr(subprocess, "Popen", Ended)
    for write in (
        lambda: home.state_file.write_text('{"http": '),
        lambda: state.write(home.state_file, dataclasses.replace(mesh_state(), pid=Ended.pid)),
    ):
        write()
        assert main(["up", "--detach"]) == 1
        assert "did not start" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "models list"])
def test_a_mesh_that_describes_itself_otherwise_is_told(
    command: str, mesh: FakeMesh, capsys: Capture
) -> None:
    """Its state is cut, or another version's: which process it is, and how it is ended, in one line."""
    for content in ("", "[]", '{"http": "http://127.0.0.1:1"}'):
        mesh.home.state_file.write_text(content)
        assert main(command.split()) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"process {mesh.home.holder()}" in line
        assert "interlock down" in line
