"""What uploads leave on the disk: what is shared, what makes room, what is never taken away from somebody."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    InternalError,
    QuotaExceeded,
    RevisionInUse,
    RevisionUnknown,
)
from services.controller.adapters import blobs
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.local_contents import LocalContents
from services.controller.adapters.revision_directories import RevisionDirectories
from tests.fixtures.upload_world import (
    CONTENT,
    DIGEST,
    TOKENIZER,
    WEIGHTS,
    Place,
    chunks_of,
    digest_of,
    manifest,
    push,
    read,
    sent,
    weights,
)

WHOLE = Chunk(DIGEST, 0, WEIGHTS)


async def test_deleting_frees_what_nobody_names(place: Place) -> None:
    """Not the mesh's own revision, and not the bytes that another one needs."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    await place.uploads.receive(manifest(CONTENT, revision="v3", quantization="int8"), sent(()))
    blob = place.directory / "data" / "blobs" / DIGEST
    place.clock.seconds += 1e9
    await place.uploads.delete("m", "v2")
    assert blob.exists()
    await place.uploads.delete("m", "v3")
    assert not blob.exists()
    with pytest.raises(RevisionUnknown):
        await place.uploads.delete("m", "v3")
    with pytest.raises(RevisionInUse):
        await place.uploads.delete("m", "v1")


@pytest.mark.parametrize("shared", [False, True])
async def test_what_was_damaged_where_it_is_kept_is_asked_for_again(place: Place, *, shared: bool) -> None:
    """A worker has refused it: deleted and pushed again it is whole, also where others have links to it."""
    wanted = manifest(CONTENT)
    revision = await push(place, wanted, CONTENT)
    if shared:
        await push(place, replace(wanted, revision="v3", quantization="int8"), CONTENT)
    with (Path(revision.local_path) / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")
    await place.uploads.delete("m", "v2")
    assert [sha256 for sha256, _ in await place.uploads.plan(wanted)][-1] == DIGEST
    again = await push(place, wanted, CONTENT)
    assert read(Path(again.local_path)) == CONTENT


async def test_what_came_already_counts_once(tmp_path: Path) -> None:
    """An upload that was cut goes on where there is room for it, but not for half of it once more."""
    data = weights(data=b"\2" * 8)
    content = {**CONTENT, "model.safetensors": data}
    place = Place(tmp_path, bytes_max=sum(map(len, content.values())))
    digest = digest_of(data)
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(content), sent([Chunk(digest, 0, data[:60])]))
    await place.uploads.receive(manifest(content), sent([Chunk(digest, 60, data[60:])]))
    other = {**CONTENT, "model.safetensors": weights(data=b"\3" * 8), "more.json": b"0" * len(TOKENIZER)}
    with pytest.raises(QuotaExceeded):
        await place.uploads.receive(manifest(other, revision="v3"), sent(()))


async def test_deleting_leaves_what_another_upload_has_sent(place: Place) -> None:
    """Its client was cut between two files, and comes back."""
    data = {"model.safetensors": weights(data=b"\2" * 8), "more.json": b"[1]"}
    sent_first, missing = (Chunk(digest_of(one), 0, one) for one in data.values())
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest({**CONTENT, **data}, revision="v3"), sent([sent_first]))
    await place.uploads.receive(manifest(CONTENT), sent(chunks_of({"w": WEIGHTS})))
    place.clock.seconds += 1e9
    await place.uploads.delete("m", "v2")
    assert await place.uploads.plan(manifest({**CONTENT, **data}, revision="v3")) == ((missing.sha256, 0),)


