"""The stream to the controller. Owns: this gateway's membership, and the catalog that comes out of it.

Must not know: requests. The controller prepares revisions here (their tokenizers) and activates them; while
it is away, what was activated goes on serving, and the link walks the list of controllers until one leads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import grpc
from interlock.v1 import (
    controller_service_pb2,
    controller_service_pb2_grpc,
    model_pb2,
    worker_pb2,
)

from services.common import artifacts, channel, logs
from services.common.credential import mesh_metadata
from services.common.errors import ArtifactInvalid, InterlockError
from services.common.hf_tokenizer import HfTokenizer
from services.common.revision_download import RevisionDownload
from services.gateway.core.catalog import Catalog, CatalogEntry
from services.gateway.core.tallies import Tallies

# The controller's leases count seconds.
REPORT_S = 1.0
# A restarted controller is found within a second; a list of dead ones is not walked in a busy loop.
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 1.0
# A controller answers a hello at once; one that does not is passed over.
HELLO_TIMEOUT_S = 3.0
# Messages on their way to the controller: a report a second and a few answers.
OUTGOING_MAX = 64

# Why an attachment ended of which nothing was heard.
_SILENCE = "no answer"

Request = controller_service_pb2.AttachRequest
Command = controller_service_pb2.AttachResponse


@dataclass(frozen=True, slots=True)
class Membership:
    """How the gateway introduces itself.

    Attributes:
        gateway_id: Its name.
        incarnation: Names the process.
        address: Where others reach it.
        mesh_token: The join token.
        controllers: Addresses of the controllers.
        cache_dir: Where downloaded tokenizers are kept.
    """

    gateway_id: str
    incarnation: str
    address: str
    mesh_token: str
    controllers: tuple[str, ...]
    cache_dir: Path


class ControllerLink:
    """Keeps the gateway attached.

    Args:
        membership: Who we are, and who leads perhaps.
        catalog: Is told what serves.
        tallies: What became of the attempts at each revision.
        secondary: Whether they are another mesh's, whose models stand in for this one's.
    """

    def __init__(
        self, membership: Membership, catalog: Catalog, tallies: Tallies, *, secondary: bool = False
    ) -> None:
        self._membership = membership
        self._catalog = catalog
        self._tallies = tallies
        self._secondary = secondary
        # What these controllers have had prepared. Catalog and tallies may know of others' models, too, whose
        # revisions may have the same names.
        self._models: set[str] = set()
        # By their digest, while anything serves with them: reading one holds the interpreter, and with it
        # every stream, for as long as it takes, and revisions of one model mostly share theirs.
        self._tokenizers = WeakValueDictionary[str, HfTokenizer]()
        self._fence = 0
        self._attached_once = False

    @property
    def attached_once(self) -> bool:
        """Whether a controller has ever granted a lease."""
        return self._attached_once

    @property
    def mesh_token(self) -> str:
        """What proves that this gateway belongs to the mesh."""
        return self._membership.mesh_token

    async def run(self) -> None:
        """Attaches, again and again, until it is cancelled."""
        backoff_s, at = BACKOFF_FIRST_S, 0
        while True:
            address = self._membership.controllers[at % len(self._membership.controllers)]
            session = _Attachment(self, address)
            cause = await self._attach(session)
            logs.get_logger().info("controller.detached", cause=cause)
            backoff_s = BACKOFF_FIRST_S if session.leased else min(2 * backoff_s, BACKOFF_LAST_S)
            # Whoever led a moment ago probably leads again, unless it fell silent.
            at = at if session.leased and cause != _SILENCE else at + 1
            await asyncio.sleep(backoff_s)

    async def _attach(self, session: _Attachment) -> str:
        """Runs one attachment; a defect in it must not end the membership for good."""
        try:
            return await session.run()
        except Exception:  # noqa: BLE001 - logged with its traceback; the next attachment begins afresh
            logs.get_logger().error("controller.crashed", exc_info=True)
            return "a defect"

    def hello(self) -> Request:
        """The first message, with what this gateway holds already."""
        member = self._membership
        hello = controller_service_pb2.Hello(
            kind=controller_service_pb2.MEMBER_KIND_GATEWAY,
            id=member.gateway_id,
            incarnation=member.incarnation,
            address=member.address,
            revisions=[
                self._resident(entry) for entry in self._catalog.prepared if entry.model in self._models
            ],
            epoch=max(
                (entry.epoch for entry in self._catalog.entries if entry.model in self._models), default=0
            ),
            fence=self._fence,
        )
        return Request(hello=hello)

    def report(self) -> Request:
        """The sign of life, with what is counted here of the workers' work."""
        tallies = [
            controller_service_pb2.RevisionTally(
                model=tally.model,
                revision=tally.revision,
                finished=tally.finished,
                failed=tally.failed,
                ttft_counts=tally.ttft,
            )
            for tally in self._tallies
            if tally.model in self._models
        ]
        return Request(load=worker_pb2.WorkerLoad(), tallies=tallies)

    def leased(self, lease: controller_service_pb2.Lease) -> None:
        """A controller took the gateway in."""
        self._attached_once = True
        self._fence = max(self._fence, lease.fence)

    async def prepare(self, manifest: model_pb2.Manifest, downloads: grpc.aio.Channel) -> Request:
        """Loads the tokenizer of a revision, whose files come from there; returns Ready or Failed."""
        if self._secondary and self._catalog.is_own(manifest.model):
            return _failed(manifest.revision, "the gateway serves a model of this name for its own mesh")
        try:
            entry = await self._load(manifest, downloads)
        except InterlockError as error:
            return _failed(manifest.revision, error.message)
        except Exception:  # noqa: BLE001 - a defect here must reach the rollout, not end the membership
            logs.get_logger().error("tokenizer.crashed", revision=manifest.revision, exc_info=True)
            return _failed(manifest.revision, "the gateway could not load the tokenizer")
        self._models.add(entry.model)
        self._catalog.prepare(entry)
        logs.get_logger().info("tokenizer.prepared", model=manifest.model, revision=manifest.revision)
        return Request(ready=controller_service_pb2.Ready(revision=manifest.revision))

    def activate(self, command: controller_service_pb2.Activate) -> Request:
        """Lets a prepared revision serve; returns Activated or Failed."""
        prepared = self._catalog.find_prepared(command.model, command.revision)
        if prepared is None or prepared.secondary is not self._secondary:
            return _failed(command.revision, "the gateway was not asked to prepare this revision")
        entry = replace(prepared, epoch=command.epoch)
        self._catalog.activate(entry)
        logs.get_logger().info(
            "revision.activated", model=entry.model, revision=entry.revision, epoch=entry.epoch
        )
        activated = controller_service_pb2.Activated(revision=entry.revision, epoch=command.epoch)
        return Request(activated=activated)

    def drop(self, model: str, revision: str) -> None:
        """Forgets a prepared revision; an empty model means any of these controllers'."""
        for own in self._models & {model} if model else self._models:
            self._catalog.drop(revision, own)

    async def _load(self, manifest: model_pb2.Manifest, downloads: grpc.aio.Channel) -> CatalogEntry:
        files = [artifacts.FileDigest(file.path, file.size_bytes, file.sha256) for file in manifest.files]
        wanted = artifacts.tokenizer_files(files)
        if not any(file.path == "tokenizer.json" for file in wanted):
            raise ArtifactInvalid("tokenizer.json: is not among the files of the revision.")

        async def connected() -> grpc.aio.Channel:
            # Another controller asks for the revision anew, and what came is on disk.
            return downloads

        download = RevisionDownload(manifest.model, manifest.revision, self._membership.mesh_token, connected)
        # The digest, not the name: two revisions with one tokenizer share it, and no name is a path.
        digest = artifacts.tokenizer_digest(files)
        directory = await artifacts.fetch(
            wanted,
            local_path=manifest.local_path,
            download=download.read,
            directory=self._membership.cache_dir / "tokenizers" / digest,
            on_progress=_ignore_progress,
        )
        tokenizer = self._tokenizers.get(digest)
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(HfTokenizer.load, directory)
            self._tokenizers[digest] = tokenizer
        return CatalogEntry(
            model=manifest.model,
            revision=manifest.revision,
            epoch=0,
            context_tokens=manifest.context_tokens,
            quantization=manifest.quantization,
            tokenizer=tokenizer,
            fallback=manifest.fallback_model,
            secondary=self._secondary,
        )

    def _resident(self, entry: CatalogEntry) -> worker_pb2.ResidentRevision:
        serving = {(served.model, served.revision) for served in self._catalog.entries}
        active = (entry.model, entry.revision) in serving
        phase = worker_pb2.REVISION_PHASE_ACTIVE if active else worker_pb2.REVISION_PHASE_READY
        return worker_pb2.ResidentRevision(model=entry.model, revision=entry.revision, phase=phase)


