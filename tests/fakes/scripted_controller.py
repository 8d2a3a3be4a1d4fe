"""A controller with a script: a real gRPC server that speaks `Attach` and `DownloadRevision`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import controller_service_pb2_grpc, model_pb2

from services.common.credential import check_mesh_token
from services.common.grpc_types import Context
from tests.fakes.scripted_worker import MESH_TOKEN


class ScriptedController(controller_service_pb2_grpc.ControllerServiceServicer):
    """Takes a gateway in, prepares one revision, activates it when the gateway is ready.

    Attributes:
        manifest: What it prepares.
        heard: Everything that the gateway said, reports left out.
        tallies: The counts of its latest report.
        downloads: Paths that were downloaded.
        attached_by: The ends of connections over which somebody attached.
        downloaded_by: The ends of those over which files were asked for.
        commands: What else to say to whoever is attached.
    """

    def __init__(self, manifest: model_pb2.Manifest, directory: Path) -> None:
        self.manifest = manifest
        self.heard: list[pb.AttachRequest] = []
        self.tallies: list[pb.RevisionTally] = []
        self.downloads: list[str] = []
        self.attached_by: set[str] = set()
        self.downloaded_by: set[str] = set()
        self.commands: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self.changed = asyncio.Condition()
        self._directory = directory

    async def wait_heard(self, kind: str, count: int = 1) -> pb.AttachRequest:
        """Returns message number `count` of a kind as soon as it came."""
        found: list[pb.AttachRequest] = []

        def there() -> bool:
            found[:] = [message for message in self.heard if message.WhichOneof("event") == kind]
            return len(found) >= count

        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(there)
        return found[count - 1]

    async def wait_counted(self, finished: int, failed: int) -> pb.RevisionTally:
        """Returns the one tally as soon as a report has these counts."""

        def there() -> bool:
            return [(one.finished, one.failed) for one in self.tallies] == [(finished, failed)]

        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(there)
        return self.tallies[0]

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """Lease, Prepare, and Activate once it is ready; then whatever the test says."""
        check_mesh_token(tuple(context.invocation_metadata() or ()), MESH_TOKEN)
        self.attached_by.add(context.peer())
        listening = asyncio.create_task(self._listen(request_iterator))
        try:
            await self.wait_heard("hello")
            yield pb.AttachResponse(lease=pb.Lease(fence=3))
            yield pb.AttachResponse(prepare=pb.Prepare(manifest=self.manifest))
            while (command := await self.commands.get()) is not None:
                yield command
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def DownloadRevision(
        self, request: pb.DownloadRevisionRequest, context: Context
    ) -> AsyncIterator[pb.DownloadRevisionResponse]:
        """The file, in two parts."""
        check_mesh_token(tuple(context.invocation_metadata() or ()), MESH_TOKEN)
        self.downloads.append(request.path)
        self.downloaded_by.add(context.peer())
        data = (self._directory / request.path).read_bytes()[request.offset :]
        yield pb.DownloadRevisionResponse(data=data[: len(data) // 2])
        yield pb.DownloadRevisionResponse(data=data[len(data) // 2 :])

    async def _listen(self, requests: AsyncIterator[pb.AttachRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("event") == "load":
                self.tallies = list(request.tallies)
            else:
                self.heard.append(request)
            if request.WhichOneof("event") == "ready":
                await self.activate(1)
            async with self.changed:
                self.changed.notify_all()

    async def activate(self, epoch: int) -> None:
        """Says that the revision serves."""
        activate = pb.Activate(model=self.manifest.model, revision=self.manifest.revision, epoch=epoch)
        await self.commands.put(pb.AttachResponse(activate=activate))


def manifest_of(directory: Path, *, model: str, revision: str, local_path: str = "") -> model_pb2.Manifest:
    """A manifest over all files of a directory."""
    files = [
        model_pb2.ArtifactFile(
            path=path.name,
            size_bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.iterdir())
    ]
    return model_pb2.Manifest(
        model=model, revision=revision, files=files, context_tokens=512, local_path=local_path
    )


@asynccontextmanager
async def scripted_controller(
    manifest: model_pb2.Manifest, directory: Path
) -> AsyncIterator[tuple[ScriptedController, str]]:
    """A controller that listens, with its address; it is gone afterwards."""
    controller = ScriptedController(manifest, directory)  # type: ignore[abstract] # it plays two methods
    server: Any = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    controller_service_pb2_grpc.add_ControllerServiceServicer_to_server(controller, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield controller, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
