"""Files of revisions. Owns: how a worker gets them, from its own disk or from the controller, checked."""

from __future__ import annotations

from pathlib import Path

from services.common import artifacts
from services.common.known_digests import KnownDigests
from services.common.revision_download import Connected, RevisionDownload
from services.worker.adapters.revision_cache import RevisionCache
from services.worker.core.ports import Progress
from services.worker.core.revision import RevisionSpec


class MeshArtifacts:
    """Fetches what a revision needs.

    Args:
        cache: Where downloaded revisions are kept.
        mesh_token: The join token of the mesh.
        connected: Returns the channel to the controller that leads, as soon as there is one.
    """

    def __init__(self, cache: RevisionCache, mesh_token: str, connected: Connected) -> None:
        self._cache = cache
        self._mesh_token = mesh_token
        self._connected = connected
        self._known = KnownDigests()

    async def fetch(self, spec: RevisionSpec, progress: Progress) -> Path:
        """See `ArtifactStore.fetch`."""
        files = tuple(artifacts.FileDigest(one.path, one.size_bytes, one.sha256) for one in spec.files)
        if local := await artifacts.find(files, spec.local_path, progress, self._known):
            return local
        download = RevisionDownload(spec.model, spec.revision, self._mesh_token, self._connected)
        return await artifacts.fetch(
            files,
            local_path="",
            download=download.read,
            directory=await self._cache.claim(spec.revision, files),
            on_progress=progress,
            known=self._known,
        )

    def release(self, revision: str) -> None:
        """See `ArtifactStore.release`."""
        self._cache.release(revision)