async def test_what_nobody_came_back_for_makes_room(place: Place) -> None:
    """A day later it is gone when the next upload begins, whether it was whole or not."""
    data = weights(data=b"\2" * 8)
    digest = digest_of(data)
    cut = manifest({**CONTENT, "model.safetensors": data}, revision="v3")
    for chunk in (Chunk(digest, 0, data[:9]), Chunk(digest, 9, data[9:])):
        with pytest.raises((ArtifactInvalid, ArgumentInvalid)):
            await place.uploads.receive(cut, sent([chunk, Chunk("0" * 64, 0, b"x")]))
        assert any(digest in name for name in place.blobs)
    place.clock.seconds = time.time() + blobs.ORPHAN_KEPT_S + 1
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(CONTENT), sent(()))
    assert not any(digest in name for name in place.blobs)


async def test_the_operators_directory_is_copied(place: Place) -> None:
    """What is written there later, through links too, changes no upload."""
    boot = place.directory / "boot"
    (boot / "config.json").rename(boot / "real.json")
    (boot / "config.json").symlink_to("real.json")
    made = Path((await push(place, manifest(CONTENT), CONTENT)).local_path)
    for name in ("real.json", "tokenizer.json"):
        with (boot / name).open("r+b") as stream:
            stream.write(b"XX")
    assert read(made) == CONTENT
    assert not any((made / name).samefile(boot / name) for name in ("config.json", "tokenizer.json"))
    assert not any((made / name).is_symlink() for name in CONTENT)
    other = await push(place, manifest(CONTENT, revision="v3", quantization="int8"), CONTENT)
    assert read(Path(other.local_path)) == CONTENT
    # Uploads share one content among themselves.
    assert all((made / name).samefile(Path(other.local_path) / name) for name in CONTENT)


async def test_what_changed_in_the_operators_directory_is_asked_for(place: Place) -> None:
    """Its digest is looked at while it is copied: nothing else than the manifest's content is taken."""
    wanted, boot = manifest(CONTENT), place.directory / "boot"
    assert await place.uploads.plan(wanted) == ((DIGEST, 0),)
    (boot / "tokenizer.json").write_bytes(b" " * len(TOKENIZER))
    with pytest.raises(ArtifactInvalid, match=r"tokenizer\.json: .*plan the upload again"):
        await place.uploads.receive(wanted, sent([WHOLE]))
    assert place.left_behind == []
    assert {sha256 for sha256, _ in await place.uploads.plan(wanted)} == {DIGEST, digest_of(TOKENIZER)}
    made = await push(place, wanted, CONTENT)
    assert read(Path(made.local_path)) == CONTENT


async def test_a_wrong_part_does_not_spoil_a_right_copy(place: Place) -> None:
    """Somebody sent other bytes for a content that the mesh was started with."""
    part = place.directory / "data" / "blobs" / f".{digest_of(TOKENIZER)}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"XX")
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert read(Path(made.local_path)) == CONTENT


@pytest.mark.parametrize("gone", [True, False])
async def test_what_a_plan_said_is_there_stays(place: Place, gone: bool) -> None:  # noqa: FBT001
    """For ten minutes, whoever deletes the revision that had it; then it goes."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    wanted = manifest(CONTENT, revision="v3", quantization="int8")
    assert await place.uploads.plan(wanted) == ()
    place.clock.seconds += blobs.PROMISE_KEPT_S + (1 if gone else -1)
    await place.uploads.delete("m", "v2")
    assert (DIGEST in place.blobs) is not gone
    if not gone:
        await place.uploads.receive(wanted, sent(()))
        assert place.catalog.revision("m", "v3").manifest.files


async def test_a_delete_takes_nothing_from_an_upload_under_way(place: Place) -> None:
    """However long it takes."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    more = {**CONTENT, "more.json": b"[1]"}

    async def slow() -> AsyncIterator[Chunk]:
        await place.uploads.delete("m", "v2")
        yield chunks_of({"more.json": b"[1]"})[0]

    place.clock.seconds += 1e9
    made = await place.uploads.receive(manifest(more, revision="v3"), slow())
    assert read(Path(made.local_path)) == CONTENT


