"""A session: it ends its mesh in order, whoever still listens, and keeps the owner's token fresh."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.local import session
from services.local.home import Home
from services.local.parts import MeshPlan
from services.local.ports import Ports
from services.local.session import MeshReady, Notice, Stopping
from tests.fakes.local import FakeClock, FakeLocalMesh

ROOT = Path(__file__).parents[3]
PLAN = MeshPlan(model_path=Path("model"), model_name="tiny")
PORTS = Ports(0, (0,), (0,), (0,))


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> type[FakeLocalMesh]:
    """The mesh that a session runs."""
    monkeypatch.setattr(session, "LocalMesh", FakeLocalMesh)
    monkeypatch.setattr(FakeLocalMesh, "stopped", False)
    return FakeLocalMesh


def _home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home", {})
    home.prepare()
    return home


async def _run(home: Home, tell: Callable[[Notice], None]) -> None:
    def told(notice: Notice) -> None:
        if isinstance(notice, MeshReady):
            os.kill(os.getpid(), signal.SIGTERM)
        tell(notice)

    await asyncio.wait_for(session.run(home, PLAN, PORTS, FakeClock(), told), 10)


@pytest.mark.parametrize("broken", [MeshReady, Stopping])
async def test_a_listener_that_fails_does_not_keep_the_mesh_from_its_stop(
    tmp_path: Path, mesh: type[FakeLocalMesh], broken: type[Notice]
) -> None:
    """Streams get their end, whatever is wrong with the one who is told of it."""

    def tell(notice: Notice) -> None:
        if isinstance(notice, broken):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await _run(_home(tmp_path), tell)
    assert mesh.stopped


async def test_a_token_that_cannot_be_written_is_tried_again(
    tmp_path: Path, mesh: type[FakeLocalMesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full for a moment does not end the renewal of a long mesh's token."""
    tries, renewed = 0, asyncio.Event()

    def renew(_: Home) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        renewed.set()
        return ""

    monkeypatch.setattr(session, "renewed_token", renew)
    monkeypatch.setattr(session, "_TOKEN_LOOK_S", 0.001)
    monkeypatch.setattr(session, "_TOKEN_RETRY_S", 0.002)
    running = asyncio.create_task(session.run(_home(tmp_path), PLAN, PORTS, FakeClock(), lambda _: None))
    await asyncio.wait_for(renewed.wait(), 10)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 10)
    assert mesh.stopped


async def test_a_signal_that_is_told_twice_cuts_no_stream(tmp_path: Path, mesh: type[FakeLocalMesh]) -> None:
    """As `timeout 60 make up` tells it; the mesh, when it stops, finds that nobody is in a hurry."""

    def tell(notice: Notice) -> None:
        if isinstance(notice, MeshReady):
            os.kill(os.getpid(), signal.SIGTERM)

    await _run(_home(tmp_path), tell)
    assert mesh.stopped


@pytest.mark.parametrize("output", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_command_whose_reader_is_gone_stops_in_order(
    tmp_path: Path, output: Callable[[], tuple[int, int]]
) -> None:
    """`interlock up | tee`, or a terminal that was closed: the mesh stops, and the exit code says so."""
    script = """
import asyncio, pathlib, sys
from services.cli.terminal import Terminal
from services.local import session
from services.local.home import Home
from services.local.parts import MeshPlan
from services.local.ports import Ports
from tests.fakes.local import FakeClock, FakeLocalMesh

session.LocalMesh = FakeLocalMesh
place = pathlib.Path(sys.argv[1])
home = Home(place / "home", {})
home.prepare()
plan, ports = MeshPlan(model_path=place, model_name="tiny"), Ports(0, (0,), (0,), (0,))
asyncio.run(session.run(home, plan, ports, FakeClock(), Terminal(home, 0.0).tell))
(place / "stopped").write_text(str(FakeLocalMesh.stopped))
"""
    reader, writer = output()
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        told = ""
        while "interlock chat" not in told:
            told += os.read(reader, 65_536).decode()
        os.close(reader)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert errors == ""
    assert process.returncode == 0
    assert (tmp_path / "stopped").read_text() == "True"


@pytest.mark.parametrize(
    ("command", "signals"),
    [
        (("env", "--default-signal=HUP"), (signal.SIGHUP,)),
        (("nohup",), (signal.SIGHUP, signal.SIGTERM)),
    ],
    ids=["terminal", "nohup"],
)
def test_the_end_of_the_terminal_ends_what_does_not_ignore_it(
    tmp_path: Path, command: tuple[str, ...], signals: tuple[signal.Signals, ...]
) -> None:
    """A mesh stops in order with its terminal; under `nohup` SIGTERM is the first that asks for its end."""
    script = """
import asyncio, os, pathlib, sys
from services.local import session
from services.local.home import Home
from services.local.parts import MeshPlan
from services.local.ports import Ports
from tests.fakes.local import FakeClock, FakeLocalMesh

place, *numbers = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])

def tell(notice):
    if isinstance(notice, session.MeshReady):
        for number in numbers:
            os.kill(os.getpid(), number)

with session.ended_by_signals():
    for number in numbers[:-1]:
        os.kill(os.getpid(), number)
session.LocalMesh = FakeLocalMesh
home = Home(place, {})
home.prepare()
plan, ports = MeshPlan(model_path=place, model_name="tiny"), Ports(0, (0,), (0,), (0,))
asyncio.run(session.run(home, plan, ports, FakeClock(), tell))
print(FakeLocalMesh.stopped)
"""
    done = subprocess.run(
        [
            *command,
            sys.executable,
            "-c",
            script,
            str(tmp_path / "home"),
            *(f"{number:d}" for number in signals),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