class _Attachment:
    """One stream to one controller."""

    def __init__(self, link: ControllerLink, address: str) -> None:
        self._link = link
        self._address = address
        self._outgoing: asyncio.Queue[Request] = asyncio.Queue(OUTGOING_MAX)
        self._silence_s = HELLO_TIMEOUT_S
        # What ends with the stream: its writer, its reports, and what it was asked to prepare.
        self._helpers: set[asyncio.Task[None]] = set()
        self.leased = False

    async def run(self) -> str:
        """Speaks with the controller until one side ends it; returns why."""
        cause = "the stream ended"
        # Files have a connection of their own, which opens when one is asked for: on a slow line the lease
        # would wait behind them for longer than it holds.
        connection, downloads = channel.connect(self._address, light=True), channel.connect(self._address)
        try:
            stub = controller_service_pb2_grpc.ControllerServiceStub(connection)
            call = stub.Attach(metadata=mesh_metadata(self._link.mesh_token))
            await self._converse(call, downloads)
        except* grpc.RpcError as group:
            cause = _cause(group)
        except* (TimeoutError, asyncio.QueueFull, asyncio.InvalidStateError):
            cause = _SILENCE
        finally:
            await asyncio.gather(connection.close(), downloads.close())
        return cause

    async def _converse(self, call: Any, downloads: grpc.aio.Channel) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._help(tasks, self._write(call))
            self._help(tasks, self._report())
            try:
                # The connection to a process that was stopped stays open.
                async with asyncio.timeout(HELLO_TIMEOUT_S) as patience:
                    async for command in call:
                        self._obey(command, downloads, tasks)
                        patience.reschedule(asyncio.get_running_loop().time() + self._silence_s)
            finally:
                for helper in tuple(self._helpers):
                    helper.cancel()
                call.cancel()

    def _help(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
        helper = tasks.create_task(work)
        self._helpers.add(helper)
        helper.add_done_callback(self._helpers.discard)

    async def _write(self, call: Any) -> None:
        await call.write(self._link.hello())
        while True:
            await call.write(await self._outgoing.get())

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            self._say(self._link.report())

    def _obey(self, command: Command, downloads: grpc.aio.Channel, tasks: asyncio.TaskGroup) -> None:
        match command.WhichOneof("command"):
            case "lease":
                self.leased = True
                # A lease without a length is good until the stream ends.
                self._silence_s = command.lease.ttl.ToTimedelta().total_seconds() or math.inf
                self._link.leased(command.lease)
            case "prepare":
                self._help(tasks, self._prepare(command.prepare.manifest, downloads))
            case "activate":
                self._say(self._link.activate(command.activate))
            case "retire":
                self._link.drop(command.retire.model, command.retire.revision)
                retired = controller_service_pb2.Retired(revision=command.retire.revision)
                self._say(Request(retired=retired))
            case "abort":
                self._link.drop("", command.abort.revision)

    async def _prepare(self, manifest: model_pb2.Manifest, downloads: grpc.aio.Channel) -> None:
        self._say(await self._link.prepare(manifest, downloads))

    def _say(self, request: Request) -> None:
        """Puts a message behind those that wait; a controller that reads none of them is given up."""
        self._outgoing.put_nowait(request)


def _failed(revision: str, reason: str) -> Request:
    failed = controller_service_pb2.Failed(
        revision=revision, phase=worker_pb2.REVISION_PHASE_LOAD, reason=reason
    )
    return Request(failed=failed)


def _cause(group: BaseExceptionGroup[Any]) -> str:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    code = first.code() if isinstance(first, grpc.aio.AioRpcError) else "unknown"
    return str(code)


def _ignore_progress(_done: int, _total: int) -> None:
    """A tokenizer is small; the controller waits for Ready alone."""
