"""A controller over real gRPC: members attach, are lost and return; files travel; credentials are checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2, worker_pb2

from services.common import artifacts
from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    InterlockError,
    MeshCredentialInvalid,
    RevisionUnknown,
    RolloutUnknown,
    ScopeMissing,
    StoreUnavailable,
    TokenMissing,
    WorkerUnknown,
)
from services.common.status import read_error
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import LEASE_TTL_S, WEIGHTS, Controller, bearer, started
from tests.fixtures.waiting import until

WORKER, GATEWAY = pb.MEMBER_KIND_WORKER, pb.MEMBER_KIND_GATEWAY


@pytest.fixture
def store() -> MemoryRouteStore:
    """What gateways would read."""
    return MemoryRouteStore()


@pytest.fixture
async def controller(tmp_path: Path, store: MemoryRouteStore) -> AsyncIterator[Controller]:
    """A controller that leads."""
    async with started(tmp_path, store) as controller:
        await controller.serving()
        yield controller


async def refused(call: Awaitable[object]) -> InterlockError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_error(caught.value)


async def test_mesh_comes_up(controller: Controller, store: MemoryRouteStore) -> None:
    """A gateway and a worker go through the handshake; then record and route are in the store."""
    async with controller.member() as gateway, controller.member() as worker:
        await gateway.hello(GATEWAY, "g", "1")
        lease = (await gateway.hear("lease")).lease
        assert lease.ttl.ToMilliseconds() == LEASE_TTL_S * 1000
        assert lease.fence == 1
        manifest = (await gateway.hear("prepare")).prepare.manifest
        assert [file.path for file in manifest.files] == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert manifest.quantization == model_pb2.QUANTIZATION_UNSPECIFIED
        assert (manifest.model, manifest.context_tokens) == ("m", 64)
        activate = await worker.become_active(WORKER, "w", "1")
        await gateway.say(ready=pb.Ready(revision=manifest.revision))
        assert (await gateway.hear("activate")).activate == activate
        await store.wait_until(lambda: bool(store.route and store.route.weights))
        assert store.route is not None
        assert store.route.weights == {manifest.revision: 100}
        assert store.route.epoch == activate.epoch
        assert store.workers["w"].ready == {manifest.revision}


async def test_reconnected_worker_is_activated_at_once(
    controller: Controller, store: MemoryRouteStore
) -> None:
    """A worker that holds the revision prepares nothing when it comes back on a new stream."""
    async with controller.member() as worker:
        activate = await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: "w" in store.workers)
        await worker.vanish()
        await store.wait_until(lambda: store.workers["w"].draining)
        resident = worker_pb2.ResidentRevision(
            model="m", revision=activate.revision, phase=worker_pb2.REVISION_PHASE_ACTIVE
        )
        await worker.hello(WORKER, "w", "1", revisions=[resident], epoch=activate.epoch, fence=1)
        await worker.hear("lease")
        assert (await worker.hear("activate")).activate == activate
        await store.wait_until(lambda: not store.workers["w"].draining)


async def test_killed_worker_is_removed(tmp_path: Path, store: MemoryRouteStore) -> None:
    """A worker that vanished and does not come back is gone from the store after its lease."""
    async with started(tmp_path, store, lease_ttl_s=1.5) as controller, controller.member() as worker:
        await controller.serving()
        await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: "w" in store.workers)
        await worker.vanish()
        await store.wait_until(lambda: "w" not in store.workers)
        response = await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=bearer("admin"))
        assert [each.state for each in response.workers] == [worker_pb2.WORKER_STATE_LOST]


async def test_leaving_worker_is_removed_at_once(controller: Controller, store: MemoryRouteStore) -> None:
    """A worker that closes its side ends in peace."""
    async with controller.member() as worker:
        await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: "w" in store.workers)
        await worker.leave()
        await store.wait_until(lambda: "w" not in store.workers)


async def test_emptied_store_is_rebuilt(controller: Controller, store: MemoryRouteStore) -> None:
    """After the store lost everything, route and record come back, and the worker hears of the new epoch."""
    async with controller.member() as worker:
        before = await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: bool(store.route and store.route.weights and store.workers))
        store.clear()
        await store.wait_until(lambda: store.route is not None and "w" in store.workers)
        after = (await worker.hear("activate")).activate
        assert after.epoch > before.epoch
        assert store.route is not None
        assert store.route.epoch == after.epoch


async def test_replacing_process_ends_the_old_stream(controller: Controller) -> None:
    """A second process under one name takes the name over, and must prepare."""
    async with controller.member() as old, controller.member() as new:
        await old.become_active(WORKER, "w", "1")
        await new.hello(WORKER, "w", "2")
        error = await old.end()
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await new.hear("lease")
        await new.hear("prepare")


async def test_member_must_speak_in_order(controller: Controller) -> None:
    """What breaks the protocol ends the stream with an error that names it, and nothing else."""
    async with controller.member() as first, controller.member() as second, controller.member() as third:
        first.open()
        await first.load()
        error = await first.end()
        assert error is not None
        assert isinstance(read_error(error), ArgumentInvalid)
        await second.hello(WORKER, "../w", "1")
        error = await second.end()
        assert error is not None
        assert "hello.id" in str(error.details())
        await third.hello(WORKER, "w", "1")
        await third.say(ready=pb.Ready(revision="unasked"))
        error = await third.end()
        assert error is not None
        assert isinstance(read_error(error), ArgumentInvalid)


async def test_download(controller: Controller, tmp_path: Path) -> None:
    """A member fetches a revision, goes on where an earlier attempt was cut, and checks every digest."""
    async with controller.member() as gateway:
        await gateway.hello(GATEWAY, "g", "1")
        await gateway.hear("lease")
        manifest = (await gateway.hear("prepare")).prepare.manifest
        files = [artifacts.FileDigest(file.path, file.size_bytes, file.sha256) for file in manifest.files]
        directory, offsets = tmp_path / "cache", []
        directory.mkdir()
        (directory / ".model.safetensors.partial").write_bytes(WEIGHTS[:1_000_000])
        download = gateway.download("m", manifest.revision)

        def counted(path: str, offset: int) -> AsyncIterator[bytes]:
            offsets.append((path, offset))
            return download(path, offset)

        fetched = await artifacts.fetch(
            files,
            local_path="",
            download=counted,
            directory=directory,
            on_progress=lambda _done, _total: None,
        )
        assert fetched == directory
        assert ("model.safetensors", 1_000_000) in offsets
        assert (directory / "model.safetensors").read_bytes() == WEIGHTS
        wrong = [artifacts.FileDigest("config.json", files[0].size_bytes, "0" * 64)]
        with pytest.raises(ArtifactInvalid):
            await artifacts.fetch(
                wrong,
                local_path=manifest.local_path,
                download=download,
                directory=tmp_path / "other",
                on_progress=lambda _done, _total: None,
            )
        assert list((tmp_path / "other").iterdir()) == []


async def test_download_of_what_is_not_there(controller: Controller) -> None:
    """Only files of the manifest can be named."""
    async with controller.member() as gateway:
        await gateway.hello(GATEWAY, "g", "1")
        await gateway.hear("lease")
        revision = (await gateway.hear("prepare")).prepare.manifest.revision
        for name, path, kind in (
            (revision, "../announce.json", ArgumentInvalid),
            ("unknown", "config.json", RevisionUnknown),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [data async for data in gateway.download("m", name)(path, 0)]
            assert isinstance(read_error(caught.value), kind)


async def test_mesh_credential(controller: Controller) -> None:
    """Without the mesh credential nobody attaches or downloads; a user's token is no credential."""
    async with controller.member("x" * 32) as stranger:
        stranger.open()
        error = await stranger.end()
        assert error is not None
        assert isinstance(read_error(error), MeshCredentialInvalid)
    request = pb.DownloadRevisionRequest(model="m", revision="r", path="config.json")
    download = controller.stub.DownloadRevision(request, metadata=bearer("admin"))
    assert isinstance(await refused(download.read()), MeshCredentialInvalid)


