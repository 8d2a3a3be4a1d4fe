"""Files of revisions. Owns: how a worker gets them, from its own disk or from the controller, checked."""

from __future__ import annotations

from pathlib import Path

from services.common import artifacts
from services.common.errors import ArtifactInvalid
from services.common.ids import is_valid_id
from services.common.known_digests import KnownDigests
from services.common.revision_download import Connected, RevisionDownload
from services.worker.core.ports import Progress
from services.worker.core.revision import RevisionSpec


class MeshArtifacts:
    """Fetches what a revision needs.

    Args:
        cache_dir: Where downloaded revisions are kept, by model and revision.
        mesh_token: The join token of the mesh.
        connected: Returns the channel to the controller that leads, as soon as there is one.
    """

    def __init__(self, cache_dir: Path, mesh_token: str, connected: Connected) -> None:
        self._cache_dir = cache_dir
        self._mesh_token = mesh_token
        self._connected = connected
        self._known = KnownDigests()

    async def fetch(self, spec: RevisionSpec, progress: Progress) -> Path:
        """See `ArtifactStore.fetch`."""
        # Both become directory names.
        if not all(is_valid_id(name) and name.strip(".") for name in (spec.model, spec.revision)):
            raise ArtifactInvalid("The names of model and revision must be plain.")
        files = tuple(artifacts.FileDigest(one.path, one.size_bytes, one.sha256) for one in spec.files)
        download = RevisionDownload(spec.model, spec.revision, self._mesh_token, self._connected)
        return await artifacts.fetch(
            files,
            local_path=spec.local_path,
            download=download.read,
            directory=self._cache_dir / "revisions" / spec.model / spec.revision,
            on_progress=progress,
            known=self._known,
        )
