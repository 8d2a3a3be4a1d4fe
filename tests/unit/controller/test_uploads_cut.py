"""Uploads that are cut, slow or cancelled: what came is kept, what is wrong goes, others get their turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.common import safetensors_files
from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    ClientStalled,
    UploadConflict,
)
from services.common.partial_file import PartialFile
from services.controller.adapters import blob_intake
from services.controller.adapters.blob_intake import CHUNK_BYTES_MAX, Chunk, paced
from tests.fakes.controller_ports import FakeClock
from tests.fixtures.upload_world import CONTENT, DIGEST, WEIGHTS, Place, chunks_of, manifest, sent, weights

WHOLE = Chunk(DIGEST, 0, WEIGHTS)


def leave(place: Place, data: bytes) -> Path:
    """What a controller that died after the last byte has left of the weights."""
    path = place.directory / "data" / "blobs" / f".{DIGEST}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


async def test_a_cut_upload_goes_on_where_it_ended(place: Place) -> None:
    """After a crash of the client, and after one of the controller."""
    wanted = manifest(CONTENT)
    chunks = [chunk for chunk in chunks_of(CONTENT) if chunk.sha256 == DIGEST]
    half = len(chunks) // 2

    async def cut() -> AsyncIterator[Chunk]:
        for chunk in chunks[:half]:
            yield chunk
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await place.uploads.receive(wanted, cut())
    later = Place(place.directory)
    await later.uploads.load()
    assert await later.uploads.plan(wanted) == ((DIGEST, 7 * half),)
    with pytest.raises(ArtifactInvalid, match="not whole yet"):
        await later.uploads.receive(wanted, sent(chunks[half:-1]))
    with pytest.raises(ArgumentInvalid, match="offset"):
        await later.uploads.receive(wanted, sent(chunks[half:]))
    await later.uploads.receive(wanted, sent(chunks[-1:]))
    assert later.left_behind == []


async def test_what_was_cut_after_its_last_byte_is_whole(place: Place) -> None:
    """Its name was missing: the plan gives it, and nothing is sent again."""
    leave(place, WEIGHTS)
    wanted = manifest(CONTENT)
    assert await place.uploads.plan(wanted) == ()
    assert place.blobs == [DIGEST]
    made = await place.uploads.receive(wanted, sent(()))
    assert (Path(made.local_path) / "model.safetensors").read_bytes() == WEIGHTS


async def test_an_upload_alone_sees_that_all_of_it_is_there(place: Place) -> None:
    """Also where it was cut between the plan and the upload."""
    leave(place, WEIGHTS)
    await place.uploads.receive(manifest(CONTENT), sent(()))
    assert place.left_behind == []


async def test_what_has_the_size_and_not_the_content_begins_again(place: Place) -> None:
    """It is thrown away at once, by the plan or by the upload, and asked for from its first byte."""
    wanted, wrong = manifest(CONTENT), weights(data=b"\2" * 8)
    part = leave(place, wrong)
    assert await place.uploads.plan(wanted) == ((DIGEST, 0),)
    assert not part.exists()
    leave(place, wrong)
    with pytest.raises(ArtifactInvalid, match="plan the upload again"):
        await place.uploads.receive(wanted, sent(()))
    assert not part.exists()
    assert await place.uploads.plan(wanted) == ((DIGEST, 0),)
    await place.uploads.receive(wanted, sent([WHOLE]))


async def test_a_client_that_is_cut_after_the_last_byte_need_not_come_back_with_it(place: Place) -> None:
    """A content has its name as soon as it is whole, not when the client says that it has ended."""
    more = {**CONTENT, "more.json": b"[1]"}
    came = asyncio.Event()

    async def cut() -> AsyncIterator[Chunk]:
        yield WHOLE
        came.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(place.uploads.receive(manifest(more), cut()))
    await came.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert place.left_behind == []
    assert [sha256 for sha256, _ in await place.uploads.plan(manifest(more))] == [
        chunks_of({"more.json": b"[1]"})[0].sha256
    ]


async def test_a_plan_leaves_alone_what_another_one_writes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last byte and its name: it says how much is there, and touches nothing."""
    begun, may_end = threading.Event(), threading.Event()
    finish = PartialFile.finish

    def slow(file: PartialFile) -> None:
        if file._wanted_sha256 == DIGEST:
            file._stream.flush()  # type: ignore[union-attr]
            begun.set()
            may_end.wait(10)
        finish(file)

    monkeypatch.setattr(PartialFile, "finish", slow)
    upload = asyncio.create_task(place.uploads.receive(manifest(CONTENT), sent([WHOLE])))
    await asyncio.to_thread(begun.wait, 10)
    planned = await place.uploads.plan(manifest(CONTENT, revision="v3"))
    may_end.set()
    assert planned == ((DIGEST, len(WEIGHTS)),)
    await upload
    assert place.left_behind == []


async def test_content_that_is_not_its_digest_is_thrown_away(place: Place) -> None:
    """And the upload begins again from its first byte."""
    wanted = manifest(CONTENT)
    other = weights(data=b"\2" * 8)
    with pytest.raises(ArtifactInvalid, match="digest"):
        await place.uploads.receive(wanted, sent([Chunk(DIGEST, 0, other)]))
    assert await place.uploads.plan(wanted) == ((DIGEST, 0),)


@pytest.mark.parametrize("data", [b"", b"x" * (CHUNK_BYTES_MAX + 1)], ids=len)
async def test_a_chunk_has_bytes_and_not_too_many(place: Place, data: bytes) -> None:
    """Empty ones could come for ever and bring nothing."""
    with pytest.raises(ArgumentInvalid, match=r"chunk\.data"):
        await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 0, data)]))