async def test_admin_needs_its_scope(controller: Controller) -> None:
    """A user's token lists models if it may read them, and does nothing else here."""
    user, reader = bearer("generate"), bearer("models:read")
    assert isinstance(await refused(controller.stub.ListWorkers(pb.ListWorkersRequest())), TokenMissing)
    for metadata in (user, reader):
        error = await refused(controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=metadata))
        assert isinstance(error, ScopeMissing)
        error = await refused(controller.stub.CreateRollout(pb.CreateRolloutRequest(), metadata=metadata))
        assert isinstance(error, ScopeMissing)
    models = pb.ControllerServiceListModelsRequest()
    assert isinstance(await refused(controller.stub.ListModels(models, metadata=user)), ScopeMissing)
    assert len((await controller.stub.ListModels(models, metadata=reader)).models) == 1


async def test_admin_lists(controller: Controller, store: MemoryRouteStore) -> None:
    """Operators see models, revisions and workers; what this version does not serve says so."""
    admin = bearer("admin")
    async with controller.member() as worker:
        activate = await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: bool(store.route and store.route.weights and store.workers))
        (model,) = (
            await controller.stub.ListModels(pb.ControllerServiceListModelsRequest(), metadata=admin)
        ).models
        assert (model.name, model.revision, model.ready_workers) == ("m", activate.revision, 1)
        assert model.is_default
        (one,) = (await controller.stub.ListWorkers(pb.ListWorkersRequest(), metadata=admin)).workers
        assert (one.id, one.state) == ("w", worker_pb2.WORKER_STATE_SERVING)
        assert one.revisions[0].phase == worker_pb2.REVISION_PHASE_ACTIVE
        (listed,) = (
            await controller.stub.ListRevisions(pb.ListRevisionsRequest(model="m"), metadata=admin)
        ).revisions
        request = pb.GetRevisionRequest(model="m", revision=activate.revision)
        got = (await controller.stub.GetRevision(request, metadata=admin)).revision
        assert got == listed
        assert (got.weight, got.ready_workers, got.manifest.local_path) == (100, 1, "")
        drain = pb.DrainWorkerRequest(worker_id="w")
        drained = (await controller.stub.DrainWorker(drain, metadata=admin)).worker
        assert drained.state == worker_pb2.WORKER_STATE_DRAINING
        await worker.hear("drain")
    unknown = pb.DrainWorkerRequest(worker_id="nobody")
    assert isinstance(await refused(controller.stub.DrainWorker(unknown, metadata=admin)), WorkerUnknown)
    rollout = controller.stub.CreateRollout(pb.CreateRolloutRequest(), metadata=admin)
    assert isinstance(await refused(rollout), ArgumentInvalid)
    watch = controller.stub.WatchRollout(pb.WatchRolloutRequest(), metadata=admin)
    assert isinstance(await refused(watch.read()), RolloutUnknown)


