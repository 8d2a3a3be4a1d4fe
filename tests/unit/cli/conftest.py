"""What the tests of commands share: a home that they find, and a mesh that seems to run in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.local.home import Home
from tests.fakes import cli_mesh
from tests.fakes.cli_mesh import FakeMesh


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty home that the commands find."""
    monkeypatch.setenv("INTERLOCK_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INTERLOCK_JWT_SECRET", raising=False)
    return Home(tmp_path / "home", {})


@pytest.fixture
def mesh(home: Home) -> Iterator[FakeMesh]:
    """A mesh that seems to run in the home."""
    with cli_mesh.running(home) as found:
        yield found
