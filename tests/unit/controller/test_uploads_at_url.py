"""Revisions whose home is a URL: how they get there, what another machine finds, and how they go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from structlog.testing import capture_logs

from services.common.errors import (
    ArtifactInvalid,
    NotLeader,
    QuotaExceeded,
    RevisionInUse,
    RevisionUnknown,
    StoreUnavailable,
)
from services.controller.adapters.blobs import ORPHAN_KEPT_S
from services.controller.adapters.revision_directories import RevisionDirectories
from tests.fakes import faulty_store
from tests.fakes.faulty_store import Faults, FaultyFileSystem
from tests.fixtures.machines import RECORD, Machines, blob, downloaded, names
from tests.fixtures.upload_world import CONTENT, DIGEST, digest_of, manifest, push, read, weights
from tests.fixtures.waiting import until

OTHER = {**CONTENT, "model.safetensors": weights(data=b"\2" * 8)}
OTHER_DIGEST = digest_of(OTHER["model.safetensors"])


@pytest.mark.parametrize("protocol", ["file", "memory"])
async def test_another_machine_finds_what_was_uploaded(tmp_path: Path, protocol: str) -> None:
    """It starts with nothing, lists every revision in its order, and gives each file, from any byte."""
    MemoryFileSystem.store.clear()
    machines = Machines(tmp_path, f"file://{tmp_path}/remote" if protocol == "file" else "memory://bucket")
    first = await machines.start("first")
    made = await push(first, manifest(CONTENT), CONTENT)
    assert read(Path(made.local_path)) == CONTENT
    first.clock.seconds += 1
    await push(first, manifest(OTHER, revision="a-later-one"), OTHER)
    second = await machines.start("second")
    assert names(second) == ["a-later-one", "v2", "v1"]
    assert second.catalog.revision("m", "v2").manifest == made.manifest
    assert second.catalog.revision("m", "v2").create_time_s == made.create_time_s
    assert second.blobs == []
    for path, data in CONTENT.items():
        assert await downloaded(second, path=path) == data
    assert await downloaded(second, at=5) == CONTENT["model.safetensors"][5:]
    assert DIGEST in second.blobs
    assert second.left_behind == []
    second.uploads.close()
    MemoryFileSystem.store.clear()


async def test_contents_come_before_the_record(machines: Machines, faults: Faults) -> None:
    """Nothing is written before all was checked, and the record is the last that is."""
    place = await machines.start("first")
    broken = {**CONTENT, "model.safetensors": b"\0" * 16}
    with pytest.raises(ArtifactInvalid, match="header"):
        await push(place, manifest(broken), broken)
    assert faults.made("put_file") == []
    await push(place, manifest(CONTENT), CONTENT)
    written = [name for _, name in faults.made("put_file", "pipe_file")]
    assert sorted(written[1:-1]) == sorted(blob(digest_of(data)) for data in CONTENT.values())
    assert written[-1] == RECORD


async def test_a_crash_before_the_record_leaves_contents_that_go_after_a_day(
    machines: Machines, faults: Faults
) -> None:
    """No revision exists, here or elsewhere; the next upload goes on with them, or the sweep removes them."""

    def crash(call: str, name: str) -> None:
        if call == "pipe_file" and name == RECORD:
            raise ConnectionError

    place = await machines.start("first")
    faults.fail = crash
    with pytest.raises(StoreUnavailable, match="try again"):
        await push(place, manifest(CONTENT), CONTENT)
    assert names(place) == ["v1"]
    assert RECORD not in faulty_store.objects()
    assert list((place.directory / "data" / "revisions" / "m").iterdir()) == []
    later = await machines.start("first")
    assert names(later) == ["v1"]
    assert not (later.directory / "data" / "revisions" / "m" / "v2").exists()
    at_url = later.uploads._at_url
    assert at_url is not None
    await at_url.sweep()
    assert blob(DIGEST) in faulty_store.objects()
    # The store's clock is the real one, which is ahead of the test's.
    later.clock.seconds += 1e9
    await at_url.sweep()
    assert not [name for name in faulty_store.objects() if "blobs" in name]


async def test_the_sweep_spares_what_is_named_or_counted_on(machines: Machines) -> None:
    """By a record, by an upload under way, or, while a record cannot be read, by nobody knows what."""
    place = await machines.start("first")
    await push(place, manifest(CONTENT), CONTENT)
    at_url, orphan = place.uploads._at_url, digest_of(b"orphan")
    assert at_url is not None
    FaultyFileSystem().pipe_file(blob(orphan), b"orphan")
    place.clock.seconds += 1e9
    before = faulty_store.objects()
    FaultyFileSystem().pipe_file("/bucket/m/revisions/v7.json", b"{}")
    with capture_logs() as logged:
        await at_url.sweep()
    assert "artifacts.unswept" in [line["event"] for line in logged]
    FaultyFileSystem().rm_file("/bucket/m/revisions/v7.json")
    place.uploads._blobs.promise("somebody", [orphan], ORPHAN_KEPT_S)
    await at_url.sweep()
    assert faulty_store.objects() == before
    place.uploads._blobs.release("somebody")
    place.leading = False
    with pytest.raises(NotLeader):
        await at_url.sweep()
    assert faulty_store.objects() == before
    place.leading = True
    await at_url.sweep()
    assert before.keys() - faulty_store.objects().keys() == {blob(orphan)}


async def test_what_another_revision_has_is_fetched_and_not_sent(machines: Machines) -> None:
    """On a machine that has none of it: another quantization sends its manifest alone."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    second = await machines.start("second")
    same = manifest(CONTENT, revision="v3", quantization="int8")
    assert await second.uploads.plan(same) == ()
    made = await push(second, same, {})
    assert read(Path(made.local_path)) == CONTENT


