"""Downloads that outlive a controller: the next one goes on where it ended, and no revision fails of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import controller_service_pb2_grpc, worker_pb2

from services.common import revision_download, server
from services.common.channel import connect
from services.common.errors import NotLeader, RevisionUnknown, StoreUnavailable
from services.common.grpc_types import Context
from services.common.revision_download import RevisionDownload
from services.common.system_clock import SystemClock
from services.gateway.adapters import controller_link as gateway_link
from services.gateway.core.catalog import Catalog
from services.gateway.core.tallies import Tallies
from services.worker.adapters.controller_link import ControllerLink, Membership
from services.worker.adapters.mesh_artifacts import MeshArtifacts
from services.worker.adapters.revision_cache import RevisionCache
from services.worker.core.revision import Residency, RevisionFile, RevisionSpec
from services.worker.core.stepper import Pulse
from tests.fakes.scripted_controller import ScriptedController, manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN
from tests.fixtures.tiny_tokenizer import write_tokenizer

DATA = bytes(range(256)) * 40
Script = Callable[[pb.DownloadRevisionRequest], AsyncIterator[bytes]]


class Scripted(controller_service_pb2_grpc.ControllerServiceServicer):
    """A controller that serves downloads as a test tells it to.

    Attributes:
        offsets: Where each download began.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self.offsets: list[int] = []

    async def DownloadRevision(
        self, request: pb.DownloadRevisionRequest, context: Context
    ) -> AsyncIterator[pb.DownloadRevisionResponse]:
        """What the script yields."""
        del context
        self.offsets.append(request.offset)
        async for data in self._script(request):
            yield pb.DownloadRevisionResponse(data=data)


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[tuple[Scripted, str, Any]]:
    """A controller that listens, its address and its server."""
    made = server.create(("interlock.v1.ControllerService",), SystemClock())
    scripted = Scripted(script)  # type: ignore[abstract] # it plays one method
    controller_service_pb2_grpc.add_ControllerServiceServicer_to_server(scripted, made.grpc_server)
    address = made.bind("127.0.0.1:0")
    await made.grpc_server.start()
    try:
        yield scripted, address, made.grpc_server
    finally:
        await made.grpc_server.stop(None)


async def rest(request: pb.DownloadRevisionRequest) -> AsyncIterator[bytes]:
    """A controller in good health."""
    yield DATA[request.offset :]


async def stuck(request: pb.DownloadRevisionRequest) -> AsyncIterator[bytes]:
    """One that sends a part, and then nothing."""
    yield DATA[request.offset : request.offset + 1_000]
    await asyncio.Event().wait()


async def deposed(request: pb.DownloadRevisionRequest) -> AsyncIterator[bytes]:
    """One that loses the lead after each part."""
    yield DATA[request.offset : request.offset + 4_000]
    if request.offset + 4_000 < len(DATA):
        raise NotLeader("Another controller leads.")


