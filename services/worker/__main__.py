"""The worker process. Owns: putting the parts together, and the order in which they start and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from interlock.v1 import worker_service_pb2_grpc

from services.common import announce, heap, logs, metrics, server
from services.common.clock import Clock
from services.common.config import from_command_line
from services.common.hf_tokenizer import HfTokenizer
from services.common.ids import new_incarnation
from services.common.interceptors import MeshOnly
from services.common.system_clock import SystemClock
from services.worker.adapters import library_environment
from services.worker.adapters.controller_link import ControllerLink, Membership
from services.worker.adapters.mesh_artifacts import MeshArtifacts
from services.worker.adapters.prometheus_engine import EngineCollector
from services.worker.adapters.revision_cache import RevisionCache
from services.worker.config import WorkerConfig
from services.worker.core.ports import FormatLibrary, RevisionLoader
from services.worker.core.revision import Residency
from services.worker.engine import Engine, EngineSettings, Preparation
from services.worker.servicer import SERVICE, WorkerServicer

# EX_SOFTWARE: the supervisor starts another process.
EXIT_HUNG = 70

# Time for streams that were ended to carry their last message.
STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Compute:
    """What a worker computes with.

    Attributes:
        devices: Kind, name and bytes of each.
        loader: Loads revisions onto them.
        formats: Compiles formats; None: jobs that have one are refused.
    """

    devices: tuple[tuple[str, str, int], ...]
    loader: RevisionLoader
    formats: FormatLibrary | None = None


def torch_compute(config: WorkerConfig) -> Compute:
    """Compute by torch. Blocks for seconds: it imports torch, which nothing else here does."""
    allowed = os.sched_getaffinity(0)
    threads = library_environment.prepare(config.threads)
    from services.worker.adapters import torch_compute as adapter  # noqa: PLC0415 - as said
    from services.worker.adapters.llguidance_formats import LlguidanceLibrary  # noqa: PLC0415 - it is large

    device = adapter.choose_device(config.device)
    loader = adapter.make_loader(config, device, threads)
    # This thread, which the import has bound, does other things later.
    os.sched_setaffinity(0, allowed)
    kind, name, total_bytes = adapter.describe_device(device)
    memory_bytes = min(config.memory_bytes or total_bytes, total_bytes)
    return Compute(((kind, name, memory_bytes),), loader, LlguidanceLibrary())


class _Process:
    """The parts of one worker.

    Args:
        config: Its settings.
        clock: Its time.
        die: Ends the process at once; a step that hangs leaves no other way.
    """

    def __init__(self, config: WorkerConfig, clock: Clock, die: Callable[[int], None]) -> None:
        self.config = config
        self.clock = clock
        self._die = die
        self._changes: set[asyncio.Task[None]] = set()
        self._abandoned = False
        self.link: ControllerLink | None = None
        self.preparation: Preparation | None = None
        self.formats: FormatLibrary | None = None
        self.exposition = metrics.Exposition()
        token = config.mesh_token.get_secret_value()
        # A session holds slots: with a gateway that is gone without a word, it ends within seconds.
        mesh_only = MeshOnly(token, (f"/{SERVICE}/",))
        self.server = server.create([SERVICE], clock, interceptors=[mesh_only], pings=True)
        self.residency = Residency()
        settings = EngineSettings(
            slots=config.slots,
            chunk_tokens=config.prefill_chunk_tokens,
            shared_chunk_tokens=config.prefill_chunk_shared_tokens,
            watchdog_s=config.watchdog_s,
            prefix_cache_share=config.prefix_cache_share,
        )
        self.engine = Engine(self.residency, settings, clock, self._on_fatal)
        self.incarnation = new_incarnation()
        servicer = WorkerServicer(config.id, self.incarnation, self.engine, self.residency, clock)
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, self.server.grpc_server)

    async def open(self) -> str:
        """Binds, starts and announces the server; returns its address."""
        address = self.server.bind(self.config.bind)
        await self.server.start()
        self.engine.start()
        numbers = EngineCollector(lambda: self.engine.pulse, self.residency)
        self.exposition = metrics.expose(self.config.metrics_bind, numbers)
        announce.write(
            self.config.announce_file,
            id=self.config.id,
            address=address,
            metrics=self.exposition.address,
        )
        logs.get_logger().info("process.started", address=address)
        return address

    async def serve(self, make_compute: Callable[[WorkerConfig], Compute]) -> None:
        """Serves until cancelled."""
        address = await self.open()
        compute = await asyncio.to_thread(make_compute, self.config)
        self.formats = compute.formats
        self.link, self.preparation = link, preparation = self._join(address, compute)
        await link.run(preparation)

    def _join(self, address: str, compute: Compute) -> tuple[ControllerLink, Preparation]:
        """Builds what talks to the controller."""
        token = self.config.mesh_token.get_secret_value()
        member = Membership(
            worker_id=self.config.id,
            incarnation=self.incarnation,
            address=address,
            slots=self.config.slots,
            controllers=self.config.controllers,
            mesh_token=token,
            devices=compute.devices,
        )
        link = ControllerLink(member, self.residency, lambda: self.engine.pulse, self.refuse_new_work)
        cache = RevisionCache(self.config.cache_dir / "revisions", self.config.cache_revisions_bytes)
        store = MeshArtifacts(cache, token, link.connected)
        preparation = Preparation(
            self.engine,
            self.residency,
            store,
            compute.loader,
            self.clock,
            report=link.report,
            on_change=self.show_health,
            formats=compute.formats,
            open_tokenizer=HfTokenizer.load,
            memory_bytes=sum(memory_bytes for _, _, memory_bytes in compute.devices),
        )
        return link, preparation

    def refuse_new_work(self) -> None:
        """From now on the worker drains, and its controller hears of it."""
        self._stop_serving()
        if self.link is not None:
            self.link.report_load()

    def _stop_serving(self) -> None:
        self.residency.draining = True
        self.show_health()

    def show_health(self) -> None:
        """Health follows the residency."""
        task = asyncio.create_task(self.server.set_serving(self.residency.serving), name="health")
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def drain(self) -> None:
        """Takes nothing new and lets what runs end, inside the grace."""
        self.refuse_new_work()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_grace_s):
                await self.engine.drained()

    async def close(self) -> None:
        """Ends the engine and the server; at last the process, where a thread does not let go."""
        if self.preparation is not None:
            self._abandoned = not await self.preparation.stop()
        await self.engine.stop()
        if self.formats is not None:
            await self.formats.close()
        await self.server.grpc_server.stop(STOP_GRACE_S)
        await asyncio.gather(*self._changes)
        self.exposition.close()
        if self._abandoned:
            logs.get_logger().info("process.stopped", abandoned="a load")
            self._die(0)

    def _on_fatal(self, cause: str) -> None:
        # No word of it to the controller: what it was loading may have been the cause, and counts as that.
        self._stop_serving()

        async def end() -> None:
            await asyncio.gather(*self._changes)
            self._die(EXIT_HUNG)

        logs.get_logger().critical("process.died", cause=cause)
        asyncio.create_task(end(), name="end")  # noqa: RUF006 - the process ends with it


async def run(
    config: WorkerConfig,
    *,
    make_compute: Callable[[WorkerConfig], Compute] = torch_compute,
    until_stopped: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]] = server.run_until_signal,
    clock: Clock | None = None,
    die: Callable[[int], None] = os._exit,
) -> None:
    """Runs a worker until it is told to stop.

    Args:
        config: Its settings.
        make_compute: Makes what it computes with; called in a thread, after the port is bound.
        until_stopped: Waits for the signal to stop, then awaits the drain that it is given.
        clock: Its time; None: the machine's.
        die: Ends the process at once, with an exit code.
    """
    process = _Process(config, clock or SystemClock(), die)
    # The wait for signals begins first: once the port is announced, a supervisor may send one.
    stopping = asyncio.create_task(_as_task(until_stopped(process.drain)), name="until-stopped")
    serving = asyncio.create_task(process.serve(make_compute), name="serve")
    try:
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, serving):
            task.cancel()
        results = await asyncio.gather(stopping, serving, return_exceptions=True)
        await process.close()
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _as_task(work: Awaitable[None]) -> None:
    await work


def _settled_compute(config: WorkerConfig) -> Compute:
    """`torch_compute`; the libraries that it brings are no garbage."""
    compute = torch_compute(config)
    heap.settle()
    return compute


def main() -> None:
    """The entry point of `python -m services.worker`."""
    config = from_command_line(WorkerConfig, "worker")
    logs.configure("worker", config.id, level=config.log_level)
    try:
        asyncio.run(run(config, make_compute=_settled_compute))
    except (metrics.MetricsPortTaken, server.PortTaken) as error:
        raise SystemExit(f"worker: {error}") from None


if __name__ == "__main__":
    main()
