"""Uploads onto a disk that is full, or that has no links: what came is kept, and nothing half made stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from services.common.errors import ArtifactInvalid, Code, QuotaExceeded
from services.common.partial_file import PartialFile
from services.controller.adapters.blob_intake import Chunk
from tests.fixtures.upload_world import CONTENT, DIGEST, WEIGHTS, Place, chunks_of, manifest, push, read, sent

WHOLE = Chunk(DIGEST, 0, WEIGHTS)


class FullDisk:
    """A disk with room for so many bytes, under every file on its way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, number: int = errno.ENOSPC) -> None:
        self.room = room
        append = PartialFile.append

        def limited(file: PartialFile, chunk: bytes) -> int:
            fits = chunk[: self.room]
            self.room -= len(fits)
            size = append(file, fits)
            if len(fits) < len(chunk):
                raise OSError(number, os.strerror(number))
            return size

        # There is no port for a disk; this is where its bytes are written.
        monkeypatch.setattr(PartialFile, "append", limited)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_told_and_what_came_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """RESOURCE_EXHAUSTED with what to do; when there is room again, the upload goes on where it ended."""
    copied = sum(len(data) for name, data in CONTENT.items() if name != "model.safetensors")
    disk = FullDisk(monkeypatch, copied + 20, number)
    wanted = manifest(CONTENT)
    chunks = [chunk for chunk in chunks_of(CONTENT) if chunk.sha256 == DIGEST]
    with pytest.raises(QuotaExceeded, match="disk is full; what came so far is kept") as caught:
        await place.uploads.receive(wanted, sent(chunks))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert [one.manifest.revision for one in place.catalog.revisions("m")] == ["v1"]
    assert [name.split(".")[1] for name in place.left_behind] == [DIGEST]
    disk.room = 1 << 20
    assert await place.uploads.plan(wanted) == ((DIGEST, 20),)
    await place.uploads.receive(wanted, sent([Chunk(DIGEST, 20, WEIGHTS[20:])]))
    assert place.left_behind == []


async def test_a_disk_that_is_full_of_our_own_copies_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a copy would only take room: it goes, and can be made again."""
    disk = FullDisk(monkeypatch, 10)
    with pytest.raises(QuotaExceeded, match="disk is full"):
        await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert place.left_behind == []
    disk.room = 1 << 20
    await push(place, manifest(CONTENT), CONTENT)


async def test_a_disk_that_is_full_at_the_end_leaves_no_directory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are whole and stay; the revision can be made when there is room for its record."""
    link = os.link

    def full(source: Path, target: Path) -> None:
        if target.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(source, target)

    disk = FullDisk(monkeypatch, sum(map(len, CONTENT.values())))
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(QuotaExceeded, match="disk is full"):
            await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert place.left_behind == []
    assert list((place.directory / "data" / "revisions" / "m").iterdir()) == []
    assert await place.uploads.plan(manifest(CONTENT)) == ()
    disk.room = 1 << 20
    await place.uploads.receive(manifest(CONTENT), sent(()))


async def test_a_file_system_without_links_gets_copies(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and checked ones, which a damaged content does not pass."""
    damaging = False

    def refused(source: Path, _target: Path) -> None:
        if damaging and source.name == DIGEST:
            source.write_bytes(WEIGHTS[:-1] + b"\7")
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert read(Path(made.local_path)) == CONTENT
    damaging = True
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors: .*digest"):
        await push(place, manifest(CONTENT, revision="v3", quantization="int8"), CONTENT)
    assert place.left_behind == []