async def test_what_is_old_stays_for_whoever_planned_with_it(place: Place) -> None:
    """Another upload, which begins first, removes what nobody came back for, and not that."""
    data = weights(data=b"\2" * 8)
    content = {**CONTENT, "model.safetensors": data, "more.json": b"[1]"}
    first, part = Chunk(digest_of(data), 0, data), Chunk(digest_of(b"[1]"), 0, b"[")
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(content), sent([first, part]))
    place.clock.seconds = time.time()
    planned = await place.uploads.plan(manifest(content))
    assert planned == ((part.sha256, 1),)
    await place.uploads.receive(manifest(CONTENT, revision="v3"), sent([WHOLE]))
    await place.uploads.receive(manifest(content), sent([Chunk(part.sha256, 1, b"1]")]))


async def abandoned(place: Place, number: int, **fields: object) -> str:
    """Uploads weights that no revision comes of; returns their digest."""
    data = weights(data=bytes([number]) * 8)
    content = {**CONTENT, "model.safetensors": data, "more.json": b"[1]"}
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(content, **fields), sent([Chunk(digest_of(data), 0, data)]))
    blob = place.directory / "data" / "blobs" / digest_of(data)
    os.utime(blob, (place.clock.now() + number, place.clock.now() + number))
    return blob.name


SMALL = len(CONTENT["config.json"]) + len(TOKENIZER)


async def test_what_nobody_counts_on_makes_room_when_it_is_needed(tmp_path: Path) -> None:
    """However young, the oldest first, and no more than is needed."""
    place = Place(tmp_path, bytes_max=SMALL + 3 * len(WEIGHTS) + 3)
    older, newer = [await abandoned(place, number) for number in (2, 3)]
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert {older, newer} < set(place.blobs)
    third = weights(data=b"\4" * 8)
    await push(
        place, manifest({**CONTENT, "model.safetensors": third}, revision="v3"), {"model.safetensors": third}
    )
    assert newer in place.blobs
    assert older not in place.blobs


async def test_what_somebody_counts_on_makes_no_room(tmp_path: Path) -> None:
    """Nor does anything go where all of it would not be enough."""
    place = Place(tmp_path, bytes_max=SMALL + 2 * len(WEIGHTS) + 3)
    left = await abandoned(place, 2)
    content = {**CONTENT, "model.safetensors": weights(data=b"\2" * 8), "more.json": b"[1]"}
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    await place.uploads.plan(manifest(content, revision="v3"))
    other = manifest({**CONTENT, "model.safetensors": weights(data=b"\4" * 8)}, revision="v4")
    with pytest.raises(QuotaExceeded):
        await place.uploads.receive(other, sent(()))
    assert left in place.blobs
    place.clock.seconds += blobs.PROMISE_KEPT_S + 1
    long = manifest({**CONTENT, "model.safetensors": weights(data=b"\5" * 100)}, revision="v4")
    with pytest.raises(QuotaExceeded):
        await place.uploads.receive(long, sent(()))
    assert left in place.blobs
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(other, sent(()))
    assert left not in place.blobs


async def test_promises_have_a_bound(place: Place) -> None:
    """Of very many the oldest is forgotten; an upload under way is never among them."""
    held = manifest(CONTENT, revision="v3", quantization="int8")
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))

    async def slow() -> AsyncIterator[Chunk]:
        for context_tokens in range(1, blobs.PROMISES_MAX + 1):
            place.clock.seconds += 0.5
            await place.uploads.plan(replace(held, revision="", context_tokens=context_tokens))
        assert len(place.uploads._blobs._promises) == blobs.PROMISES_MAX
        await place.uploads.delete("m", "v2")
        yield chunks_of({"more.json": b"[1]"})[0]

    more = manifest({**CONTENT, "more.json": b"[1]"}, revision="v4")
    made = await place.uploads.receive(more, slow())
    assert read(Path(made.local_path)) == CONTENT


