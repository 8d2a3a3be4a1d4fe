"""Files of revisions. Owns: how a worker gets them, from its own disk or from the controller, checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
from interlock.v1 import controller_service_pb2, controller_service_pb2_grpc

from services.common import artifacts, status
from services.common.credential import mesh_metadata
from services.common.errors import ArtifactInvalid, StoreUnavailable
from services.common.ids import is_valid_id
from services.common.known_digests import KnownDigests
from services.worker.core.ports import Progress
from services.worker.core.revision import RevisionSpec


class MeshArtifacts:
    """Fetches what a revision needs.

    Args:
        cache_dir: Where downloaded revisions are kept, by model and revision.
        mesh_token: The join token of the mesh.
        channel: Returns the channel to the controller that leads now, None while there is none.
    """

    def __init__(
        self, cache_dir: Path, mesh_token: str, channel: Callable[[], grpc.aio.Channel | None]
    ) -> None:
        self._cache_dir = cache_dir
        self._mesh_token = mesh_token
        self._channel = channel
        self._known = KnownDigests()

    async def fetch(self, spec: RevisionSpec, progress: Progress) -> Path:
        """See `ArtifactStore.fetch`."""
        # Both become directory names.
        if not all(is_valid_id(name) and name.strip(".") for name in (spec.model, spec.revision)):
            raise ArtifactInvalid("The names of model and revision must be plain.")
        files = tuple(artifacts.FileDigest(one.path, one.size_bytes, one.sha256) for one in spec.files)

        def download(path: str, offset: int) -> AsyncIterator[bytes]:
            return self._download(spec, path, offset)

        return await artifacts.fetch(
            files,
            local_path=spec.local_path,
            download=download,
            directory=self._cache_dir / "revisions" / spec.model / spec.revision,
            on_progress=progress,
            known=self._known,
        )

    async def _download(self, spec: RevisionSpec, path: str, offset: int) -> AsyncIterator[bytes]:
        channel = self._channel()
        if channel is None:
            raise StoreUnavailable("No controller can be reached to download from.")
        stub = controller_service_pb2_grpc.ControllerServiceStub(channel)
        request = controller_service_pb2.DownloadRevisionRequest(
            model=spec.model, revision=spec.revision, path=path, offset=offset
        )
        call = stub.DownloadRevision(request, metadata=mesh_metadata(self._mesh_token))
        try:
            async for response in call:
                yield response.data
        except grpc.aio.AioRpcError as error:
            raise status.read_error(error) from error
        finally:
            call.cancel()
