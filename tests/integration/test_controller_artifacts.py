"""Controllers whose uploads live at a URL, over real gRPC: one machine is lost, and another one leads."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2, rollout_pb2

from services.common.config import ConfigInvalid
from services.common.credential import mesh_metadata
from services.common.errors import RevisionUnknown
from services.common.status import read_error
from services.controller.adapters.file_rollouts import encode
from services.controller.core.rollout_record import Spec, create
from tests.fakes.controller_ports import MemoryRouteStore
from tests.fakes.controller_process import MESH_TOKEN, Controller, bearer, started
from tests.fixtures.upload_world import CONTENT, digest_of

ADMIN = bearer("admin")


async def pushed(controller: Controller) -> None:
    """What a client does."""
    files = [
        model_pb2.ArtifactFile(path=path, size_bytes=len(data), sha256=digest_of(data))
        for path, data in CONTENT.items()
    ]
    wanted = model_pb2.Manifest(model="m", revision="v2", context_tokens=64, files=files)
    plan = await controller.stub.PlanUpload(pb.PlanUploadRequest(manifest=wanted), metadata=ADMIN)
    content = {digest_of(data): data for data in CONTENT.values()}
    chunks = [pb.BlobChunk(sha256=one.sha256, data=content[one.sha256]) for one in plan.missing]
    parts = [pb.UploadRevisionRequest(manifest=wanted)]
    parts += [pb.UploadRevisionRequest(chunk=chunk) for chunk in chunks]
    await controller.stub.UploadRevision(iter(parts), metadata=ADMIN)


async def downloaded(controller: Controller, path: str) -> bytes:
    """What a worker gets."""
    request = pb.DownloadRevisionRequest(model="m", revision="v2", path=path)
    call = controller.stub.DownloadRevision(request, metadata=mesh_metadata(MESH_TOKEN))
    return b"".join([response.data async for response in call])


async def test_a_revision_outlives_the_machine_that_took_it_in(tmp_path: Path) -> None:
    """The next controller has an empty disk: it lists the revision, gives its files, and deletes it.

    It knows what rollouts there were, too, and says so to the one after it.
    """
    url = f"file://{tmp_path}/remote"
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    async with started(tmp_path / "first", MemoryRouteStore(), artifacts_url=url) as controller:
        await controller.serving()
        await pushed(controller)
    left_off = create("r", Spec(model="m", revision="v2"), "v0", 1)
    (tmp_path / "remote" / "m" / "rollouts").mkdir()
    (tmp_path / "remote" / "m" / "rollouts" / "r.41.json").write_bytes(encode(left_off))
    async with started(tmp_path / "second", MemoryRouteStore(), artifacts_url=url) as controller:
        await controller.serving()
        listed = await controller.stub.ListRevisions(pb.ListRevisionsRequest(model="m"), metadata=ADMIN)
        assert "v2" in {revision.manifest.revision for revision in listed.revisions}
        for path, data in CONTENT.items():
            assert await downloaded(controller, path) == data
        await controller.stub.DeleteRevision(
            pb.DeleteRevisionRequest(model="m", revision="v2"), metadata=ADMIN
        )
        (rollout,) = (await controller.stub.ListRollouts(pb.ListRolloutsRequest(), metadata=ADMIN)).rollouts
        # The revision before it is nowhere.
        assert rollout.state == rollout_pb2.ROLLOUT_STATE_ABORTED
    left = [path.name for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert sorted(left) == ["format.json", "r.42.json"]
    async with started(tmp_path / "third", MemoryRouteStore(), artifacts_url=url) as controller:
        await controller.serving()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await downloaded(controller, "config.json")
        assert isinstance(read_error(caught.value), RevisionUnknown)


async def test_a_url_of_no_known_protocol_stops_the_start(tmp_path: Path) -> None:
    """Before anything is bound, and without the password that stands in it."""
    with pytest.raises(ConfigInvalid, match="no such protocol") as caught:
        async with started(tmp_path, MemoryRouteStore(), artifacts_url="no-such://user:word@host/a"):
            pass
    assert "word" not in str(caught.value)