async def test_a_delete_that_fails_can_be_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision stays, whole and registered."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))

    def broken(*_args: Any) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", broken)
        with pytest.raises(InternalError, match="delete it again"):
            await place.uploads.delete("m", "v2")
    assert place.catalog.revision("m", "v2") is made
    assert read(Path(made.local_path)) == CONTENT
    await place.uploads.delete("m", "v2")
    assert list((place.directory / "data" / "revisions" / "m").iterdir()) == []
    assert DIGEST not in place.blobs


@pytest.mark.parametrize("by", ["an upload", "a delete", "a start"])
async def test_what_a_delete_could_not_remove_is_removed_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The revision is gone for everybody; its files go with the next upload, delete, or start."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    await push(place, manifest(CONTENT, revision="v3", quantization="int8"), CONTENT)

    def broken(*_args: Any, **_options: Any) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", broken)
        await place.uploads.delete("m", "v2")
    with pytest.raises(RevisionUnknown):
        place.catalog.revision("m", "v2")
    assert len(place.left_behind) == 1
    if by == "an upload":
        await push(place, manifest(CONTENT, quantization="nf4"), CONTENT)
    elif by == "a delete":
        await place.uploads.delete("m", "v3")
        assert DIGEST not in place.blobs
    else:
        await Place(place.directory).uploads.load()
    assert place.left_behind == []


async def test_a_directory_that_was_removed_by_hand_is_forgotten(place: Place) -> None:
    """The delete that was meant is done."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    shutil.rmtree(made.local_path)
    await place.uploads.delete("m", "v2")
    assert DIGEST not in place.blobs
    with pytest.raises(RevisionUnknown):
        place.catalog.revision("m", "v2")


async def test_a_delete_that_is_cancelled_goes_to_its_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are freed, although nobody waits for it."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    begun, loop = asyncio.Event(), asyncio.get_running_loop()
    clear = RevisionDirectories.clear

    def told(directories: RevisionDirectories) -> None:
        loop.call_soon_threadsafe(begun.set)
        clear(directories)

    monkeypatch.setattr(RevisionDirectories, "clear", told)
    deleting = asyncio.create_task(place.uploads.delete("m", "v2"))
    await begun.wait()
    deleting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deleting
    assert DIGEST not in place.blobs


async def test_the_directory_that_the_mesh_was_started_with_cannot_be_deleted(place: Place) -> None:
    """Also where that is an upload of an earlier mesh, under whatever name."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    place.catalog.register(replace(made, manifest=replace(made.manifest, revision="").named()))
    with pytest.raises(RevisionInUse):
        await place.uploads.delete("m", "v2")
    assert read(Path(made.local_path)) == CONTENT


async def test_an_upload_that_fails_ends_no_promise(place: Place) -> None:
    """Another client planned the same content under another name, and counts on what is here."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert await place.uploads.plan(manifest(CONTENT, revision="v3")) == ()
    more = {**CONTENT, "more.json": b"[1]"}
    await place.uploads.plan(manifest(more, revision="v4"))
    for failing in (manifest(more, revision="v4"), manifest(more, revision="v5")):
        with pytest.raises(ArtifactInvalid, match="not whole"):
            await place.uploads.receive(failing, sent(()))
    await place.uploads.receive(manifest(CONTENT, revision="v6"), sent(()))
    for name in ("v2", "v6"):
        await place.uploads.delete("m", name)
    place.clock.seconds += blobs.PROMISE_KEPT_S - 1
    made = await place.uploads.receive(manifest(CONTENT, revision="v3"), sent(()))
    assert read(Path(made.local_path)) == CONTENT


async def test_a_file_of_ours_that_was_cut_short_leaves_no_part(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was copied of it is wrong, and no client could go on with it."""
    config = place.directory / "boot" / "config.json"
    find = LocalContents.find

    def cut(local: LocalContents, *args: Any) -> dict[str, Path]:
        copies = find(local, *args)
        config.write_bytes(b"X" * (config.stat().st_size // 2))
        return copies

    monkeypatch.setattr(LocalContents, "find", cut)
    with pytest.raises(ArtifactInvalid, match=r"config\.json: .*plan the upload again"):
        await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    assert place.left_behind == []
