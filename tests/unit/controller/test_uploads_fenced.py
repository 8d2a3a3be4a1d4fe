"""Uploads of a time of leading that is over: the next leader's directory is not spoiled, nobody is misled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.errors import ArtifactInvalid, NotLeader, RevisionInUse, UploadConflict
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.revision_directories import Composed, RevisionDirectories
from tests.fixtures.upload_world import (
    CONTENT,
    DIGEST,
    WEIGHTS,
    Place,
    digest_of,
    manifest,
    push,
    read,
    sent,
    weights,
)

WHOLE = Chunk(DIGEST, 0, WEIGHTS)
OTHER = {**CONTENT, "model.safetensors": weights(data=b"\2" * 8)}


class Client:
    """One that sends some chunks, and the others when it is told to."""

    def __init__(self, first: Chunk, *rest: Chunk) -> None:
        self._first, self._rest = first, rest
        self.came, self.go_on = asyncio.Event(), asyncio.Event()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """What it sends."""
        yield self._first
        self.came.set()
        await self.go_on.wait()
        for chunk in self._rest:
            yield chunk


async def next_leader(place: Place) -> Place:
    """What the next leader makes of the same directory; nobody tells the one before."""
    place.leading = False
    later = Place(place.directory)
    await later.uploads.load()
    return later


async def test_a_late_writer_reaches_nothing_that_the_next_leader_names(place: Place) -> None:
    """It has a wrong byte in its buffer, and the next leader takes the same content in meanwhile."""
    wrong = b"\xff" * len(WEIGHTS)
    client = Client(Chunk(DIGEST, 0, wrong[:1]), Chunk(DIGEST, 1, wrong[1:2]))
    late = asyncio.create_task(place.uploads.receive(manifest(CONTENT), client.chunks()))
    await client.came.wait()
    later = await next_leader(place)
    # What somebody holds open is not taken over: its bytes are asked for again.
    assert await later.uploads.plan(manifest(CONTENT)) == ((DIGEST, 0),)
    made = await push(later, manifest(CONTENT), CONTENT)
    client.go_on.set()
    with pytest.raises(NotLeader):
        await late
    assert read(Path(made.local_path)) == CONTENT
    assert (place.directory / "data" / "blobs" / DIGEST).read_bytes() == WEIGHTS


async def test_what_came_is_taken_over_once_nobody_writes(place: Place) -> None:
    """The next leader goes on with it, and then it is out of reach for the one before."""
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 0, WEIGHTS[:9])]))
    later = await next_leader(place)
    assert await later.uploads.plan(manifest(CONTENT)) == ((DIGEST, 9),)
    client = Client(Chunk(DIGEST, 9, WEIGHTS[9:20]), Chunk(DIGEST, 20, WEIGHTS[20:]))
    going_on = asyncio.create_task(later.uploads.receive(manifest(CONTENT), client.chunks()))
    await client.came.wait()
    assert await place.uploads.plan(manifest(CONTENT)) == ((DIGEST, 0),)
    client.go_on.set()
    assert read(Path((await going_on).local_path)) == CONTENT


async def test_what_an_earlier_version_left_is_taken_over(place: Place) -> None:
    """Its parts bear nobody's name."""
    left = place.directory / "data" / "blobs" / f".{DIGEST}.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(WEIGHTS[:9])
    assert await place.uploads.plan(manifest(CONTENT)) == ((DIGEST, 9),)
    await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 9, WEIGHTS[9:])]))
    assert place.left_behind == []


async def test_whoever_finds_his_part_being_taken_over_tries_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lock and the new name there is a moment; what came is not written by two."""
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 0, WEIGHTS[:9])]))
    opened = os.open

    def taken(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        if str(path).endswith(".partial"):
            # It got its new name after we had opened it under the old one.
            Path(path).rename(Path(path).with_name("taken"))
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", taken)
        with pytest.raises(UploadConflict, match="go on"):
            await place.uploads.receive(manifest(CONTENT), sent([Chunk(DIGEST, 9, WEIGHTS[9:])]))
    assert (place.directory / "data" / "blobs" / "taken").read_bytes() == WEIGHTS[:9]


async def test_nobody_is_told_of_a_revision_that_the_next_leader_does_not_know(place: Place) -> None:
    """The lead is lost while the bytes come: no directory appears, and the client asks again."""
    client = Client(WHOLE)
    late = asyncio.create_task(place.uploads.receive(manifest(CONTENT), client.chunks()))
    await client.came.wait()
    later = await next_leader(place)
    client.go_on.set()
    with pytest.raises(NotLeader) as caught:
        await late
    # A proxy has only the rest of what was sent, and must not give it to the next controller.
    assert not caught.value.unstarted
    assert list((place.directory / "data" / "revisions" / "m").iterdir()) == []
    assert await later.uploads.plan(manifest(CONTENT)) == ()
    await later.uploads.receive(manifest(CONTENT), sent(()))
    assert later.catalog.revision("m", "v2").manifest.revision == "v2"


async def test_a_lead_that_is_lost_at_the_very_name_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is there and whole, but the next leader may have looked before: it is sent to him."""
    placed = RevisionDirectories.place

    def too_late(directories: RevisionDirectories, composed: Composed) -> None:
        place.leading = False
        placed(directories, composed)

    with monkeypatch.context() as patched:
        patched.setattr(RevisionDirectories, "place", too_late)
        with pytest.raises(NotLeader):
            await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    later = Place(place.directory)
    made = await push(later, manifest(OTHER), OTHER)
    assert {name: (Path(made.local_path) / name).read_bytes() for name in OTHER} == OTHER


