"""What the tests of commands share: a home that they find, and a mesh that seems to run in it."""

from __future__ import annotations

import json
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
    for name in (
        "INTERLOCK_JWT_SECRET",
        "INTERLOCK_JWT_ISSUER",
        "INTERLOCK_JWT_AUDIENCE",
        "INTERLOCK_URL",
        "INTERLOCK_TOKEN",
        "INTERLOCK_CA_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    return Home(tmp_path / "home", {})


@pytest.fixture
def mesh(home: Home) -> Iterator[FakeMesh]:
    """A mesh that seems to run in the home."""
    with cli_mesh.running(home) as found:
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the shape of a model."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (directory / "model.safetensors").write_bytes(b"w" * 64)
    (directory / "tokenizer.json").write_text("{}")
    return directory