async def test_a_client_that_falls_silent_makes_way(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so, what it sent is kept, and another one can upload."""
    monkeypatch.setattr(blob_intake, "CHUNK_WAIT_S", 0.05)

    async def silent() -> AsyncIterator[Chunk]:
        yield Chunk(DIGEST, 0, WEIGHTS[:9])
        await asyncio.Event().wait()

    with pytest.raises(ClientStalled):
        await place.uploads.receive(manifest(CONTENT), silent())
    await place.uploads.receive(manifest(CONTENT, revision="v3"), sent([Chunk(DIGEST, 9, WEIGHTS[9:])]))


async def test_a_client_that_sends_a_byte_now_and_then_makes_way(place: Place) -> None:
    """No silence is too long, and yet it would hold the upload for days; what came is kept."""

    async def slow() -> AsyncIterator[Chunk]:
        for at in range(len(WEIGHTS)):
            place.clock.seconds += blob_intake.CHUNK_WAIT_S - 1
            yield Chunk(DIGEST, at, WEIGHTS[at : at + 1])

    with pytest.raises(ClientStalled, match="3 bytes came in 87 s"):
        await place.uploads.receive(manifest(CONTENT), slow())
    # The byte that came too late is not looked at.
    assert await place.uploads.plan(manifest(CONTENT)) == ((DIGEST, 2),)
    await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 2, WEIGHTS[2:])]))


@pytest.mark.parametrize(
    ("client_s", "ours_s", "passes"), [(1.0, 0.0, True), (1.1, 0.0, False), (0.5, 60.0, True)]
)
async def test_only_the_clients_time_counts(client_s: float, ours_s: float, passes: bool) -> None:  # noqa: FBT001
    """Sixteen KiB a second are enough for ever, and what we do with them may take as long as it takes."""
    clock = FakeClock()

    async def client() -> AsyncIterator[Chunk]:
        for _ in range(200):
            clock.seconds += client_s
            yield Chunk("", 0, b"0" * blob_intake.PACE_BYTES_PER_S)

    async def read() -> int:
        count = 0
        async for _ in paced(client(), clock):
            clock.seconds += ours_s
            count += 1
        return count

    if passes:
        assert await read() == 200
    else:
        with pytest.raises(ClientStalled, match="16384 a second"):
            await read()


async def test_a_fast_beginning_excuses_nothing() -> None:
    """Each minute counts for itself."""
    clock = FakeClock()

    async def client() -> AsyncIterator[Chunk]:
        for _ in range(100):
            clock.seconds += 1
            yield Chunk("", 0, b"0" * CHUNK_BYTES_MAX)
        while True:
            clock.seconds += 20
            yield Chunk("", 0, b"0")

    async def read() -> None:
        async for _ in paced(client(), clock):
            assert clock.seconds < 1_000 + 100 + 2 * blob_intake.PACE_WINDOW_S

    with pytest.raises(ClientStalled):
        await read()


async def test_a_client_that_leaves_while_its_bytes_are_written_leaves_no_thread(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else begins before the thread has ended: two would write one file."""
    begun, may_end = threading.Event(), threading.Event()
    append = PartialFile.append

    def slow(file: PartialFile, chunk: bytes) -> int:
        if file._wanted_sha256 == DIGEST:
            begun.set()
            may_end.wait(10)
        return append(file, chunk)

    monkeypatch.setattr(PartialFile, "append", slow)
    wanted, chunk = manifest(CONTENT), Chunk(DIGEST, 0, WEIGHTS[:1])
    upload = asyncio.create_task(place.uploads.receive(wanted, sent([chunk])))
    await asyncio.to_thread(begun.wait, 10)
    upload.cancel()
    await asyncio.sleep(0)
    with pytest.raises(UploadConflict):
        await place.uploads.receive(wanted, sent(()))
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await place.uploads.plan(wanted) == ((DIGEST, 1),)


async def test_a_client_that_leaves_at_the_end_has_uploaded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is put together in a thread, which nothing stops: at its end it is registered."""
    begun, may_end = threading.Event(), threading.Event()
    check_files = safetensors_files.check_files

    def slow(*args: Any) -> int:
        begun.set()
        may_end.wait(10)
        return check_files(*args)

    monkeypatch.setattr(safetensors_files, "check_files", slow)
    wanted = manifest(CONTENT)
    upload = asyncio.create_task(place.uploads.receive(wanted, sent([WHOLE])))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        upload.cancel()
        await asyncio.sleep(0)
        with pytest.raises(UploadConflict):
            await place.uploads.receive(wanted, sent(()))
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert place.left_behind == []
    assert await place.uploads.plan(wanted) == ()
    known = place.catalog.revision("m", "v2")
    assert await place.uploads.receive(wanted, sent(())) is known
    await place.uploads.delete("m", "v2")


async def test_a_client_that_leaves_before_a_refusal_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put together and found bad has no name, and no directory."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_args: Any) -> None:
        begun.set()
        may_end.wait(10)
        raise ArtifactInvalid("bad")

    monkeypatch.setattr(safetensors_files, "check_files", slow)
    upload = asyncio.create_task(place.uploads.receive(manifest(CONTENT), sent([WHOLE])))
    await asyncio.to_thread(begun.wait, 10)
    upload.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert list((place.directory / "data" / "revisions" / "m").iterdir()) == []
