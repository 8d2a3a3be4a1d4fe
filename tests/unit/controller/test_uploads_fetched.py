"""Contents that come from the artifacts' URL: checked, once, in time; and what holds while it is away."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.common.errors import ArtifactInvalid, NotLeader, QuotaExceeded, StoreUnavailable
from services.common.partial_file import PartialFile
from services.controller.adapters import artifact_store, cached_revisions, revisions_at_url
from tests.fakes import faulty_store
from tests.fakes.faulty_store import Faults, FaultyFileSystem
from tests.fixtures.machines import RECORD, Machines, blob, downloaded, names
from tests.fixtures.upload_world import CONTENT, DIGEST, WEIGHTS, Place, manifest, push, read, sent, weights
from tests.fixtures.waiting import until

OTHER = {**CONTENT, "model.safetensors": weights(data=b"\2" * 8)}


@pytest.fixture
async def cold(machines: Machines) -> Place:
    """A machine that has nothing of what another one uploaded."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    return await machines.start("second")


def reads(faults: Faults) -> list[str]:
    """The reads of the weights."""
    return [name for _, name in faults.made("cat_file") if name == blob(DIGEST)]


def away(_call: str, _name: str) -> None:
    """Nothing answers."""
    raise ConnectionError


async def test_a_damaged_content_is_refused_and_mended(cold: Place, faults: Faults) -> None:
    """No byte of it is given to anybody; the next push that needs it sends it, and mends it for all."""
    faults.changed[DIGEST] = b"\xff" * len(WEIGHTS)
    pieces = cold.uploads.files.read("m", "v2", "model.safetensors", 0)
    with capture_logs() as logged, pytest.raises(ArtifactInvalid, match=r"model\.safetensors.*damaged.*Push"):
        await anext(pieces)
    assert [one["sha256"] for one in logged if one["event"] == "artifacts.damaged"] == [DIGEST]
    assert DIGEST not in cold.blobs
    assert cold.left_behind == []
    faults.calls.clear()
    with pytest.raises(ArtifactInvalid, match="damaged"):
        await downloaded(cold)
    assert reads(faults) == []
    faults.changed.clear()
    again = manifest(CONTENT, revision="v3")
    assert dict(await cold.uploads.plan(again)) == {DIGEST: 0}
    await push(cold, again, CONTENT)
    assert faults.made("put_file") == [("put_file", blob(DIGEST))]
    assert await downloaded(cold) == WEIGHTS


@pytest.mark.parametrize("left", [b"", WEIGHTS[:9]], ids=["gone", "short"])
async def test_a_content_that_is_not_whole_is_refused(cold: Place, left: bytes) -> None:
    """Somebody removed it at the URL, or cut it; it is no outage, and nobody waits for its end."""
    fs = FaultyFileSystem()
    fs.pipe_file(blob(DIGEST), left) if left else fs.rm_file(blob(DIGEST))
    with pytest.raises(ArtifactInvalid, match="damaged or gone"):
        await downloaded(cold)


async def test_everybody_waits_for_one_fetch(cold: Place, faults: Faults) -> None:
    """And whoever leaves meanwhile does not end it for the others."""
    faults.calls.clear()
    waiting = [asyncio.create_task(downloaded(cold)) for _ in range(8)]
    await until(lambda: faults.calls)
    waiting[0].cancel()
    assert await asyncio.gather(*waiting[1:]) == [WEIGHTS] * 7
    assert len(reads(faults)) == 1


