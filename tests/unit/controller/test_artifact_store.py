"""The store of objects: what each call does on real implementations, and what a fault becomes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from structlog.testing import capture_logs

from services.common.config import ConfigInvalid
from services.common.errors import StoreUnavailable
from services.controller.adapters import artifact_store
from services.controller.adapters.artifact_store import CALLS_AT_ONCE_MAX, ArtifactStore
from tests.fakes import faulty_store
from tests.fakes.faulty_store import Faults, FaultyFileSystem


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """A store of a real implementation, empty."""
    MemoryFileSystem.store.clear()
    yield ArtifactStore(f"file://{tmp_path}/remote" if request.param == "file" else "memory://a/b")
    MemoryFileSystem.store.clear()


def faulty(**settings: float) -> ArtifactStore:
    """The store that can fail, with two repetitions at once."""
    return ArtifactStore("faulty://bucket/base", pauses_s=(0.0, 0.0), **settings)


async def test_objects_are_what_was_written(store: ArtifactStore, tmp_path: Path) -> None:
    """Whole, in part, by listing, and after they were replaced and removed."""
    (tmp_path / "one").write_bytes(b"0123456789")
    assert await store.size("d/one") is None
    assert await store.read("d/one", 0, 5) is None
    assert await store.names("d") == {}
    await store.put("d/one", tmp_path / "one")
    await store.put("d/e/two", tmp_path / "one")
    assert await store.size("d/one") == 10
    assert await store.size("d/e") is None
    assert await store.read("d/one", 3, 6) == b"345"
    assert await store.read("d/one", 3, 3) == b""
    assert [one.size_bytes for one in (await store.names("d")).values()] == [10]
    found = await store.all_below("d")
    assert sorted(found) == ["one", "two"]
    assert all(one.modified_s is not None and one.modified_s > 1e9 for one in found.values())
    await store.replace("d/one", b"new")
    assert await store.read("d/one", 0, 3) == b"new"
    assert await store.remove("d/one")
    assert not await store.remove("d/one")
    assert await store.size("d/one") is None


async def test_a_name_is_given_once(store: ArtifactStore) -> None:
    """The second one changes nothing, and is told."""
    assert await store.create("a/name", b"first")
    assert not await store.create("a/name", b"other")
    assert await store.read("a/name", 0, 5) == b"first"


async def test_ranges_come_in_order(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several are on their way at once; from an offset on, and no byte twice."""
    monkeypatch.setattr(artifact_store, "RANGE_BYTES", 7)
    data = bytes(range(250))
    (tmp_path / "one").write_bytes(data)
    await store.put("one", tmp_path / "one")
    pieces = [piece async for piece in store.read_all("one", 3, len(data))]
    assert b"".join(pieces) == data[3:]
    assert len(pieces) > 20
    assert [piece async for piece in store.read_all("two", 0, 9)] == []


async def test_what_passes_is_tried_again(faults: Faults) -> None:
    """Two failures of any kind, then it works; nobody but the log is told."""
    left = [OSError("gone"), RuntimeError("of a library")]

    def fail(_call: str, _name: str) -> None:
        if left:
            raise left.pop()

    faults.fail = fail
    with capture_logs() as logged:
        assert await faulty().create("a", b"1")
    assert [(one["event"], one["call"], one["error"]) for one in logged] == [
        ("artifacts.failed", "create", "RuntimeError"),
        ("artifacts.failed", "create", "OSError"),
    ]


async def test_a_store_that_is_away_is_told_with_what_to_do(faults: Faults) -> None:
    """After three attempts, and refused credentials after one."""

    def away(_call: str, _name: str) -> None:
        raise ConnectionError

    faults.fail = away
    with pytest.raises(StoreUnavailable, match=r"does not answer.*try again"):
        await faulty().size("a")
    assert len(faults.calls) == 3

    def refused(_call: str, _name: str) -> None:
        raise PermissionError

    faults.calls.clear()
    faults.fail = refused
    with pytest.raises(StoreUnavailable, match="credentials"):
        await faulty().size("a")
    assert len(faults.calls) == 1