async def without(request: pb.DownloadRevisionRequest) -> AsyncIterator[bytes]:
    """One that has no such revision."""
    raise RevisionUnknown(request.revision)
    yield b""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a second between two attempts."""
    monkeypatch.setattr(revision_download, "RETRY_S", 0.01)


class Link:
    """Channels to controllers, the one that leads among them."""

    def __init__(self) -> None:
        self._leading: asyncio.Future[grpc.aio.Channel] = asyncio.get_running_loop().create_future()

    def lead(self, channel: grpc.aio.Channel) -> None:
        """There is one."""
        self._leading.set_result(channel)

    def lose(self) -> None:
        """There is none."""
        self._leading = asyncio.get_running_loop().create_future()

    async def connected(self) -> grpc.aio.Channel:
        """See `Connected`."""
        return await asyncio.shield(self._leading)

    def download(self, patience_s: float = 20.0) -> RevisionDownload:
        """One over this link."""
        return RevisionDownload("m", "r", MESH_TOKEN, self.connected, patience_s=patience_s)


@pytest.mark.parametrize("by", ["its link closing the channel", "its end"])
async def test_a_download_outlives_its_controller(by: str) -> None:
    """It waits for the next one, however this one went, and asks it for what is missing and no more."""
    link, came = Link(), asyncio.Event()

    async def read() -> bytes:
        data = b""
        async with aclosing(link.download().read("f", 0)) as chunks:
            async for chunk in chunks:
                data += chunk
                came.set()
        return data

    async with (
        serving(stuck) as (_, first_at, first_server),
        serving(rest) as (second, second_at, _),
        connect(first_at) as first,
        connect(second_at) as other,
    ):
        link.lead(first)
        reading = asyncio.create_task(read())
        await came.wait()
        link.lose()
        if by == "its end":
            await first_server.stop(None)
        else:
            await first.close()
        link.lead(other)
        assert await reading == DATA
        assert second.offsets == [1_000]


async def test_one_that_leads_no_more_is_asked_again() -> None:
    """It says so at once, and may lead again a moment later: nothing comes twice."""
    async with serving(deposed) as (controller, address, _), connect(address) as channel:
        link = Link()
        link.lead(channel)
        assert b"".join([data async for data in link.download().read("f", 0)]) == DATA
        assert controller.offsets == [0, 4_000, 8_000]


async def test_a_refusal_is_told_at_once() -> None:
    """A revision that is not there will not come by waiting."""
    async with serving(without) as (controller, address, _), connect(address) as channel:
        link = Link()
        link.lead(channel)
        with pytest.raises(RevisionUnknown):
            await anext(link.download().read("f", 0))
        assert controller.offsets == [0]


async def test_patience_has_an_end() -> None:
    """Where no controller comes, and where one is there and sends nothing."""
    link = Link()
    with pytest.raises(StoreUnavailable, match="Start the rollout again"):
        await anext(link.download(0.05).read("f", 0))
    async with serving(stuck) as (_, address, _), connect(address) as channel:
        link.lead(channel)
        chunks = link.download(0.5).read("f", 0)
        assert await anext(chunks) == DATA[:1_000]
        with pytest.raises(StoreUnavailable):
            await anext(chunks)


async def test_whoever_is_cancelled_ends() -> None:
    """A closed channel looks like a cancellation; a cancellation is none the less one."""
    async with serving(stuck) as (controller, address, _), connect(address) as channel:
        link, came = Link(), asyncio.Event()
        link.lead(channel)

        async def read() -> None:
            async with aclosing(link.download().read("f", 0)) as chunks:
                async for _ in chunks:
                    came.set()

        reading = asyncio.create_task(read())
        await came.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert controller.offsets == [0]


class Halting(ScriptedController):
    """Attaches members as the scripted one does, but sends half of every file, and then leads no more.

    Attributes:
        halted: Set when it sends no more.
    """

    def __init__(self, manifest: Any, directory: Path) -> None:
        super().__init__(manifest, directory)
        self.halted = asyncio.Event()

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """Only until it halts."""
        if self.halted.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Another one leads.")
        async for response in super().Attach(request_iterator, context):
            yield response

    async def DownloadRevision(
        self, request: pb.DownloadRevisionRequest, context: Context
    ) -> AsyncIterator[pb.DownloadRevisionResponse]:
        """The first half."""
        yield await anext(super().DownloadRevision(request, context))
        self.halted.set()
        await asyncio.Event().wait()


@asynccontextmanager
async def two(
    manifest: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Halting, ScriptedController, tuple[str, ...]]]:
    """A controller that halts, the one that leads after it, and their addresses."""
    async with AsyncExitStack() as exits:
        second, second_at = await exits.enter_async_context(scripted_controller(manifest, directory))
        with monkeypatch.context() as patched:
            patched.setattr("tests.fakes.scripted_controller.ScriptedController", Halting)
            first, first_at = await exits.enter_async_context(scripted_controller(manifest, directory))
        assert isinstance(first, Halting)
        yield first, second, (first_at, second_at)


def assert_apart(controller: ScriptedController) -> None:
    """Files came over other connections than leases, which would wait behind them on a slow line."""
    assert controller.attached_by
    assert controller.downloaded_by
    assert controller.attached_by.isdisjoint(controller.downloaded_by)


class Deaf:
    """A `RevisionHandshake` of a worker whose revision is being fetched already."""

    def prepare(self, spec: RevisionSpec) -> None:
        """See `RevisionHandshake.prepare`."""

    def stage(self, spec: RevisionSpec) -> None:
        """See `RevisionHandshake.stage`."""

    def prove(self, revision: str) -> None:
        """See `RevisionHandshake.prove`."""

    def activate(self, revision: str, epoch: int) -> None:
        """See `RevisionHandshake.activate`."""

    def retire(self, revision: str) -> None:
        """See `RevisionHandshake.retire`."""

    def abort(self, revision: str) -> None:
        """See `RevisionHandshake.abort`."""


async def test_a_worker_fetches_on_over_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its link closes the connection of a file in the middle of it, and finds the next controller."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(DATA)
    manifest = manifest_of(source, model="m", revision="r1")
    async with two(manifest, source, monkeypatch) as (first, second, addresses):
        member = Membership("w", "i", "127.0.0.1:1", 1, addresses, MESH_TOKEN, ())
        link = ControllerLink(member, Residency(), Pulse, lambda: None)
        running = asyncio.create_task(link.run(Deaf()))
        files = tuple(RevisionFile(one.path, one.size_bytes, one.sha256) for one in manifest.files)
        store = MeshArtifacts(RevisionCache(tmp_path / "cache", 1 << 30), MESH_TOKEN, link.connected)
        fetching = asyncio.create_task(
            store.fetch(RevisionSpec("m", "r1", files), lambda _done, _total: None)
        )
        await first.halted.wait()
        # The stream ends, as that of a controller that was deposed.
        await first.commands.put(None)
        directory = await fetching
        assert (directory / "model.safetensors").read_bytes() == DATA
        # Another revision of the same files finds them.
        assert await store.fetch(RevisionSpec("m", "r2", files), lambda _done, _total: None) == directory
        assert second.downloads == ["model.safetensors"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for controller in (first, second):
            assert_apart(controller)


async def test_a_gateway_fetches_on_over_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was asked to prepare ends with the stream, and the next controller asks for it again."""
    source = write_tokenizer(tmp_path / "source")
    manifest = manifest_of(source, model="m", revision="r1")
    async with two(manifest, source, monkeypatch) as (first, second, addresses):
        member = gateway_link.Membership("g", "i", "127.0.0.1:1", MESH_TOKEN, addresses, tmp_path / "cache")
        link = gateway_link.ControllerLink(member, Catalog(), Tallies())
        running = asyncio.create_task(link.run())
        await first.halted.wait()
        # The stream ends in peace, and takes with it what would wait for bytes for ever.
        await first.commands.put(None)
        await second.wait_heard("ready")
        assert [message.WhichOneof("event") for message in first.heard] == ["hello"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for controller in (first, second):
            assert_apart(controller)


async def test_revisions_with_one_tokenizer_share_it(tmp_path: Path) -> None:
    """Reading one holds up every stream, so it is read once; another one is read, too.

    While a revision of less context is held as well, requests are counted for that.
    """
    same, other = (
        write_tokenizer(tmp_path / "same"),
        write_tokenizer(tmp_path / "other", template="{{ 'a' }}"),
    )
    catalog = Catalog()
    member = gateway_link.Membership("g", "i", "127.0.0.1:1", MESH_TOKEN, (), tmp_path / "cache")
    link = gateway_link.ControllerLink(member, catalog, Tallies())
    found = []
    async with connect("127.0.0.1:1") as nobody:
        for epoch, (name, source) in enumerate({"r1": same, "r2": same, "r3": other}.items(), start=1):
            manifest = manifest_of(source, model="m", revision=name, local_path=str(source))
            manifest.context_tokens //= epoch
            assert (await link.prepare(manifest, nobody)).ready.revision == name
            link.activate(pb.Activate(model="m", revision=name, epoch=epoch))
            found.append(catalog.find("m").tokenizer)
    assert found[0] is found[1] is not found[2]
    assert [(one.revision, one.phase) for one in link.hello().hello.revisions][2] == (
        "r3",
        worker_pb2.REVISION_PHASE_ACTIVE,
    )
    link.activate(pb.Activate(model="m", revision="r1", epoch=4))
    lengths = [catalog.find("m").context_tokens]
    for gone in ("r3", "r2"):
        link.drop("m", gone)
        lengths.append(catalog.find("m").context_tokens)
    assert lengths == [170, 256, 512]