async def test_a_name_is_given_once(machines: Machines, tmp_path: Path) -> None:
    """A leader that did not see the record finds it: equal content is the same revision, other is refused."""
    first = await machines.start("first")
    apart = Machines(tmp_path / "apart")
    (tmp_path / "apart").mkdir()
    second = await apart.start("second")
    second.clock.seconds += 5
    made = await push(first, manifest(CONTENT), CONTENT)
    with pytest.raises(RevisionInUse, match="choose another name"):
        await push(second, manifest(OTHER), OTHER)
    assert names(second) == ["v1"]
    assert (await push(second, manifest(CONTENT), CONTENT)).create_time_s == made.create_time_s
    second.uploads.close()


async def test_a_damaged_record_is_passed_over_and_mended(machines: Machines) -> None:
    """The same can be pushed again in its place, and is found then."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    FaultyFileSystem().pipe_file(RECORD, b'{"manifest"')
    with capture_logs() as logged:
        second = await machines.start("second")
    assert names(second) == ["v1"]
    assert [line["revision"] for line in logged if line["event"] == "revision.unreadable"] == ["v2"]
    await push(second, manifest(CONTENT), CONTENT)
    assert names(await machines.start("third")) == ["v2", "v1"]
    # The first machine has a copy of it still.
    FaultyFileSystem().pipe_file(RECORD, b"")
    first = await machines.start("first")
    assert names(first) == ["v2", "v1"]
    await until(lambda: faulty_store.objects()[RECORD] != b"")


async def test_a_deleted_revision_goes_from_both(machines: Machines) -> None:
    """What another one has stays; a machine that has a copy still removes it when it leads next."""
    first = await machines.start("first")
    await push(first, manifest(CONTENT), CONTENT)
    await push(first, manifest(OTHER, revision="v3"), OTHER)
    second = await machines.start("second")
    await second.uploads.delete("m", "v2")
    assert names(second) == ["v3", "v1"]
    left = faulty_store.objects()
    assert RECORD not in left
    assert blob(DIGEST) not in left
    assert {blob(digest_of(data)) for data in OTHER.values()} < left.keys()
    with pytest.raises(RevisionUnknown):
        await downloaded(second)
    first = await machines.start("first")
    assert names(first) == ["v3", "v1"]
    assert not (first.directory / "data" / "revisions" / "m" / "v2").exists()
    assert await downloaded(first, "v3") == OTHER["model.safetensors"]


async def test_what_cannot_be_deleted_stays_where_it_was(machines: Machines, faults: Faults) -> None:
    """The store is away; nobody can begin to use the revision while it is asked. Deleted again, it goes."""
    place = await machines.start("first")
    await push(place, manifest(CONTENT), CONTENT)
    place.clock.seconds += 1
    await push(place, manifest(OTHER, revision="v3"), OTHER)
    seen: list[list[str]] = []

    def away(call: str, _name: str) -> None:
        if call == "rm_file":
            seen.append(names(place))
            raise ConnectionError

    faults.fail = away
    with pytest.raises(StoreUnavailable):
        await place.uploads.delete("m", "v2")
    assert seen == [["v3", "v1"]]
    assert names(place) == ["v3", "v2", "v1"]
    assert await downloaded(place) == CONTENT["model.safetensors"]

    def contents_away(call: str, name: str) -> None:
        if call == "rm_file" and "blobs" in name:
            raise ConnectionError

    faults.fail = contents_away
    await place.uploads.delete("m", "v2")
    assert names(place) == ["v3", "v1"]
    assert blob(DIGEST) in faulty_store.objects()


async def test_a_leader_of_yesterday_deletes_nothing(machines: Machines) -> None:
    """Neither at the URL nor here."""
    place = await machines.start("first")
    await push(place, manifest(CONTENT), CONTENT)
    before = faulty_store.objects()
    place.leading = False
    with pytest.raises(NotLeader):
        await place.uploads.delete("m", "v2")
    assert faulty_store.objects() == before
    assert names(place) == ["v2", "v1"]


async def test_a_lead_that_is_lost_gives_no_name(machines: Machines, faults: Faults) -> None:
    """The contents were sent, and the lease is looked at before the record is."""
    place = await machines.start("first")

    def lost(call: str, _name: str) -> None:
        if call == "put_file":
            place.leading = False

    faults.fail = lost
    with pytest.raises(NotLeader):
        await push(place, manifest(CONTENT), CONTENT)
    assert RECORD not in faulty_store.objects()
    assert place.left_behind == []


async def test_contents_that_a_late_leader_removed_are_sent_once_more(
    machines: Machines, faults: Faults
) -> None:
    """They were there when they were looked for, and were gone when the record was written."""
    place = await machines.start("first")

    def removed(call: str, name: str) -> None:
        if call == "pipe_file" and name == RECORD:
            FaultyFileSystem.store.pop(blob(DIGEST))

    faults.fail = removed
    await push(place, manifest(CONTENT), CONTENT)
    assert faulty_store.objects()[blob(DIGEST)] == CONTENT["model.safetensors"]


async def test_what_is_kept_counts_wherever_it_is(machines: Machines) -> None:
    """A machine that has fetched nothing takes no more in than one that has everything."""
    total = sum(map(len, CONTENT.values()))
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    second = await machines.start("second", bytes_max=total + 20)
    with pytest.raises(QuotaExceeded, match="delete a revision"):
        await push(second, manifest(OTHER, revision="v3"), OTHER)
    third = await machines.start("third", bytes_max=total + len(OTHER["model.safetensors"]))
    await push(third, manifest(OTHER, revision="v3"), OTHER)


async def test_what_only_a_machine_has_is_taken_to_the_url(machines: Machines, faults: Faults) -> None:
    """It was uploaded before there was one: it is served at once, and has a home soon; only what is whole."""
    alone = await machines.start("first", url="")
    await push(alone, manifest(CONTENT), CONTENT)
    await push(alone, manifest(OTHER, revision="v3"), OTHER)
    damaged = alone.directory / "data" / "revisions" / "m" / "v3" / "model.safetensors"
    damaged.write_bytes(b"\1" * damaged.stat().st_size)
    with capture_logs() as logged:
        first = await machines.start("first")
        assert names(first) == ["v3", "v2", "v1"]
        await until(lambda: "artifacts.swept" in [one["event"] for one in logged])
    found = [(one["event"], one["revision"]) for one in logged if one["event"].startswith("revision.")]
    assert sorted(found) == [("revision.adopted", "v2"), ("revision.damaged", "v3")]
    assert blob(OTHER_DIGEST) not in faulty_store.objects()
    second = await machines.start("second")
    assert names(second) == ["v2", "v1"]
    assert await downloaded(second) == CONTENT["model.safetensors"]
    # Once it has a home, it is a copy: deleted elsewhere, it does not come back.
    await second.uploads.delete("m", "v2")
    faults.calls.clear()
    first = await machines.start("first")
    assert names(first) == ["v3", "v1"]


async def test_without_the_url_a_directory_is_what_it_was(machines: Machines) -> None:
    """What is whole in it is served, and another URL gets a copy."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    alone = await machines.start("first", url="")
    assert names(alone) == ["v2", "v1"]
    assert await downloaded(alone) == CONTENT["model.safetensors"]
    moved = await machines.start("first", url="faulty://elsewhere")
    assert names(moved) == ["v2", "v1"]
    name = "/elsewhere/m/revisions/v2.json"
    await until(lambda: name in faulty_store.objects())


