"""Uploads over real gRPC: a cut at the last byte, a client that says nothing, and revisions in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import controller_service_pb2_grpc, model_pb2

from deploy.envoy import listener
from services.common import channel
from services.common.errors import ArtifactInvalid, ClientStalled, NotLeader, RevisionInUse, UploadConflict
from services.common.status import read_error
from services.controller import servicer
from tests.fakes.controller_ports import TIMEOUT_S, MemoryLead, MemoryRouteStore
from tests.fakes.controller_process import Controller, bearer, started
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.upload_world import CONTENT, DIGEST, WEIGHTS, digest_of

ADMIN = bearer("admin")


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    """A controller that leads."""
    async with started(tmp_path, MemoryRouteStore()) as controller:
        await controller.serving()
        yield controller


def manifest(revision: str = "v2", context_tokens: int = 64) -> model_pb2.Manifest:
    """A manifest of `CONTENT`."""
    files = [
        model_pb2.ArtifactFile(path=path, size_bytes=len(data), sha256=digest_of(data))
        for path, data in CONTENT.items()
    ]
    return model_pb2.Manifest(model="m", revision=revision, context_tokens=context_tokens, files=files)


def parts(wanted: model_pb2.Manifest, *missing: tuple[str, int]) -> list[pb.UploadRevisionRequest]:
    """What a client sends after its plan."""
    content = {digest_of(data): data for data in CONTENT.values()}
    chunks = [pb.BlobChunk(sha256=one, offset=at, data=content[one][at:]) for one, at in missing]
    return [
        pb.UploadRevisionRequest(manifest=wanted),
        *(pb.UploadRevisionRequest(chunk=chunk) for chunk in chunks if chunk.data),
    ]


async def planned(controller: Controller, wanted: model_pb2.Manifest) -> list[tuple[str, int]]:
    """What the controller misses."""
    plan = await controller.stub.PlanUpload(pb.PlanUploadRequest(manifest=wanted), metadata=ADMIN)
    return [(blob.sha256, blob.offset) for blob in plan.missing]


async def uploaded(controller: Controller, wanted: model_pb2.Manifest) -> pb.UploadRevisionResponse | None:
    """What comes of an upload that sends nothing more; None while the controller has not heard of the cut."""
    try:
        return await controller.stub.UploadRevision(iter(parts(wanted)), metadata=ADMIN)
    except grpc.aio.AioRpcError as error:
        assert isinstance(read_error(error), UploadConflict)  # noqa: PT017 - the other outcome is a reply
        return None


async def test_an_upload_takes_as_long_as_it_takes(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Envoy, which cuts requests that are not all there in time, lets it go on: its answer has begun."""
    monkeypatch.setattr(listener, "REQUEST_TIMEOUT_S", 1)
    wanted = manifest()
    missing = await planned(controller, wanted)
    edge = tmp_path / "edge"
    edge.mkdir()

    async def slow() -> AsyncIterator[pb.UploadRevisionRequest]:
        for part in parts(wanted, *missing):
            yield part
            await asyncio.sleep(0.8)

    async with (
        envoy_before(edge, controller.address) as url,
        channel.connect(url.removeprefix("http://")) as through,
    ):
        stub = controller_service_pb2_grpc.ControllerServiceStub(through)
        reply = await stub.UploadRevision(slow(), metadata=ADMIN, timeout=TIMEOUT_S)
    assert reply.revision.manifest.revision == "v2"


async def test_a_client_that_is_cut_at_the_last_byte_goes_on(controller: Controller) -> None:
    """It has sent every byte and hears no answer: nothing is asked for again, and the revision appears."""
    wanted = manifest()
    missing = await planned(controller, wanted)
    assert (DIGEST, 0) in missing

    async def cut() -> AsyncIterator[pb.UploadRevisionRequest]:
        for part in parts(wanted, *missing):
            yield part
        await asyncio.Event().wait()

    call = controller.stub.UploadRevision(cut(), metadata=ADMIN)
    async with asyncio.timeout(TIMEOUT_S):
        while await planned(controller, wanted):
            pass
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(TIMEOUT_S):
        while (reply := await uploaded(controller, wanted)) is None:
            pass
    assert reply.revision.manifest.revision == "v2"
    assert len(WEIGHTS) in {file.size_bytes for file in reply.revision.manifest.files}


async def test_a_client_that_begins_with_nothing_is_told(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds nothing, and no call waits for ever."""
    monkeypatch.setattr(servicer, "HELLO_TIMEOUT_S", 0.05)

    async def silent() -> AsyncIterator[pb.UploadRevisionRequest]:
        await asyncio.Event().wait()
        yield pb.UploadRevisionRequest()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(TIMEOUT_S):
            await controller.stub.UploadRevision(silent(), metadata=ADMIN)
    error = read_error(caught.value)
    assert isinstance(error, ClientStalled)
    assert "begins with" in error.message


async def test_what_serves_is_neither_overwritten_nor_deleted(controller: Controller) -> None:
    """Other content under its name, and its end, are refused while it serves; it goes on."""
    models = await controller.stub.ListRevisions(pb.ListRevisionsRequest(model="m"), metadata=ADMIN)
    serving = models.revisions[0].manifest.revision
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await planned(controller, manifest(serving))
    assert isinstance(read_error(caught.value), RevisionInUse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.stub.UploadRevision(iter(parts(manifest(serving), (DIGEST, 0))), metadata=ADMIN)
    assert isinstance(read_error(caught.value), RevisionInUse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.stub.DeleteRevision(
            pb.DeleteRevisionRequest(model="m", revision=serving), metadata=ADMIN
        )
    assert isinstance(read_error(caught.value), RevisionInUse)
    after = await controller.stub.ListRevisions(pb.ListRevisionsRequest(model="m"), metadata=ADMIN)
    assert after == models


async def test_a_context_beyond_the_models_is_refused(controller: Controller) -> None:
    """INVALID_ARGUMENT with both numbers."""
    wanted = manifest(context_tokens=65)
    missing = await planned(controller, wanted)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.stub.UploadRevision(iter(parts(wanted, *missing)), metadata=ADMIN)
    error = read_error(caught.value)
    assert isinstance(error, ArtifactInvalid)
    assert "65" in error.message
    assert "64" in error.message


def kept(directory: Path) -> list[str]:
    """The revisions on the disk of a controller, on their way or not."""
    return sorted(path.name for path in directory.rglob("revisions/m/*"))


async def test_who_leads_no_more_neither_takes_in_nor_deletes(controller: Controller, tmp_path: Path) -> None:
    """It has not heard yet that another one leads, and the lease says so."""
    assert isinstance(controller.store, MemoryRouteStore)
    wanted = manifest()
    await controller.stub.UploadRevision(
        iter(parts(wanted, *await planned(controller, wanted))), metadata=ADMIN
    )
    MemoryLead(controller.store, "other").grant()
    delete = pb.DeleteRevisionRequest(model="m", revision="v2")
    with pytest.raises(grpc.aio.AioRpcError) as deleted:
        await controller.stub.DeleteRevision(delete, metadata=ADMIN)
    assert isinstance(read_error(deleted.value), NotLeader)
    with pytest.raises(grpc.aio.AioRpcError) as sent:
        await controller.stub.UploadRevision(iter(parts(manifest("v3", 32))), metadata=ADMIN)
    assert isinstance(read_error(sent.value), NotLeader)
    assert kept(tmp_path) == ["v2"]
