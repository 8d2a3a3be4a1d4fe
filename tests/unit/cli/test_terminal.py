"""The words of `interlock up`: what is told, and that a line which cannot be written is no failure."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from services.cli.terminal import Terminal
from services.local.child import Exited, NotStarted
from services.local.home import Home
from services.local.mesh import ModelRead


class _FullOnce(io.TextIOWrapper):
    """A file on a disk that is full at the first line."""

    full = True

    def write(self, text: str) -> int:
        """Fails once."""
        if self.full:
            self.full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_loses_a_line_and_no_more(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of a mesh in the background goes on once there is room again."""
    path = tmp_path / "up.log"
    with _FullOnce(path.open("wb")) as file:
        monkeypatch.setattr("sys.stdout", file)
        terminal = Terminal(home, 0.0)
        terminal.tell(Exited("worker-1", 1, 0.2))
        terminal.tell(NotStarted("worker-1", "no space", 0.4))
    assert path.read_text() == "  worker-1       could not be started (no space); starting again in 0.4 s\n"


def test_a_closed_output_is_no_failure(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads any more, and nothing is raised."""
    with (tmp_path / "up.log").open("w") as file:
        monkeypatch.setattr("sys.stdout", file)
    Terminal(home, 0.0).tell(Exited("worker-1", 1, 0.2))


def test_who_waits_for_a_large_model_sees_how_far_it_is(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line under the controller's name."""
    Terminal(home, 0.0).tell(ModelRead("controller-1", 12_340_000_000, 140_000_000_000))
    assert capsys.readouterr().out == "  controller-1   reads the model: 9% of 140.0 GB\n"