async def test_a_directory_of_another_content_is_kept_aside(machines: Machines) -> None:
    """The URL says what a name means; what this machine alone has under it is not thrown away."""
    alone = await machines.start("second", url="")
    await push(alone, manifest(OTHER), OTHER)
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    with capture_logs() as logged:
        second = await machines.start("second")
    (told,) = [one for one in logged if one["event"] == "revision.name_taken"]
    aside = second.directory / "data" / "revisions" / "m" / told["kept_as"]
    assert read(aside) == OTHER
    assert await downloaded(second) == CONTENT["model.safetensors"]


async def test_files_of_a_copy_that_are_gone_are_fetched(machines: Machines) -> None:
    """Somebody removed one; its directory is a cache."""
    place = await machines.start("first")
    made = await push(place, manifest(CONTENT), CONTENT)
    (Path(made.local_path) / "model.safetensors").unlink()
    (place.directory / "data" / "blobs" / DIGEST).unlink()
    assert await downloaded(place) == CONTENT["model.safetensors"]
    shutil.rmtree(place.directory / "data")
    assert await downloaded(place, path="config.json") == CONTENT["config.json"]


async def test_a_directory_that_cannot_get_its_name_gives_none_at_the_url(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at the last step; the next upload goes on with what is there."""
    place = await machines.start("first")

    def fails(*_: object) -> None:
        raise OSError(5, "EIO")

    with monkeypatch.context() as patched:
        patched.setattr(RevisionDirectories, "place", fails)
        with pytest.raises(OSError, match="EIO"):
            await push(place, manifest(CONTENT), CONTENT)
    assert RECORD not in faulty_store.objects()
    assert await place.uploads.plan(manifest(CONTENT)) == ()
    await push(place, manifest(CONTENT), {})
    assert RECORD in faulty_store.objects()