async def test_a_name_that_was_given_meanwhile_is_not_taken(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stood still between its look at the lease and the name finds the next leader's directory."""
    later = Place(place.directory)
    made: list[Path] = []
    replace = Path.replace

    def stopped(path: Path, target: Path) -> Path:
        if not made and path.name.endswith(".new"):
            monkeypatch.setattr(Path, "replace", replace)
            composed = later.uploads._directories.compose(manifest(OTHER), later.uploads._blob_of)
            later.uploads._directories.place(composed)
            made.append(target)
            place.leading = False
        return replace(path, target)

    more, data = {**OTHER, "more.json": b"[1]"}, OTHER["model.safetensors"]
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(more, revision="v9"), sent([Chunk(digest_of(data), 0, data)]))
    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(NotLeader):
        await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert (made[0] / "model.safetensors").read_bytes() == OTHER["model.safetensors"]
    assert place.left_behind == []


async def test_what_the_next_leader_clears_away_is_no_fault_of_the_client(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins while the revision is composed, and removes the directory that is on its way."""
    later = Place(place.directory)
    compose = RevisionDirectories.compose

    def cleared(directories: RevisionDirectories, *args: object) -> Composed:
        composed = compose(directories, *args)  # type: ignore[arg-type]
        place.leading = False
        later.uploads._directories.read_all()
        return composed

    monkeypatch.setattr(RevisionDirectories, "compose", cleared)
    with pytest.raises(NotLeader):
        await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))


async def test_a_leader_of_yesterday_deletes_nothing(place: Place) -> None:
    """As it remembers, nobody uses the revision; the next leader may be rolling it out."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    later = await next_leader(place)
    with pytest.raises(NotLeader):
        await place.uploads.delete("m", "v2")
    assert read(Path(later.catalog.revision("m", "v2").local_path)) == CONTENT
    assert place.catalog.revision("m", "v2").local_path == later.catalog.revision("m", "v2").local_path


async def test_what_is_used_when_it_would_go_stays(place: Place) -> None:
    """A rollout began while the lease was looked at; nobody has a turn between this look and the end."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))

    def used(model: str, name: str) -> None:
        raise RevisionInUse(f"{model} {name}")

    with pytest.raises(RevisionInUse, match="m v2"):
        await place.uploads.delete("m", "v2", check_unused=used)
    assert read(Path(place.catalog.revision("m", "v2").local_path)) == CONTENT


async def test_the_end_of_the_lead_ends_what_runs(place: Place) -> None:
    """At once, though the client is silent; what came is there for the next leader, and nothing begins."""
    client = Client(Chunk(DIGEST, 0, WEIGHTS[:9]))
    upload = asyncio.create_task(place.uploads.receive(manifest(CONTENT), client.chunks()))
    await client.came.wait()
    place.uploads.close()
    with pytest.raises(NotLeader):
        await upload
    for call in (
        place.uploads.plan(manifest(CONTENT)),
        place.uploads.receive(manifest(CONTENT), sent(())),
        place.uploads.delete("m", "v1"),
    ):
        with pytest.raises(NotLeader):
            await call
    later = Place(place.directory)
    await later.uploads.load()
    assert await later.uploads.plan(manifest(CONTENT)) == ((DIGEST, 9),)


async def test_a_client_that_leaves_is_not_told_of_leaders(place: Place) -> None:
    """Its cancellation is one, also when the lead ends at the same time."""
    client = Client(WHOLE)
    upload = asyncio.create_task(place.uploads.receive(manifest(CONTENT), client.chunks()))
    await client.came.wait()
    upload.cancel()
    place.uploads.close()
    with pytest.raises(asyncio.CancelledError):
        await upload