async def test_health_follows_the_store(tmp_path: Path, store: MemoryRouteStore) -> None:
    """Until the store was written once the controller is NOT_SERVING and members are told to wait."""
    store.reachable = False
    async with started(tmp_path, store) as controller, controller.member() as worker:
        response = await controller.health.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await until(lambda: store.calls)
        await worker.hello(WORKER, "w", "1")
        error = await worker.end()
        assert error is not None
        assert isinstance(read_error(error), StoreUnavailable)
        store.reachable = True
        await controller.serving()


async def test_restart_keeps_the_route(tmp_path: Path, store: MemoryRouteStore) -> None:
    """The next controller takes the route over with a higher fence, and the worker is activated at once."""
    async with started(tmp_path, store) as controller, controller.member() as worker:
        await controller.serving()
        activate = await worker.become_active(WORKER, "w", "1")
        await store.wait_until(lambda: bool(store.route and store.route.weights))
        controller.stop.set()
        error = await worker.end()
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    before = store.route
    assert before is not None
    async with started(tmp_path, store) as controller, controller.member() as worker:
        await controller.serving()
        resident = worker_pb2.ResidentRevision(
            model="m", revision=activate.revision, phase=worker_pb2.REVISION_PHASE_ACTIVE
        )
        await worker.hello(WORKER, "w", "1", revisions=[resident], epoch=activate.epoch, fence=1)
        assert (await worker.hear("lease")).lease.fence == 2
        again = (await worker.hear("activate")).activate
        assert again.revision == activate.revision
        assert again.epoch > activate.epoch
        assert store.route is not None
        assert (store.route.weights, store.route.fence) == (before.weights, 2)


async def test_model_that_cannot_be_served(tmp_path: Path, store: MemoryRouteStore) -> None:
    """A start with settings that the model cannot meet ends with the reason."""
    with pytest.raises(ArtifactInvalid, match="at most 64"):
        async with started(tmp_path, store, context_tokens=65) as controller:
            await controller.serving()