async def test_a_store_that_hangs_is_left(faults: Faults) -> None:
    """The loop goes on, callers are told in time, and no more threads wait than may; then all is well."""
    go_on = threading.Event()

    def hang(_call: str, _name: str) -> None:
        go_on.wait(20)

    faults.fail = hang
    store = faulty(call_timeout_s=0.05)
    try:
        calls = [asyncio.create_task(store.size("a")) for _ in range(2 * CALLS_AT_ONCE_MAX)]
        beats = 0
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.005)
            beats += 1
        assert beats > 5
        assert all(isinstance(call.exception(), StoreUnavailable) for call in calls)
        waiting = [one for one in threading.enumerate() if one.name == "may-hang"]
        assert len(waiting) == len(faults.calls) == CALLS_AT_ONCE_MAX
        assert all(one.daemon for one in waiting)
    finally:
        go_on.set()
    for thread in waiting:
        thread.join(5)
    assert await store.size("a") is None


async def test_what_is_cut_is_no_success(faults: Faults, tmp_path: Path) -> None:
    """Fewer bytes than were asked for, and an object that is shorter than its file."""
    (tmp_path / "one").write_bytes(b"0123456789")
    await faulty().put("one", tmp_path / "one")
    faults.changed["one"] = b"0123"
    with pytest.raises(StoreUnavailable):
        await faulty().read("one", 0, 10)

    def cut(call: str, name: str) -> None:
        if call == "info":
            faulty_store.FaultyFileSystem.store[name].truncate(4)

    faults.fail = cut
    with pytest.raises(StoreUnavailable):
        await faulty().put("one", tmp_path / "one")


async def test_no_secret_of_a_url_is_logged(faults: Faults) -> None:
    """Neither as it is written nor as it is meant, also where a library repeats the URL."""
    url = "faulty://user:pa%2Fss@host/base?token=t0k3n"

    def fail(_call: str, name: str) -> None:
        raise OSError(f"cannot reach {url} as pa/ss with t0k3n: {name} {'x' * 1000}")

    faults.fail = fail
    store = ArtifactStore(url, pauses_s=())
    with capture_logs() as logged, pytest.raises(StoreUnavailable) as caught:
        await store.size("a")
    told = f"{logged} {caught.value.message} {store.identity}"
    assert "cannot reach" in told
    for secret in ("pa%2Fss", "pa/ss", "t0k3n", "user"):
        assert secret not in told
    assert len(logged[0]["text"]) <= 300
    assert store.identity == ArtifactStore("faulty://host/base/").identity


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("/a/directory", "PROTOCOL://"),
        ("s3:bucket", "PROTOCOL://"),
        ("memory://", "PROTOCOL://"),
        ("simplecache::memory://a", "no chain"),
        ("no-such://pass:word@a", "no such protocol"),
        ("dropbox://a", "needs a package"),
    ],
)
def test_a_url_that_cannot_be_used_stops_the_start(url: str, named: str) -> None:
    """With what is wrong, and without the URL."""
    with pytest.raises(ConfigInvalid, match=named) as caught:
        ArtifactStore(url)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("is_object_store", [True, False])
async def test_a_bucket_is_never_made(
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    is_object_store: bool,  # noqa: FBT001
) -> None:
    """A mistyped one would be filled; directories of a file system are made."""
    made: list[str] = []
    monkeypatch.setattr(FaultyFileSystem, "async_impl", is_object_store)
    monkeypatch.setattr(FaultyFileSystem, "makedirs", lambda _, path, **__: made.append(path))

    def missing(call: str, name: str) -> None:
        if call == "pipe_file" and not made:
            raise FileNotFoundError(name)

    faults.fail = missing
    if is_object_store:
        with pytest.raises(StoreUnavailable):
            await faulty().create("a/b", b"1")
    else:
        assert await faulty().create("a/b", b"1")
    assert made == ([] if is_object_store else ["/bucket/base/a"])
