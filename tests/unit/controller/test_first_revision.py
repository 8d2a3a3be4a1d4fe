"""The revision that a mesh is started with: its reading is told, and can be left."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from services.common.errors import ArtifactInvalid
from services.controller.adapters import first_revision
from services.controller.adapters.first_revision import FirstRevision
from services.controller.adapters.local_revisions import read_revision
from services.controller.config import ControllerConfig
from services.controller.core.catalog import Revision
from tests.fakes.controller_ports import TIMEOUT_S, FakeClock
from tests.fakes.controller_process import WEIGHTS, write_model
from tests.fixtures.waiting import until


def first_of(model: Path) -> FirstRevision:
    """The revision of a model that nobody has read."""
    settings = ControllerConfig(mesh_token=SecretStr("t" * 32), model_path=model, model_name="m")
    return FirstRevision(settings, FakeClock())


async def test_how_far_it_is_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bytes at the beginning, again and again while it lasts, and at the end."""
    model, may_go_on = write_model(tmp_path / "model"), threading.Event()

    def slow(directory: Path, **settings: Any) -> Revision:
        on_progress = settings.pop("on_progress")

        def progress(read_bytes: int, size_bytes: int) -> None:
            on_progress(read_bytes, size_bytes)
            if read_bytes > len(WEIGHTS) // 2:
                may_go_on.wait(TIMEOUT_S)

        return read_revision(directory, **settings, on_progress=progress)

    monkeypatch.setattr(first_revision, "read_revision", slow)
    monkeypatch.setattr(first_revision, "TELL_S", 0.01)
    first = first_of(model)
    with capture_logs() as logged:
        reading = asyncio.create_task(first.read())
        await until(lambda: any(line.get("read_bytes", 0) > len(WEIGHTS) // 2 for line in logged), TIMEOUT_S)
        may_go_on.set()
        await asyncio.wait_for(reading, TIMEOUT_S)
    size_bytes = sum(file.size_bytes for file in first.revision.manifest.files)
    assert size_bytes > len(WEIGHTS)
    last = {line["event"]: line for line in logged}
    assert set(last) == {"hashing.started", "hashing.advanced", "revision.registered"}
    assert {line["size_bytes"] for line in last.values()} == {size_bytes}
    assert (logged[-1]["event"], logged[-1]["took_s"]) == ("revision.registered", 0)


async def test_who_leaves_it_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on by itself; nobody is told of what becomes of it."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def stuck(*_: object, **__: object) -> Revision:
        begun.set()
        may_end.wait()
        ended.set()
        raise ArtifactInvalid("too late")

    monkeypatch.setattr(first_revision, "read_revision", stuck)
    try:
        reading = asyncio.create_task(first_of(tmp_path).read())
        await until(begun.is_set, TIMEOUT_S)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, TIMEOUT_S)
        assert not ended.is_set()
    finally:
        may_end.set()
    await until(ended.is_set, TIMEOUT_S)