async def test_a_fetch_goes_on_where_it_ended(
    cold: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away in the middle: what came is kept, and read no second time."""
    monkeypatch.setattr(artifact_store, "RANGE_BYTES", 8)
    monkeypatch.setattr(artifact_store, "RANGES_AHEAD", 1)
    faults.calls.clear()

    def cut(call: str, _name: str) -> None:
        if call == "cat_file" and len(reads(faults)) > 3:
            raise ConnectionError

    faults.fail = cut
    with pytest.raises(StoreUnavailable, match="What came so far is kept"):
        await downloaded(cold)
    (left,) = [one for one in cold.left_behind if one.endswith(".partial")]
    assert (cold.directory / "data" / "blobs" / left).read_bytes() == WEIGHTS[:24]
    faults.fail = lambda _call, _name: None
    faults.calls.clear()
    assert await downloaded(cold) == WEIGHTS
    assert len(reads(faults)) == -(-(len(WEIGHTS) - 24) // 8)


async def test_what_was_left_wrong_is_fetched_afresh(cold: Place) -> None:
    """The disk had it wrong, and the URL has not."""
    part = cold.uploads._blobs.part(DIGEST, len(WEIGHTS))
    (cold.directory / "data" / "blobs").mkdir(parents=True)
    part.open()
    part.append(b"\xff" * 9)
    part.close()
    assert await downloaded(cold) == WEIGHTS


async def test_who_waits_long_hears_that_it_goes_on(
    cold: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gives a controller up that sends nothing for a minute; empty pieces say that it is at work."""
    monkeypatch.setattr(cached_revisions, "SIGN_OF_LIFE_S", 0.01)
    go_on = threading.Event()

    def slow(call: str, _name: str) -> None:
        if call == "cat_file":
            go_on.wait(10)

    faults.fail = slow
    pieces = cold.uploads.files.read("m", "v2", "model.safetensors", 0)
    try:
        assert [await anext(pieces) for _ in range(3)] == [b""] * 3
    finally:
        go_on.set()
    assert b"".join([data async for data in pieces]) == WEIGHTS


async def test_the_end_of_the_lead_ends_a_fetch(cold: Place, faults: Faults) -> None:
    """At once, though the store is silent: the worker asks the next leader."""
    go_on, begun = threading.Event(), threading.Event()

    def hang(call: str, _name: str) -> None:
        if call == "cat_file":
            begun.set()
            go_on.wait(10)

    faults.fail = hang
    waiting = asyncio.create_task(downloaded(cold))
    try:
        await until(begun.is_set)
        cold.uploads.close()
        with pytest.raises(NotLeader):
            await asyncio.wait_for(waiting, 5)
    finally:
        go_on.set()


async def test_a_full_disk_is_told(cold: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(PartialFile, "append", full)
    with pytest.raises(QuotaExceeded, match="Make room"):
        await downloaded(cold)


async def test_what_is_cached_is_served_while_the_store_is_away(
    machines: Machines, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a controller that begins then. Changes are refused; when it is back, everything is there."""
    monkeypatch.setattr(revisions_at_url, "LOOK_AGAIN_S", 0.01)
    first = await machines.start("first")
    await push(first, manifest(CONTENT), CONTENT)
    second = await machines.start("second")
    second.clock.seconds += 1
    await push(second, manifest(OTHER, revision="v3"), OTHER)
    faults.fail = away
    assert await downloaded(second, "v3") == OTHER["model.safetensors"]
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await downloaded(second, "v2")
    with pytest.raises(StoreUnavailable):
        await push(second, manifest(OTHER, revision="v4", quantization="int8"), OTHER)
    assert names(second) == ["v3", "v2", "v1"]
    with capture_logs() as logged:
        first = await machines.start("first")
    assert [one["cached"] for one in logged if one["event"] == "artifacts.away"] == [1]
    assert (names(first), first.catalog.is_partial) == (["v2", "v1"], True)
    assert await downloaded(first) == WEIGHTS
    for call in (
        first.uploads.plan(manifest(OTHER, revision="v3")),
        first.uploads.receive(manifest(OTHER, revision="v3"), sent(())),
        first.uploads.delete("m", "v2"),
    ):
        with pytest.raises(StoreUnavailable, match=r"cached is served.*try again") as caught:
            await call
        assert caught.value.retryable
    faults.fail = lambda _call, _name: None
    await until(lambda: names(first) == ["v3", "v2", "v1"])
    assert not first.catalog.is_partial
    assert await downloaded(first, "v3") == OTHER["model.safetensors"]
    await first.uploads.delete("m", "v2")


async def test_what_was_fetched_whole_is_known_while_the_store_is_away(
    machines: Machines, faults: Faults
) -> None:
    """It has a directory then, as if it had been uploaded here: a leader that begins later serves it."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    second = await machines.start("second")
    made = second.catalog.revision("m", "v2")
    second.clock.seconds += 5
    for path in ("config.json", "tokenizer.json"):
        await downloaded(second, path=path)
    assert not (second.directory / "data" / "revisions" / "m" / "v2").exists()
    await downloaded(second)
    assert read(Path(made.local_path)) == CONTENT
    faults.fail = away
    again = await machines.start("second")
    assert again.catalog.revision("m", "v2") == made
    assert await downloaded(again) == WEIGHTS


async def test_what_was_deleted_while_the_store_was_away_does_not_come_back(
    machines: Machines, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy stays registered until the next time of leading, for it may be in use; it gets no record."""
    monkeypatch.setattr(revisions_at_url, "LOOK_AGAIN_S", 0.01)
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    await (await machines.start("second")).uploads.delete("m", "v2")
    faults.fail = away
    first = await machines.start("first")
    assert names(first) == ["v2", "v1"]
    faults.fail = lambda _call, _name: None
    with capture_logs() as logged:
        await until(lambda: "artifacts.swept" in [one["event"] for one in logged])
    assert RECORD not in faulty_store.objects()
    assert await downloaded(first) == WEIGHTS
    assert names(await machines.start("first")) == ["v1"]


async def test_an_empty_place_is_not_believed_by_who_has_copies(machines: Machines) -> None:
    """A directory that is not mounted looks so: no copy is removed, and it is said."""
    await push(await machines.start("first"), manifest(CONTENT), CONTENT)
    kept = dict(FaultyFileSystem.store)
    FaultyFileSystem.store.clear()
    with capture_logs() as logged:
        first = await machines.start("first")
    (told,) = [one for one in logged if one["event"] == "artifacts.away"]
    assert "mounted" in told["reason"]
    assert names(first) == ["v2", "v1"]
    assert await downloaded(first) == WEIGHTS
    assert faulty_store.objects() == {}
    FaultyFileSystem.store.update(kept)
    assert names(await machines.start("first")) == ["v2", "v1"]


@pytest.mark.parametrize("text", [b'{"format": 2}', b"", b"[]"])
async def test_another_layout_is_left_alone(machines: Machines, text: bytes) -> None:
    """A later version wrote it."""
    FaultyFileSystem().pipe_file("/bucket/m/format.json", text)
    with capture_logs() as logged:
        place = await machines.start("first")
    assert "update" in next(one["reason"] for one in logged if one["event"] == "artifacts.away")
    with pytest.raises(StoreUnavailable):
        await place.uploads.plan(manifest(CONTENT))


async def test_a_store_that_hangs_delays_a_leader_by_no_more_than_its_patience(
    machines: Machines, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members wait while it begins."""
    monkeypatch.setattr(revisions_at_url, "LOAD_PATIENCE_S", 0.05)
    go_on = threading.Event()

    def hang(_call: str, _name: str) -> None:
        go_on.wait(10)

    faults.fail = hang
    try:
        async with asyncio.timeout(5):
            place = await machines.start("first")
    finally:
        go_on.set()
    assert names(place) == ["v1"]
