"""`interlock models push`: what it reads before it sends, what it says where all is there, and its ends."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from interlock.v1.controller_service_pb2 import MissingBlob, UploadRevisionRequest

from services.cli import push
from services.cli.__main__ import main
from services.common import artifacts
from services.common.errors import ArtifactInvalid, ClientStalled, InterlockError, NotLeader
from services.local.home import Home
from tests.fakes.cli_mesh import FakeMesh

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "golden.json: No such file or directory"), ("{", "golden.json: must be a JSON list such as")],
    ids=["absent", "no-json"],
)
def test_golden_prompts_that_cannot_be_read_are_told(
    content: str | None, words: str, model: Path, tmp_path: Path, home: Home, capsys: Capture
) -> None:
    """Whether the file is not there or says nothing, before the model is read."""
    del home
    golden = tmp_path / "golden.json"
    if content is not None:
        golden.write_text(content)
    assert main(["models", "push", str(model), "--golden", str(golden)]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Reading" not in told


def test_a_push_of_what_is_there_says_so(mesh: FakeMesh, model: Path, capsys: Capture) -> None:
    """The manifest alone is sent, and no bar is drawn over bytes that are not."""
    arguments = ["--name", "tiny", "--revision", "v2", "--fallback-model", "smaller"]
    assert main(["models", "push", str(model), *arguments]) == 0
    told = capsys.readouterr()
    assert "Every file is there already" in told.err
    assert "Uploading" not in told.err
    assert "v2" in told.out
    assert [part.WhichOneof("part") for part in mesh.uploaded] == ["manifest"]
    assert mesh.uploaded[0].manifest.fallback_model == "smaller"


def misses(mesh: FakeMesh, model: Path) -> None:
    """Has the mesh ask for the weights."""
    (weights,) = (file for file in artifacts.describe(model) if file.path == "model.safetensors")
    mesh.missing = [MissingBlob(sha256=weights.sha256, offset=0)]


def slowed(monkeypatch: pytest.MonkeyPatch, pause_s: float) -> None:
    """Has a push wait after each of its messages."""
    sent = push._parts

    async def slow(*arguments: Any) -> AsyncIterator[UploadRevisionRequest]:
        async for part in sent(*arguments):
            yield part
            await asyncio.sleep(pause_s)

    monkeypatch.setattr(push, "_parts", slow)


def test_a_push_takes_as_long_as_it_goes_on(
    mesh: FakeMesh, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow line is no reason to give up: what is bounded is the time in which nothing goes."""
    misses(mesh, model)
    monkeypatch.setattr(push, "CHUNK_BYTES", 2)
    monkeypatch.setattr(push, "SILENCE_MAX_S", 1.0)
    slowed(monkeypatch, 0.04)
    assert main(["models", "push", str(model), "--name", "tiny"]) == 0
    assert b"".join(part.chunk.data for part in mesh.uploaded) == b"w" * 64


def test_a_push_that_goes_nowhere_ends(
    mesh: FakeMesh, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What came is kept, which is said."""
    misses(mesh, model)
    monkeypatch.setattr(push, "SILENCE_MAX_S", 0.2)
    slowed(monkeypatch, 60)
    assert main(["models", "push", str(model), "--name", "tiny"]) == 1
    assert "push again, and it goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "hints"),
    [(ClientStalled("Too slow."), 1), (NotLeader("Elsewhere."), 1), (ArtifactInvalid("Wrong."), 0)],
    ids=["slow", "gone", "refused"],
)
def test_a_push_that_was_cut_says_that_it_goes_on(
    error: InterlockError,
    hints: int,
    mesh: FakeMesh,
    model: Path,
    capsys: Capture,
) -> None:
    """And one whose content was refused does not: it would be refused again."""
    misses(mesh, model)
    mesh.error = error
    assert main(["models", "push", str(model), "--name", "tiny"]) == 1
    told = capsys.readouterr().err
    assert error.message in told
    assert told.count("push again, and it goes on") == hints


class _BrokenFile(io.FileIO):
    """A file on a disk that has gone bad after its first two bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads, or fails."""
        if self.tell():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO], ids=["gone", "broken"])
def test_a_file_that_cannot_be_read_any_more_is_named(
    code: int, mesh: FakeMesh, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Whether it went away before its turn or its disk broke within it; what to do is said too."""
    misses(mesh, model)
    monkeypatch.setattr(push, "CHUNK_BYTES", 2)
    weights, sent = model / "model.safetensors", push._parts

    async def spoiled(*arguments: Any) -> AsyncIterator[UploadRevisionRequest]:
        if code == errno.ENOENT:
            weights.unlink()
        else:
            monkeypatch.setattr(Path, "open", lambda file, _: _BrokenFile(file))
        async for part in sent(*arguments):
            yield part

    monkeypatch.setattr(push, "_parts", spoiled)
    assert main(["models", "push", str(model), "--name", "tiny"]) == 1
    told = capsys.readouterr().err
    assert f"{weights} cannot be read any more: {os.strerror(code)}." in told
    assert "push again, and it goes on" in told
